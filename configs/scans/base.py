"""What every SCANS experiment starts from. A `None` is chosen on the calibration prompts."""

from typing import Annotated

from ml_collections import ConfigDict
from msgspec import Meta

from jaxsafe.configs.common import EXAM, EXPECTED, MODEL
from jaxsafe.configs.fields import Count, Field, Fields, Layers, NotNegative, Share, Texts, config_of, with_defaults
from jaxsafe.methods.scans import SHARES
from jaxsafe.prompts.roles import parse_spec

ANCHORS = ("advbench#48", "malicious_instruct#16", "truthfulqa#32", "builtin:plain/anchor#32")
CALIBRATION = (
    "advbench#48",
    "malicious_instruct#16",
    "truthfulqa#32",
    "builtin:plain/calibration#32",
    "builtin:lookalike/calibration#48",
)
PUBLISHED_SETS = ("xstest", "oktest", "advbench", "malicious_instruct", "truthfulqa")
Cosine = Annotated[float, Meta(ge=-1, le=1)]
Grid = Annotated[tuple[float, ...], Meta(min_length=1)]

FIELDS: Fields = {
    **MODEL,
    **EXPECTED,
    **with_defaults(EXAM, evaluation=PUBLISHED_SETS, harmless=(), judge="scans"),
    "anchors": Field(ANCHORS, Texts, "prompt sets that refusal directions are made from", entry=parse_spec),
    "calibration": Field(CALIBRATION, Texts, "prompt sets on which what is open is chosen", entry=parse_spec),
    "vectors": Field("", str, "vectors.safetensors of an earlier run: nothing is computed or calibrated anew"),
    "scored": Field(None, Layers | None, "layers [first, stop) whose cosines the classifier takes"),
    "threshold": Field(None, Cosine | None, "cosine from which on a prompt counts as harmful"),
    "layers": Field(None, Layers | None, "layers [first, stop) that are steered"),
    "alpha": Field(None, float | None, "strength in every layer; needs scored, threshold and layers, too"),
    "alpha_rel": Field(None, float | None, "strength as a share of each layer's length; not beside alpha"),
    "share_of": Field("state", str, "whose length: of the mean state, or of the difference of means (eq. 1)", SHARES),
    "alpha_grid": Field((0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1), Grid, "values of alpha_rel to choose from"),
    "kl_limit": Field(0.1, NotNegative, "nats a token, on safe prompts that the model answers anyway"),
    "max_drop": Field(0.05, Share, "of the refusal rate of harmful calibration prompts"),
    "threshold_by": Field(
        "outcome", str, "best refusals after steering, or best verdicts of the classifier", ("outcome", "roc")
    ),
    "calibration_tokens": Field(24, Count, "the most tokens of an answer to a calibration prompt"),
}


def base() -> ConfigDict:
    """The settings, with the defaults that suit most chat models."""
    return config_of(FIELDS)


def calibrated(model: str, variant: str) -> ConfigDict:
    """The settings of a `model` for which no choices are published. Raises ValueError for a `variant` other than ""."""
    if variant:
        raise ValueError(f"variant {variant!r} is not known; the variants are ['']")
    config = base()
    config.model = model
    return config
