"""Operations of a pass, from the configuration: the compiler's own count takes a loop over layers for one turn.

Two operations for a multiplication and an addition; norms, softmax and rotations are left out, as is usual.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxsafe.devices import chip_of
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.weights import count_parameters, layer_shape, partition_spec, shapes, weights


def flops(
    config: ModelConfig,
    mesh: Mesh,
    rows: int,
    queries: int,
    keys: int,
    unembedded: int,
) -> float:
    """Operations of one device in a forward pass of `rows` rows of `queries` tokens that see `keys` slots each.

    `unembedded` positions in all get logits. Rows are split over the data axis, and each map over the model axis
    where its heads or features divide; what does not divide is computed by every device of that axis.
    """
    table = weights(config)
    model = mesh.shape["model"]

    def one(path: str, tokens: float) -> float:
        spec = partition_spec(config, table[path], mesh)
        return 2.0 * tokens * math.prod(layer_shape(config, table[path])) / (model if "model" in spec else 1)

    tokens = rows * queries
    linear = sum(one(path, tokens) for path, w in table.items() if w.linear and w.stacked)
    seen = min(keys, config.window or keys)
    heads = config.heads / (model if config.kv_heads % model == 0 else 1)
    attention = 4.0 * tokens * seen * heads * config.head_dim
    logits = one("unembed" if "unembed" in table else "embed", unembedded)
    return (config.layers * (linear + attention) + logits) / mesh.shape["data"]


def decomposition_flops(inputs: int, outputs: int) -> float:
    """Operations of the basis of one map: its products, and 9 M^3 for eigenvalues and eigenvectors.

    M = min(inputs, outputs). Source of the second: Golub and Van Loan, Matrix Computations, section 8.3; a TPU's
    own algorithm takes several times as many. A wide map first finds its row space, another such decomposition.
    """
    I, O, M = inputs, outputs, min(inputs, outputs)
    inner = 2.0 * (I * I * M + I * M * M) + 9.0 * M**3
    if outputs <= inputs:
        return inner
    row_space = 2.0 * (I * I * O + I * I * O) + 9.0 * I**3 + 3 * 4.0 * O * I * I
    return inner + row_space + 2.0 * (I * O * I) + 2.0 * O * I * I


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
