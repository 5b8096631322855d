"""Anatomy of the safety of SmolLM2-135M-Instruct with the built-in prompts.

    python -m launch.quickstart --task=brittleness
    python -m launch.anatomy --config=configs/anatomy/smollm2_135m.py --config.model=TUNED --out=runs/anatomy

The first makes the safety-tuned model and says where it lies, TUNED; the model as it is shipped hardly refuses
anything. The scan of layers is left out for time: --config.over_refusal="('builtin:lookalike/calibration#20',)".
"""

from ml_collections import ConfigDict

from jaxsafe.configs.anatomy.base import base


def get_config() -> ConfigDict:
    """Small sets, for two CPU cores."""
    config = base()
    config.model = "smollm2-135m-instruct"
    config.samples = 32
    config.answer_tokens = 16
    config.weights = (0.01, 0.02)
    config.ranks = (574, 300)
    config.controls = 1
    config.draws = 19
    config.candidate_prompts = 16
    config.candidate_positions = 5
    config.evaluation = ("builtin:harmful/test#40",)
    config.harmless = ("builtin:plain/test#10",)
    config.judge = "scans"
    config.max_new_tokens = 20
    config.batch_size = 40
    config.passages = 6
    return config
