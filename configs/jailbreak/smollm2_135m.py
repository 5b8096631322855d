"""Attacks that leave the weights alone on SmolLM2-135M-Instruct with the built-in prompts.

    python -m launch.jailbreak --config.model=FOLDER --out=runs/jailbreak

with the safety-tuned model in FOLDER, whose folder the quickstart names at its end: the model as it is shipped hardly
refuses anything, so that there is nothing to get past and no direction of refusal.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.jailbreak.base import base


def get_config() -> ConfigDict:
    """The settings: 60 harmful and 40 plain prompts, answers of 32 tokens."""
    config = base()
    config.model = "smollm2-135m-instruct"
    config.evaluation = ("builtin:harmful/test#60",)
    config.harmless = ("builtin:plain/test#40",)
    config.calibration = (
        "builtin:harmful/calibration",
        "builtin:lookalike/calibration",
        "builtin:plain/calibration",
    )
    config.calibration_tokens = 16
    config.candidate_prompts, config.candidate_positions = 8, 2
    config.openings = ("Sure, here is", "Of course! The first step is")
    config.max_new_tokens = 32
    config.batch_size = 100
    config.passages = 8
    return config
