"""Fine-tuning attacks on SmolLM2-135M-Instruct with the built-in examples and prompts.

    python -m launch.quickstart --task=attack

runs this on the model after safety tuning: about 15 minutes on two cores. On the model as it is shipped, which hardly
refuses anything, there is no safety to lose.

The learning rate is twice the paper's and stays as it is, and batches are half as large: a model of this size needs
more of a push, and its user less of a wait. So it has two seeds, hence two draws of each random region. The variant

    python -m launch.attack --config=configs/attack/smollm2_135m.py:steps --config.model=TUNED

draws the attacker's curve instead: attack success and perplexity after 5, 10, 20, 40 and 80 steps of adapters of 16
ranks on 100 openers, harmful prompts with the first words of an answer and no answer (of your own:
--config.attacks="('poisoned#100',)" --config.poison=FILE), by three seeds that are trained at once.
"""

from typing import Any

from ml_collections import ConfigDict

from jaxsafe.configs.attack.base import base

STEPS: dict[str, Any] = {
    "attacks": ("openers#100",),
    "tunings": ("lora",),
    "lora_rank": 16,
    "lora_alpha": 32.0,
    "epochs": 4,
    "seeds": (0, 1, 2),
    "freeze_weights": (),
    "freeze_ranks": (),
    "evaluate_every": 0,
    "evaluate_at": (5, 10, 20, 40, 80),
    "checkpoint_every": 20,
    "max_new_tokens": 32,
}
VARIANTS: dict[str, dict[str, Any]] = {"": {}, "steps": STEPS}


def get_config(variant: str = "") -> ConfigDict:
    """The settings of the quickstart; `variant` "steps" is the attacker's curve. Raises ValueError for another."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not known; the variants are {list(VARIANTS)}")
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
    config.update(VARIANTS[variant])
    return config
