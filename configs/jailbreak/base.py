"""What every run of attacks that leave the weights alone starts from."""

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
    Positive,
    SomeTexts,
    config_of,
    with_defaults,
)
from jaxsafe.methods.jailbreaks import SOURCES
from jaxsafe.prompts.roles import parse_spec

NAMES = tuple(SOURCES)
ASKED = {name: field for name, field in with_defaults(EXAM, judge="scans").items() if name != "settings"}
"""The exam without its settings: an attack says itself how prompts are put."""
CALIBRATION = ("advbench#64", "builtin:plain/calibration#64")
Scales = Annotated[tuple[Positive, ...], Meta(min_length=1)]
Nucleus = Annotated[float, Meta(gt=0, le=1)]

FIELDS: Fields = {
    **MODEL,
    **ASKED,
    "attacks": Field(NAMES[:-1], SomeTexts, "which ones, beside the plain request; suffix needs suffixes", NAMES),
    "openings": Field(("Sure, here is",), SomeTexts, "what answers begin with, one after the other (prefill)"),
    "persona": Field("", str, "its system prompt; empty: the built-in one, which obeys"),
    "temperatures": Field((0.25, 0.5, 0.75, 1.0), tuple[Positive, ...], "of the sweep of decodings"),
    "top_ps": Field((0.5, 0.75, 0.9), tuple[Nucleus, ...], "of the sweep, at temperature 1"),
    "top_ks": Field((2, 10, 50), tuple[Count, ...], "of the sweep, at temperature 1"),
    "scaled_layers": Field(None, Layers | None, "layers [first, stop) whose maps are scaled; None: the middle third"),
    "scales": Field((0.9, 0.8), Scales, "factors that these are taken times"),
    "controls": Field(3, Natural, "random directions, and sets of other layers, beside each ablation and scaling"),
    "calibration": Field(CALIBRATION, SomeTexts, "prompt sets that find the refusal direction", entry=parse_spec),
    "calibration_tokens": Field(24, Count, "the most tokens of an answer to a calibration prompt"),
    "candidate_prompts": Field(32, Count, "of each kind, on which candidates for the direction are tried"),
    "candidate_positions": Field(8, Count, "the most last positions of a prompt that candidates are taken from"),
}


def base() -> ConfigDict:
    """The settings, with the defaults that suit most chat models."""
    return config_of(FIELDS)
