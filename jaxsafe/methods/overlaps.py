"""How far attributions of safety agree, layer by layer, each against a random part of the same size.

Weights (SNIP set difference, arXiv 2402.05162), units (SSAH, arXiv 2410.10862), ranks (ActSVD outside utility, arXiv
2402.05162) and the refusal direction (arXiv 2406.11717) name parts of different kinds. Two sets of weights have a
Jaccard index; what a set of weights M writes to the stream, or a direction r, has a share of energy inside a span V:

    captured(M) = |(M * W) V|^2 / |M * W|^2        captured(r) = |V^T r|^2, the sum of squared cosines of the angles

over the maps that write to the residual stream, o and down, whose outputs all four have in common. The comparison is
ours.

L layers, N heads, I inputs of a map in a row, O = D outputs, R ranks, S random draws
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.stats import beta

from jaxsafe.kernels.ablation import WRITERS
from jaxsafe.kernels.lowrank import Bases, as_matrices
from jaxsafe.kernels.selection import Mask, random_like
from jaxsafe.kernels.units import Units, unit_mask
from jaxsafe.methods.ssah import random_units
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.layers import LayerRange
from jaxsafe.model.transformer import Params
from jaxsafe.model.weights import flatten, linear_maps, nest
from jaxsafe.progress import Progress, silent
from jaxsafe.records.anatomy import ByLayer, Inside, Overlap

PATHS = tuple(f"layers/{name}" for name in WRITERS)
Spans = Mapping[str, Float[Any, "L O R"]]
"""Orthonormal columns, or zero ones, by the path of a map that writes to the stream."""
JACCARD, CAPTURED = "Jaccard index", "captured energy"


@dataclasses.dataclass(frozen=True)
class Parts:
    """What each attribution names in one model.

    weights: a mask of linear maps; units: booleans; ranks: those of safety outside those of utility, and useful: as
    many of utility, the comparison; direction: unit vectors [L, O] by path, what the stream loses of the refusal
    direction (see `written_directions`).
    """

    weights: Mask
    units: Units
    ranks: Spans
    useful: Spans
    direction: Mapping[str, Float[Any, "L O"]]


def unit_weights(config: ModelConfig, units: Units) -> Mask:
    """The weights of linear maps that belong to `units` (see `unit_mask`)."""
    mask, maps = flatten(unit_mask(config, units)), linear_maps(config)
    return nest({path: where for path, where in mask.items() if path in maps})


def outside(safety: Bases, utility: Bases, counts: Mapping[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    """Orthonormal bases of (I - P_u) V_s of o and down: safety's first directions without utility's.

    counts: {path: (directions of safety, of utility)}. What lies inside utility's span leaves a zero column; float64
    [L, O, R]. Source: arXiv 2402.05162, section 2.3.
    """
    out = {}
    for path in PATHS:
        first = [
            np.asarray(flatten(each)[path].vectors[:, :, :count], np.float64)
            for each, count in zip((safety, utility), counts[path], strict=True)
        ]
        left = first[0] - np.einsum("lor,lpr,lps->los", first[1], first[1], first[0], optimize=True)
        columns, sizes, _ = np.linalg.svd(left, full_matrices=False)
        out[path] = np.where(sizes[:, None, :] > 1e-3, columns, 0)
    return out


def leading(bases: Bases, counts: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The first directions of o and down, {path: how many}; float64 [L, O, R]."""
    return {path: np.asarray(flatten(bases)[path].vectors[:, :, : counts[path]], np.float64) for path in PATHS}


@functools.partial(jax.jit, static_argnames="config")
def captured(config: ModelConfig, params: Params, mask: Mask, spans: Spans) -> Float[Array, " L"]:
    """Of what the weights of `mask` write to the stream, the share of energy inside `spans`; NaN for no weights."""
    weight, chosen = flatten(params), flatten(mask)
    inside = whole = jnp.zeros(config.layers)
    for path in PATHS:
        part = as_matrices(config, path, jnp.where(chosen[path], weight[path], 0).astype(jnp.float32))
        along = jnp.einsum("lio,lor->lir", part, spans[path], precision=jax.lax.Precision.HIGHEST)
        inside += jnp.sum(jnp.square(along), axis=(1, 2))
        whole += jnp.sum(jnp.square(part), axis=(1, 2))
    return inside / whole


def layer_jaccard(a: Mask, b: Mask) -> Float[np.ndarray, " L"]:
    """|A and B| / |A or B| of two masks over all maps of each layer; NaN where both are empty."""
    first, second = flatten(a), flatten(b)
    both = sum(by_layer(first[path] & second[path]) for path in first)
    either = sum(by_layer(first[path] | second[path]) for path in first)
    return np.where(either == 0, np.nan, both / np.maximum(either, 1))


def by_layer(mask: Any) -> Float[np.ndarray, " L"]:
    """How many weights of each layer are True, float64 (whose integers are exact up to 2^53)."""
    return np.asarray(jnp.sum(mask, range(1, mask.ndim), dtype=jnp.int32), np.float64)


def overlaps(
    config: ModelConfig, params: Params, parts: Parts, draws: int, seed: int, done: Progress = silent
) -> tuple[Overlap, ...]:
    """Every pair of parts with what random weights, units and directions of the same size come to.

    Random weights are as many of each matrix, random units as many heads and neurons of each layer; `done` is called
    after each of the 2 `draws`.
    """
    ranks = {path: jnp.asarray(span, jnp.float32) for path, span in parts.ranks.items()}
    lines = {path: jnp.asarray(r, jnp.float32)[..., None] for path, r in parts.direction.items()}

    def of_weights(mask: Mask) -> list[np.ndarray]:
        return [np.asarray(captured(config, params, mask, span), np.float64) for span in (ranks, lines)]

    def of_units(units: Units) -> list[np.ndarray]:
        mask = unit_weights(config, units)
        return [layer_jaccard(parts.weights, mask), *of_weights(_writers(mask))]

    weights = _writers(parts.weights)
    drawn = _drawn(lambda each: of_weights(random_like(config, weights, each)), draws, seed, done)
    shuffled = _drawn(lambda each: of_units(random_units(parts.units, each)), draws, seed, done)
    mine, units = of_weights(weights), of_units(parts.units)
    return (
        _overlap("weights", "units", JACCARD, units[0], shuffled[0]),
        _overlap("weights", "ranks", CAPTURED, mine[0], drawn[0]),
        _overlap("units", "ranks", CAPTURED, units[1], shuffled[1]),
        _overlap("weights", "direction", CAPTURED, mine[1], drawn[1]),
        _overlap("units", "direction", CAPTURED, units[2], shuffled[2]),
        *(
            along(f"{name} of {path.split('/')[-1]}", parts.direction[path], spans[path])
            for name, spans in (("ranks", parts.ranks), ("utility ranks", parts.useful))
            for path in PATHS
        ),
    )


def _writers(mask: Mask) -> Mask:
    return nest({path: flatten(mask)[path] for path in PATHS})


def _drawn(
    make: Callable[[int], list[np.ndarray]], draws: int, seed: int, done: Progress
) -> list[Float[np.ndarray, "S L"]]:
    """What each draw has of every pair, by pair."""
    found = []
    for each in range(draws):
        found.append(make(seed + each))
        done(1)
    return [np.stack(column) for column in zip(*found, strict=True)]


def along(name: str, direction: Float[Any, "L O"], span: Float[Any, "L O R"]) -> Overlap:
    """The energy of unit vectors inside a span of k directions, against uniformly random unit vectors.

    Theirs has the distribution Beta(k / 2, (O - k) / 2), whose mean is k / O.
    """
    r, V = np.asarray(direction, np.float64), np.asarray(span, np.float64)
    values = np.square(np.einsum("lo,lor->lr", r, V)).sum(-1)
    k = np.square(V).sum(1).round().sum(-1)
    halves = np.maximum(k, 1e-9) / 2, np.maximum(V.shape[1] - k, 1e-9) / 2
    low, high = (beta.ppf(q, *halves) for q in (0.025, 0.975))
    chance = _plain(k / V.shape[1])
    return Overlap(name, "direction", CAPTURED, _plain(values), chance, _plain(low), _plain(high), 0, exact=True)


def _overlap(
    first: str, second: str, measure: str, values: Float[np.ndarray, " L"], random: Float[np.ndarray, "S L"]
) -> Overlap:
    chance, low, high = (_plain(each) for each in (random.mean(0), random.min(0), random.max(0)))
    return Overlap(first, second, measure, _plain(values), chance, low, high, len(random))


def _plain(values: Float[np.ndarray, " L"]) -> ByLayer:
    return tuple(float(value) if np.isfinite(value) else None for value in values)


def located(config: ModelConfig, parts: Parts, layers: LayerRange) -> tuple[Inside, ...]:
    """How much of the weights and of the units' weights lies in `layers`; without a part that has none."""
    masks = {"weights": parts.weights, "units": unit_weights(config, parts.units)}
    counts = {name: np.sum([by_layer(each) for each in flatten(mask).values()], axis=0) for name, mask in masks.items()}
    return tuple(inside(name, each, layers) for name, each in counts.items() if each.any())


def inside(part: str, counts: Float[np.ndarray, " L"], layers: LayerRange) -> Inside:
    """The share of `counts` in `layers`, against all ranges of as many layers."""
    width = len(layers)
    shares = np.array([counts[k : k + width].sum() for k in range(len(counts) - width + 1)]) / counts.sum()
    share = shares[layers.first]
    return Inside(part, float(share), float(shares.mean()), float((shares >= share - 1e-12).mean()))
