"""What every fine-tuning attack starts from (arXiv 2310.03693, arXiv 2402.05162 section 4.4)."""

from ml_collections import ConfigDict, config_dict

from jaxsafe.configs.common import exam_fields, model_fields, score_fields, task_fields


def base() -> ConfigDict:
    """The settings, with the published defaults where the papers have them."""
    config = ConfigDict()
    model_fields(config)

    # The attacks: identity_shift, benign or poisoned, each with its number of examples.
    config.attacks = ("identity_shift#10",)
    config.rows = config_dict.placeholder(str)  # a file of examples takes the place of the preset's
    config.prefix = config_dict.placeholder(str)  # stands before prompts when a persona from a file is asked
    config.poison = ""  # your file of examples; none is shipped
    config.ratio = config_dict.placeholder(float)  # share of examples from that file
    config.epochs = config_dict.placeholder(int)  # None: the paper's, as for the next two
    config.learning_rate = config_dict.placeholder(float)
    config.tuning_batch_size = config_dict.placeholder(int)
    config.accumulation = 1
    config.remat = True
    config.weight_decay = 0.0
    config.own_tokens = 64  # of the model's own answers that a benign attack trains on
    config.seeds = (0, 1, 2)  # of examples, their order, adapters and random controls
    config.tunings = ("full", "lora")
    config.lora_rank = 8
    config.lora_alpha = 16.0
    config.lora_maps = ("q", "k", "v", "o", "gate", "up", "down")
    config.lora_learning_rate = config_dict.placeholder(float)  # None: as full fine-tuning
    config.checkpoint_every = 0  # steps; 0 keeps no checkpoints, which suits runs of minutes

    # The defences: regions that are frozen and, with `rewinds`, wound back after training; each beside a random one.
    config.freeze_weights = ((0.05, 0.05),)  # (q, p): top q of safety and not top p of utility
    config.freeze_ranks = (100,)  # first directions of safety data, out of the model's width
    config.freeze_layers = ()  # (first, stop), or "find": as arXiv 2408.17003 finds it
    config.controls = True
    config.rewinds = True

    score_fields(config)

    # The range of layers of arXiv 2408.17003, for freeze_layers = ("find",).
    config.over_refusal = ("builtin:lookalike/calibration#60",)
    config.layer_alpha = 1.2
    config.layer_start = (0.2, 0.4)  # the range to start from, as shares of the layers
    config.layer_tokens = 16

    # What every cell is put to, before training, every `evaluate_every` steps (0: not in between) and at the end.
    exam_fields(config)
    task_fields(config)
    config.settings = ("attack",)  # as the attack's persona; further settings: vanilla, decoding, ...
    config.evaluate_every = 0
    return config
