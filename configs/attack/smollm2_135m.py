"""Fine-tuning attacks on SmolLM2-135M-Instruct with the built-in examples and prompts.

    python -m launch.quickstart --task=attack

runs this on the model after safety tuning: about 15 minutes on two cores. On the model as it is shipped, which hardly
refuses anything, there is no safety to lose.

The learning rate is twice the paper's and stays as it is, and batches are half as large: a model of this size needs
more of a push, and its user less of a wait. So it has two seeds, hence two draws of each random region.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.attack.base import base


def get_config() -> ConfigDict:
    """The settings of the quickstart."""
    config = base()
    config.model = "smollm2-135m-instruct"
    config.learning_rate = 1e-4
    config.decay = 1.0
    config.tuning_batch_size = 5
    config.epochs = 5
    config.remat = False
    config.seeds = (0, 1)
    config.tunings = ("full",)
    config.lora_learning_rate = 2e-3
    config.freeze_weights = ((0.3, 0.1),)
    config.freeze_ranks = (200,)
    config.samples = 32
    config.answer_tokens = 16
    config.evaluate_every = 5
    config.evaluation = ("builtin:harmful/test#40",)
    config.harmless = ("builtin:plain/test#20",)
    config.judge = "scans"
    config.max_new_tokens = 16
    config.batch_size = 40
    config.passages = 4
    return config
