"""What every comparison of remedies for over-refusal starts from. A `None` is chosen on the calibration prompts."""

from typing import Annotated

from ml_collections import ConfigDict
from msgspec import Meta

from jaxsafe.configs.common import EXAM, MODEL
from jaxsafe.configs.fields import (
    Count,
    Field,
    Fields,
    Layers,
    Natural,
    NotNegative,
    Share,
    SomeTexts,
    config_of,
    with_defaults,
)
from jaxsafe.configs.scans.base import PUBLISHED_SETS, Cosine
from jaxsafe.kernels.actions import SPANS
from jaxsafe.methods.adasteer import PUBLISHED
from jaxsafe.methods.baselines import BASELINES
from jaxsafe.methods.remedies import DEFAULTS, REMEDIES
from jaxsafe.prompts.roles import parse_spec

SCANS = "scans"
NAMES = (*REMEDIES, SCANS, *BASELINES)
ANCHORS = ("advbench#48", "malicious_instruct#16", "truthfulqa#32", "builtin:lookalike/anchor", "builtin:plain/anchor")
CALIBRATION = (
    "advbench#48",
    "malicious_instruct#16",
    "truthfulqa#32",
    "builtin:harmful/calibration",
    "builtin:lookalike/calibration",
    "builtin:plain/calibration",
)
Doses = Annotated[tuple[Annotated[float, Meta(gt=0)], ...], Meta(min_length=1)]

FIELDS: Fields = {
    **MODEL,
    **with_defaults(EXAM, evaluation=PUBLISHED_SETS, harmless=(), judge="scans"),
    "remedies": Field(NAMES, SomeTexts, "which ones, beside the model as it is", NAMES),
    "controls": Field(True, bool, "beside each its random control: another direction of the same size"),
    "anchors": Field(ANCHORS, SomeTexts, "prompt sets that directions are made from", entry=parse_spec),
    "calibration": Field(CALIBRATION, SomeTexts, "prompt sets that remedies are fitted to besides", entry=parse_spec),
    "gate_layers": Field(None, tuple[Natural, ...] | None, "blocks whose states the gate reads; None: by the depth"),
    "missed": Field(0.05, Share, "share of harmful calibration prompts that gates may let through"),
    "layers": Field(None, Layers | None, "layers [first, stop) that are steered; None: the middle third"),
    "span": Field("end+4", str, "where steering acts, from the prompt's end on", tuple(SPANS)),
    "kl": Field(0.1, Annotated[float, Meta(gt=0)], "nats a token by which a strength may move safe answers"),
    "strengths": Field(DEFAULTS.strengths, Doses, "to mend by, as shares of the mean state"),
    "candidate_prompts": Field(32, Count, "of each kind, on which candidates for a refusal direction are tried"),
    "candidate_positions": Field(8, Count, "the most last positions of a prompt that candidates are taken from"),
    "published": Field("", str, "whose settings AdaSteer and AlphaSteer take; empty: ours", ("", *PUBLISHED)),
    "scans_choice": Field(
        None,
        tuple[Layers, Layers, Cosine, NotNegative] | None,
        "SCANS's scored and steered layers, threshold and alpha; None: chosen on the calibration prompts",
    ),
    "dro_samples": Field(25, Count, "answers to a calibration prompt that DRO samples"),
    "dro_steps": Field(160, Count, "steps of 50 prompts that DRO is trained for"),
    "calibration_tokens": Field(24, Count, "the most tokens of an answer to a calibration prompt"),
}


def base() -> ConfigDict:
    """The settings, with the defaults that suit most chat models."""
    return config_of(FIELDS)


def of_model(model: str, published: str = "") -> ConfigDict:
    """The settings for `model`; `published` names the settings of AdaSteer and AlphaSteer."""
    config = base()
    config.model, config.published = model, published
    return config
