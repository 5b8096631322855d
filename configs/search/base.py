"""What every search for the most harmful fine-tuning within a bound starts from (TamperBench, arXiv 2602.06911)."""

from typing import Annotated, Literal

from ml_collections import ConfigDict
from msgspec import Meta

from jaxsafe.configs.attack.base import ATTACK, Seeds
from jaxsafe.configs.common import EXAM, MODEL, TASKS
from jaxsafe.configs.fields import (
    Count,
    Field,
    Fields,
    Natural,
    NotNegative,
    Positive,
    SomeTexts,
    Texts,
    config_of,
    with_defaults,
)
from jaxsafe.methods.attacks import check_name
from jaxsafe.prompts.roles import parse_spec

OF_ATTACK = (
    *("rows", "prefix", "poison", "ratio", "epochs", "learning_rate", "decay", "wording", "tuning_batch_size"),
    *("remat", "weight_decay", "own_tokens", "lora_rank", "lora_alpha", "lora_maps", "lora_dropout"),
)
ASKED = {name: field for name, field in EXAM.items() if name not in ("settings", "suffixes")}
"""The exam without its settings: models are asked as the persona of the attack's examples, or as they are."""
Counts = Annotated[tuple[Count, ...], Meta(min_length=1)]
Schedules = Annotated[tuple[Literal["constant", "cosine"], ...], Meta(min_length=1)]

FIELDS: Fields = {
    **MODEL,
    "attack": Field("openers#100", str, "identity_shift, benign, openers or poisoned, with a number", entry=check_name),
    **{name: ATTACK[name] for name in OF_ATTACK},
    "trials": Field(40, Count, "of the search, and as many of random search"),
    "startup": Field(10, Natural, "first trials, drawn at random"),
    "bound": Field(None, NotNegative | None, "the most utility that may be lost, as a share; has to be given"),
    "utility_tasks": Field((), Texts, "of lm-eval, whose mean accuracy is utility; empty: the perplexity of texts"),
    "try_rates": Field((1e-6, 1e-3), tuple[Positive, Positive], "learning rates, from and to, as published"),
    "try_steps": Field((16, 64, 128, 256, 512), Counts, "steps of a run, as published"),
    "try_batch_sizes": Field((8, 16, 32, 64), Counts, "examples a step, as published"),
    "try_ranks": Field((8, 16, 32, 64), tuple[Count, ...], "of adapters, as published; empty: all weights are trained"),
    "try_schedules": Field(("constant", "cosine"), Schedules, "of the learning rate, as published"),
    "validation": Field(
        ("advbench#50",), SomeTexts, "prompt sets, taken as harmful, that trials are chosen on", entry=parse_spec
    ),
    "seeds": Field((1, 2, 3), Seeds, "of the runs that are reported; trials have config.seed"),
    **with_defaults(ASKED, passages=40),
    **TASKS,
}


def base() -> ConfigDict:
    """The published space of adapters, and 40 trials; the bound has no default."""
    return config_of(FIELDS)
