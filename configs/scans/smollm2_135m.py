"""SCANS on SmolLM2-135M-Instruct with the built-in prompts.

    python -m launch.quickstart

runs this on the model after safety tuning (about ten minutes on two CPU cores), and

    python -m launch.scans --config=configs/scans/smollm2_135m.py --out=runs/smollm2

on the model as it is shipped, which hardly refuses anything.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.scans.base import base


def get_config() -> ConfigDict:
    """The settings of the quickstart."""
    config = base()
    config.model = "smollm2-135m-instruct"
    config.anchors = ("builtin:harmful/anchor", "builtin:plain/anchor")
    config.calibration = (
        "builtin:harmful/calibration",
        "builtin:lookalike/calibration",
        "builtin:plain/calibration#24",
    )
    config.evaluation = ("builtin:lookalike/test", "builtin:harmful/test", "builtin:plain/test")
    config.alpha_grid = (0.01, 0.02, 0.03)
    config.calibration_tokens = 12
    config.max_new_tokens = 32
    config.batch_size = 100
    config.passages = 24
    return config
