"""Remedies for over-refusal on SmolLM2-135M-Instruct with the built-in prompts.

    python -m launch.quickstart

runs those named here on the model after safety tuning, and

    python -m launch.overrefusal --config=configs/overrefusal/smollm2_135m.py --out=runs/smollm2

on the model as it is shipped, which hardly refuses anything.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.overrefusal.base import base


def get_config() -> ConfigDict:
    """The settings of the quickstart."""
    config = base()
    config.model = "smollm2-135m-instruct"
    config.anchors = ("builtin:harmful/anchor", "builtin:lookalike/anchor", "builtin:plain/anchor")
    config.calibration = (
        "builtin:harmful/calibration",
        "builtin:lookalike/calibration",
        "builtin:plain/calibration",
    )
    config.evaluation = ("builtin:lookalike/test", "builtin:harmful/test", "builtin:plain/test")
    config.calibration_tokens = 16
    config.max_new_tokens = 32
    config.batch_size = 100
    config.passages = 24
    return config
