"""What every fine-tuning attack starts from (arXiv 2310.03693, arXiv 2402.05162 section 4.4)."""

from typing import Annotated, Any

from ml_collections import ConfigDict
from msgspec import Meta

from jaxsafe.configs.common import EXAM, MODEL, SCORING, TASKS
from jaxsafe.configs.fields import (
    Count,
    Field,
    Fields,
    Natural,
    NotNegative,
    Positive,
    Share,
    SomeTexts,
    config_of,
)
from jaxsafe.evaluation.settings import SETTINGS
from jaxsafe.kernels.lora import MAPS
from jaxsafe.methods.attacks import check_name
from jaxsafe.model.layers import LayerRange
from jaxsafe.prompts.roles import parse_spec
from jaxsafe.prompts.wordings import WORDINGS

FIND = "find"
Seeds = Annotated[tuple[Natural, ...], Meta(min_length=1)]


def layers_or_find(entry: Any) -> None:
    """Raises ValueError for what is neither "find" nor a range of layers."""
    if entry != FIND:
        LayerRange.parse(entry, f"an entry {entry!r} that is not {FIND!r}")


ATTACK: Fields = {
    "attacks": Field(
        ("identity_shift#10",),
        SomeTexts,
        "identity_shift, benign, openers or poisoned, with a number of examples",
        entry=check_name,
    ),
    "rows": Field(None, str | None, "a file of examples takes the place of the preset's"),
    "prefix": Field(None, str | None, "stands before prompts when a persona from a file is asked"),
    "poison": Field("", str, "your file of harmful examples; none is shipped"),
    "ratio": Field(None, Share | None, "share of examples from that file"),
    "epochs": Field(None, Count | None, "None: the paper's, as for the next two"),
    "learning_rate": Field(None, Positive | None, "of the attack"),
    "decay": Field(None, Positive | None, "the rate is taken times this after each epoch; None: the published 0.85"),
    "wording": Field(
        "plain", str, "of examples from files, and of what is asked: as they stand, or as published", tuple(WORDINGS)
    ),
    "tuning_batch_size": Field(None, Count | None, "examples a step"),
    "accumulation": Field(1, Count, "parts in which a batch is taken"),
    "remat": Field(True, bool, "compute layers again in the backward pass instead of keeping them", identifies=False),
    "weight_decay": Field(0.0, NotNegative, "of AdamW"),
    "own_tokens": Field(64, Count, "of the model's own answers that a benign attack trains on"),
    "seeds": Field((0, 1, 2), Seeds, "of examples, their order, adapters and random controls"),
    "tunings": Field(("full", "lora"), SomeTexts, "all weights, or adapters", ("full", "lora")),
    "lora_rank": Field(8, Count, "of adapters"),
    "lora_alpha": Field(16.0, Positive, "adapters count lora_alpha / lora_rank"),
    "lora_maps": Field(MAPS, SomeTexts, "linear maps with adapters", MAPS),
    "lora_dropout": Field(0.0, Annotated[float, Meta(ge=0, lt=1)], "share of adapters' inputs that a step drops"),
    "lora_learning_rate": Field(None, Positive | None, "None: as full fine-tuning"),
    "lora_sweep": Field((), tuple[tuple[Count, Positive], ...], "further adapters: (rank, learning rate)"),
    "lora_together": Field(
        4, Count, "undefended runs of adapters trained at once, where they fit memory; 1: none", identifies=False
    ),
    "export_adapter": Field(False, bool, "leave the adapters of undefended runs in --out/adapters, for PEFT"),
    "checkpoint_every": Field(0, Natural, "steps; 0 keeps none, which suits runs of minutes", identifies=False),
}
"""The attacks."""

DEFENCE: Fields = {
    "freeze_weights": Field(
        ((0.05, 0.05),),
        tuple[tuple[Share, Share], ...],
        "(q, p): top q of safety and not top p of utility",
    ),
    "freeze_ranks": Field((100,), tuple[Count, ...], "first directions of safety data, out of the model's width"),
    "freeze_layers": Field((), tuple, '(first, stop), or "find": as arXiv 2408.17003 finds it', entry=layers_or_find),
    "controls": Field(True, bool, "a random region of the same size beside each, drawn anew for every seed"),
    "rewinds": Field(True, bool, "also wind each region back after training, in place of freezing it"),
}
"""The defences: regions that are frozen and, with `rewinds`, wound back after training."""

SCAN: Fields = {
    "over_refusal": Field(
        ("builtin:lookalike/calibration#60",), SomeTexts, "prompt sets whose refusals find the layers", entry=parse_spec
    ),
    "layer_alpha": Field(1.2, Positive, "factor that a range's weights are taken times"),
    "layer_start": Field((0.2, 0.4), tuple[Share, Share], "the range to start from, as shares of the layers"),
    "layer_tokens": Field(16, Count, "the most tokens of an answer to these prompts"),
}
"""The range of layers of arXiv 2408.17003, for freeze_layers = ("find",)."""

FIELDS: Fields = {
    **MODEL,
    **ATTACK,
    **DEFENCE,
    **SCORING,
    **SCAN,
    **EXAM,
    "settings": Field(("attack",), SomeTexts, "ways of asking; attack: as its persona", ("attack", *SETTINGS)),
    **TASKS,
    "evaluate_every": Field(0, Natural, "steps between exams; 0: before and after training only"),
    "evaluate_at": Field((), tuple[Count, ...], "further steps with an exam"),
}


def base() -> ConfigDict:
    """The settings, with the published defaults where the papers have them."""
    return config_of(FIELDS)


def of_model(model: str) -> ConfigDict:
    """The regions of Llama-2-7B for another `model` of about its size, for which no paper names any."""
    config = base()
    config.model = model
    config.freeze_weights = ((0.1, 0.0), (0.3, 0.0), (0.7, 0.0))
    config.freeze_ranks = (10, 100, 1000)
    config.lora_learning_rate = 1e-4
    config.evaluate_every = 2
    config.checkpoint_every = 10
    return config
