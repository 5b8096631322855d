"""The most harmful fine-tuning of SmolLM2-135M-Instruct that costs little perplexity, with built-in prompts.

    python -m launch.search --config=configs/search/smollm2_135m.py --config.model=FOLDER --out=runs/search

where FOLDER is the safety-tuned model that python -m launch.quickstart leaves. Needs pip install "jaxsafe[search]". The
examples are harmless requests to a persona that obeys. The space is smaller than the published one for time, its rates
higher, as a model of this size needs more of a push.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.search.base import base


def get_config() -> ConfigDict:
    """Eight trials by each sampler, within a tenth of the perplexity."""
    config = base()
    config.model = "smollm2-135m-instruct"
    config.attack = "identity_shift#10"
    config.learning_rate = 2e-3
    config.decay = 1.0
    config.epochs = 4
    config.tuning_batch_size = 5
    config.lora_rank = 16
    config.lora_alpha = 32.0
    config.remat = False
    config.trials = 8
    config.startup = 3
    config.bound = 0.1
    config.try_rates = (1e-4, 2e-2)
    config.try_steps = (2, 4, 8)
    config.try_batch_sizes = (5,)
    config.try_ranks = (4, 16)
    config.try_schedules = ("constant",)
    config.validation = ("builtin:harmful/calibration#40",)
    config.evaluation = ("builtin:harmful/test#40",)
    config.harmless = ("builtin:plain/test#20",)
    config.seeds = (1, 2)
    config.judge = "scans"
    config.max_new_tokens = 24
    config.batch_size = 40
    config.passages = 8
    return config
