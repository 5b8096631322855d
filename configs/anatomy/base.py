"""What every study of the anatomy of a model's safety starts from (arXiv 2402.05162, 2410.10862, 2408.17003)."""

from typing import Annotated

from ml_collections import ConfigDict
from msgspec import Meta

from jaxsafe.configs.attack.base import SCAN
from jaxsafe.configs.common import EXAM, MODEL, SCORING, TASKS
from jaxsafe.configs.fields import Count, Field, Fields, Natural, Positive, Share, SomeTexts, Texts, config_of
from jaxsafe.methods.anatomy import ROLES
from jaxsafe.prompts.roles import parse_spec

FIELDS: Fields = {
    **MODEL,
    **SCORING,
    "unit_shares": Field(
        (0.01, 0.1, 0.1), tuple[Share, Share, Share], "of the units' cost: for safety, for utility, redundant"
    ),
    "as_coded": Field(False, bool, "variances of units as the published code estimates them"),
    "prune": Field(("safety", "utility", "redundant"), Texts, "roles whose units are pruned, each a variant", ROLES),
    "weights": Field((0.05, 0.05), tuple[Share, Share], "(q, p): top q of safety and not top p of utility"),
    "ranks": Field((4000, 3550), tuple[Count, Count], "(r_s, r_u): ranks of safety outside those of utility"),
    "controls": Field(3, Natural, "random counterparts of every variant"),
    "draws": Field(39, Annotated[int, Meta(ge=1)], "random parts that overlaps are held against"),
    "malicious": Field(
        ("builtin:harmful/calibration",),
        SomeTexts,
        "prompt sets that gap and direction are read from",
        entry=parse_spec,
    ),
    "normal": Field(("builtin:plain/calibration",), SomeTexts, "their normal counterparts", entry=parse_spec),
    "triples": Field(500, Count, "of prompts whose angles are compared; published: 500 pairs"),
    "candidate_prompts": Field(32, Count, "of each kind, on which candidates for the refusal direction are tried"),
    "candidate_positions": Field(8, Count, "the most last positions of a prompt that candidates are taken from"),
    "kl": Field(0.1, Positive, "nats by which the direction's ablation may move safe answers"),
    "over_refusal": Field(
        (), Texts, "prompt sets whose refusals find the layers by scaling; empty: no scan", (), parse_spec
    ),
    "layer_alpha": SCAN["layer_alpha"],
    "layer_tokens": SCAN["layer_tokens"],
    **EXAM,
    **TASKS,
}


def base() -> ConfigDict:
    """The settings, those of Llama-2-7B where they count ranks."""
    return config_of(FIELDS)
