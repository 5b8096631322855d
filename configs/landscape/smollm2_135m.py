"""The safety landscape of SmolLM2-135M-Instruct with the built-in prompts.

    python -m launch.landscape --config=configs/landscape/smollm2_135m.py --config.model=FOLDER --out=runs/landscape

where FOLDER is the safety-tuned model that python -m launch.quickstart leaves. The model as it is shipped hardly
refuses anything, so there is no basin to measure; it is what --config.other_model=smollm2-135m-instruct walks toward.

For time there are half the steps and prompts of the paper.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.landscape.base import base


def get_config() -> ConfigDict:
    """Three lines of 11 points."""
    config = base()
    config.model = "smollm2-135m-instruct"
    config.steps = 10
    config.plane_steps = 0
    config.evaluation = ("builtin:harmful/test#40",)
    config.harmless = ("builtin:plain/test#20",)
    config.judge = "scans"
    config.max_new_tokens = 16
    config.batch_size = 40
    config.passages = 4
    return config
