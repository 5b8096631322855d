"""Remedies for over-refusal on SmolLM2-135M-Instruct with the built-in prompts.

    python -m launch.quickstart

runs the one that works best there on the model after safety tuning, and

    python -m launch.overrefusal --config=configs/overrefusal/smollm2_135m.py:all --config.model=FOLDER

all of them on the model in FOLDER, such as the safety-tuned one, whose folder the quickstart names at its end: the
model as it is shipped hardly refuses anything.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.overrefusal.base import NAMES, base

VARIANTS = {"": ("mend",), "all": NAMES}


def get_config(variant: str = "") -> ConfigDict:
    """The settings of the quickstart, or with "all" remedies. Raises ValueError for another variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not known; the variants are {list(VARIANTS)}")
    config = base()
    config.remedies = VARIANTS[variant]
    config.model = "smollm2-135m-instruct"
    config.anchors = ("builtin:harmful/anchor", "builtin:lookalike/anchor", "builtin:plain/anchor")
    config.calibration = (
        "builtin:harmful/calibration",
        "builtin:lookalike/calibration",
        "builtin:plain/calibration",
    )
    config.evaluation = ("builtin:lookalike/test", "builtin:harmful/test", "builtin:plain/test")
    config.calibration_tokens = 16
    config.dro_samples, config.dro_steps = 4, 20
    config.candidate_prompts, config.candidate_positions = 8, 2
    config.max_new_tokens = 32
    config.batch_size = 160
    config.passages = 24
    return config
