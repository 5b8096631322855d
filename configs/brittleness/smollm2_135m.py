"""Brittleness of SmolLM2-135M-Instruct with the built-in prompts.

    python -m launch.quickstart --task=brittleness

runs this on the model after safety tuning. On the model as it is shipped, which hardly refuses anything, there is no
safety to score. For time it draws one random control a point, equal in number; intervals then cover prompts alone.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.brittleness.base import base


def get_config() -> ConfigDict:
    """The settings of the quickstart."""
    config = base()
    config.model = "smollm2-135m-instruct"
    config.samples = 96
    config.answer_tokens = 16
    config.set_difference = ((0.002, 0.01), (0.003, 0.01), (0.005, 0.02), (0.01, 0.02))
    config.orthogonal = ((575, 400), (574, 300), (570, 200))
    config.controls = 1
    config.controls_by = ("number",)
    config.evaluation = ("builtin:harmful/test#80",)
    config.harmless = ("builtin:plain/test#40",)
    config.settings = ("vanilla",)
    config.judge = "scans"
    config.max_new_tokens = 20
    config.batch_size = 40
    config.passages = 12
    config.similarity_rank = 20
    return config
