"""How fast a run was, and how much of its devices it used."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxsafe.devices import chip_of
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.weights import count_parameters, shapes


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens that were read by forward passes, learned from (forward and backward), and written one after another."""

    read: int = 0
    learned: int = 0
    written: int = 0

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.read + other.read, self.learned + other.learned, self.written + other.written)

    def __bool__(self) -> bool:
        return self != Tokens()


def utilisation(
    config: ModelConfig, devices: Sequence[Any], tokens: Tokens, batch: int, seconds: float
) -> dict[str, float]:
    """How fast a stage of a run was, and how much of `devices` it used.

    "tokens_per_s" of all kinds, "new_tokens_per_s" where some were written, and where the peaks of the devices are
    known "model_flops_share" and, with written ones, "bandwidth_share", each out of 1. Operations are two a parameter
    and token, six where it is learned from; bytes are those of the weights, read once a decode step, of which there
    are at least `tokens.written` / `batch`: both leave out attention, and so are low.
    """
    found = chip_of(devices[0].device_kind)
    count = count_parameters(shapes(config)) - (0 if config.tied else config.vocab * config.embed)
    use = {"tokens_per_s": (tokens.read + tokens.learned + tokens.written) / seconds}
    if tokens.written:
        use["new_tokens_per_s"] = tokens.written / seconds
    if found is not None:
        whole = len(devices) * seconds
        operations = count * (2.0 * (tokens.read + tokens.written) + 6.0 * tokens.learned)
        use["model_flops_share"] = operations / (whole * found.flops)
        if tokens.written:
            moved = float(jnp.dtype(config.dtype).itemsize) * count * tokens.written / batch
            use["bandwidth_share"] = moved / (whole * found.bandwidth)
    return use
