"""What keeps a model safe under fine-tuning attacks: defences, their random controls, and the grid of attacked models.

The first defence keeps a region of the model as it was: weights that matter to safety and not to utility, directions
of the outputs that safety data uses most, a range of layers, or heads and neurons. It freezes the region in training or
winds it back afterwards, as was published (Wei et al., arXiv 2402.05162, section 4.4); units are frozen after SSAH
(arXiv 2410.10862): those of safety, and the complex ones of most importance to safety. What the latter are ranked by,
and which weights of a unit are frozen, is ours. A control keeps as much, chosen at random.

L layers, O outputs of a linear map, R ranks
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import optax

from jaxsafe.io.store import Json
from jaxsafe.kernels.freezing import freeze, outside, rewind
from jaxsafe.kernels.lora import changed
from jaxsafe.kernels.lowrank import Bases, kept, random_bases
from jaxsafe.kernels.selection import Mask, sparsity
from jaxsafe.kernels.units import Units, layer_mask, unit_mask
from jaxsafe.methods.anatomy import UnitSettings, unit_roles_once
from jaxsafe.methods.brittleness import SIDES, Material, Point, mask_of
from jaxsafe.methods.ssah import kept_units, random_units
from jaxsafe.methods.trainer import FREE
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.layers import LayerRange
from jaxsafe.model.transformer import Params
from jaxsafe.model.weights import flatten, linear_maps, nest, sizes
from jaxsafe.rows import Row, data_sha256


class Defence(Protocol):
    """What keeps a model safe in a training run. A defence overrides what it does; by default it does nothing.

    `material` is what it may be made from, and `seed` that of the run: random choices follow from it.
    """

    @property
    def name(self) -> str:
        """A name that tells it from every other defence."""

    @property
    def about(self) -> dict[str, Json]:
        """Its columns in the table: region, control and rewind (booleans)."""
        return {"region": "nothing", "control": False, "rewind": False}

    @property
    def control(self) -> "Defence | None":
        """The random defence of the same size that it is held against, None where there is none."""
        return None

    @property
    def trained_as(self) -> "Defence":
        """The defence whose training run it takes: its own, or that of another where it acts only afterwards."""
        return self

    def follows(self, material: Material) -> Json:
        """What it follows from besides the run and its seed, in values of JSON."""
        return self.name

    def share(self, material: Material) -> float:
        """The share of the weights, or of the directions of outputs, that it keeps."""
        return 0.0

    def rows(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows that are trained on, of those that the attack brings."""
        return rows

    def frozen(self, material: Material, seed: int) -> optax.GradientTransformation:
        """What may not move in training."""
        return FREE

    def after(self, tuned: Params, material: Material, seed: int) -> Params:
        """The weights that are left of `tuned` ones; `material.params` are those before the attack."""
        return tuned


@dataclasses.dataclass(frozen=True)
class Undefended(Defence):
    """No defence."""

    @property
    def name(self) -> str:
        """Its name."""
        return "none"


NONE = Undefended()

PARTS: Mapping[str, tuple[str, ...]] = {
    "weights": ("q", "p"),
    "ranks": ("k",),
    "layers": ("first", "stop"),
    "units": ("c",),
}
"""Part of the model -> the numbers that say how much of it: top q of safety not in the top p of utility, k directions
out of the model's width, first <= layer < stop, units of safety and up to a share c of all units that are complex."""


@dataclasses.dataclass(frozen=True)
class Keep(Defence):
    """A region (`part` with its `values`) kept by freezing or, with `wound_back`, by winding it back after training.

    `random` keeps as much at random. Raises ValueError for an unknown part and another count of numbers.
    """

    part: str
    values: tuple[float, ...]
    random: bool = False
    wound_back: bool = False

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"part {self.part!r} of a model is not known; use one of {', '.join(PARTS)}")
        if len(self.values) != len(PARTS[self.part]):
            raise ValueError(f"a defence of {self.part} takes {PARTS[self.part]}; got {self.values}")

    @property
    def name(self) -> str:
        """A name that tells it from every other defence."""
        return " ".join(["rewind" if self.wound_back else "freeze", *(["random"] if self.random else []), self.what])

    @property
    def what(self) -> str:
        """What it keeps, in words, as of its control."""
        numbers = (f"{k}={v:g}" for k, v in zip(PARTS[self.part], self.values, strict=True))
        return " ".join([self.part, *numbers])

    @property
    def about(self) -> dict[str, Json]:
        """Its columns in the table."""
        return {"region": self.what, "control": self.random, "rewind": self.wound_back}

    @property
    def control(self) -> "Keep | None":
        """The same of a random region."""
        return None if self.random else dataclasses.replace(self, random=True)

    @property
    def trained_as(self) -> Defence:
        """A rewind takes the run that nothing defends."""
        return NONE if self.wound_back else self

    @property
    def scored(self) -> bool:
        """Whether scored data decide the region."""
        return self.part != "layers"

    @property
    def point(self) -> Point | None:
        """The edit whose material decides the region, None for layers and units."""
        method = {"weights": "set_difference", "ranks": "top_ranks"}.get(self.part)
        return None if method is None else Point(method, self.values)

    def follows(self, material: Material) -> Json:
        """Its fields, and the scored data where they decide the region."""
        if self.part == "units":
            return [dataclasses.asdict(self), {side: data_sha256(material.rows(side)) for side in SIDES}]
        return [dataclasses.asdict(self), None if self.point is None else material.follows(self.point)]

    def share(self, material: Material) -> float:
        """Share of the entries of the linear maps, or of the dimensions of their outputs (the mean over maps).

        That of weights is kept in the material's store.
        """
        if self.part == "ranks":
            return _leading_share(material.config, int(self.values[0]))
        if self.part == "layers":
            return len(self.layers) / material.config.layers
        whole = dataclasses.replace(self, random=False, wound_back=False)
        follows = [material.model.fingerprint(), whole.follows(material)]
        return material.store.once("share", follows, lambda: region(material, whole, 0).share)

    @property
    def layers(self) -> LayerRange:
        """The range of layers of a defence that keeps layers."""
        return LayerRange(*map(int, self.values))

    def frozen(self, material: Material, seed: int) -> optax.GradientTransformation:
        """What keeps the region as it is during training; nothing for a rewind."""
        return FREE if self.wound_back else frozen(region(material, self, seed))

    def after(self, tuned: Params, material: Material, seed: int) -> Params:
        """The weights with the region wound back, where that is asked."""
        return rewound(region(material, self, seed), tuned, material.params) if self.wound_back else tuned


def defences(regions: Mapping[str, Sequence[Any]], controls: bool, rewinds: bool) -> list[Defence]:
    """No defence; then every region of `regions` {part: its tuples of numbers} frozen and rewound, with controls."""
    grid: list[Defence] = [NONE]
    for part, values in regions.items():
        for each in values:
            numbers = tuple(each) if isinstance(each, tuple | list) else (each,)
            for wound_back in (False, True)[: 1 + rewinds]:
                for random in (False, True)[: 1 + controls]:
                    grid.append(Keep(part, numbers, random, wound_back))
    return grid


@dataclasses.dataclass(frozen=True)
class Region:
    """What a defence keeps: entries of weights (`mask`) or directions of outputs (`bases`), [L, O, R] by path."""

    mask: Mask | None = None
    bases: Mapping[str, Any] | None = None

    @property
    def share(self) -> float:
        """Share of the entries of the linear maps, or of the dimensions of their outputs (the mean over maps)."""
        if self.mask is not None:
            return sparsity(self.mask)
        shares = [b.shape[-1] / b.shape[1] for b in flatten(self.bases or {}).values()]
        return float(np.mean(shares)) if shares else 0.0


@functools.lru_cache(maxsize=1)
def region(material: Material, defence: Keep, seed: int) -> Region:
    """What `defence` keeps; random choices follow from `seed`.

    A random mask holds as many weights of every matrix, random ranks are as many directions in the span of the
    outputs, a random range of layers is as long and begins elsewhere, random units are as many heads and neurons of
    each layer.
    """
    config = material.config
    match defence.part:
        case "weights":
            control = seed if defence.random else None
            return Region(mask=mask_of(material, Point("set_difference", defence.values, control)))
        case "ranks":
            bases, ranks = material.bases("safety"), int(defence.values[0])
            if defence.random:
                bases = random_bases(config, bases, seed, ranks)
            return Region(bases=leading(config, bases, ranks))
        case "units":
            units = safety_units(material, float(defence.values[0]))
            return Region(mask=unit_mask(config, random_units(units, seed) if defence.random else units))
    layers = _elsewhere(config, defence.layers, seed) if defence.random else defence.layers
    return Region(mask=layer_mask(config, layers))


def safety_units(material: Material, complex_share: float) -> Units:
    """The units of safety by the material's data, and the complex ones that matter most to it; see `kept_units`."""
    found = unit_roles_once(
        material.store,
        material.model,
        {side: material.rows(side) for side in SIDES},
        UnitSettings(batch_size=material.settings.batch_size),
    )
    return kept_units(found.roles, found.scores, complex_share)


def _elsewhere(config: ModelConfig, layers: LayerRange, seed: int) -> LayerRange:
    starts = [i for i in range(config.layers - len(layers) + 1) if i != layers.first]
    if not starts:
        raise ValueError(f"layers {layers} are the whole model; there is no other range of this length")
    start = int(np.random.default_rng(seed).choice(starts))
    return LayerRange(start, start + len(layers))


def leading(config: ModelConfig, bases: Bases, k: int) -> dict[str, Any]:
    """The `k` first directions of each map's basis, [L, O, k]; a map of fewer ranks gives the same share of its own.

    Raises ValueError for a k outside 1 to the model's width.
    """
    _check_ranks(config, k)
    counts = {path: kept(config, b.vectors.shape[-1], config.embed - k) for path, b in flatten(bases).items()}
    return nest({path: b.vectors[:, :, : counts[path]] for path, b in flatten(bases).items()})


def _leading_share(config: ModelConfig, k: int) -> float:
    """The share of the dimensions of a map's outputs that `leading` gives, the mean over maps."""
    _check_ranks(config, k)
    edges = [[math.prod(sizes(config, axes)) for axes in (w.inputs, w.outputs)] for w in linear_maps(config).values()]
    return float(np.mean([kept(config, min(I, O), config.embed - k) / O for I, O in edges]))


def _check_ranks(config: ModelConfig, k: int) -> None:
    if not 1 <= k <= config.embed:
        raise ValueError(f"{k} ranks are not between 1 and the model's width, {config.embed}")


def frozen(region: Region) -> optax.GradientTransformation:
    """What keeps a region as it is during training."""
    if region.mask is not None:
        return freeze(region.mask)
    return FREE if region.bases is None else outside(region.bases)


def rewound(region: Region, tuned: Params, original: Params) -> dict[str, Any]:
    """The `tuned` weights with the region as in `original`: entries copied back, or the change projected out."""
    if region.mask is not None:
        return rewind(tuned, original, region.mask)
    if region.bases is None:
        return dict(tuned)
    old, new = flatten(original), flatten(tuned)
    keep = outside(region.bases)
    moved = {path: new[path].astype("float32") - old[path].astype("float32") for path in flatten(region.bases)}
    change, _ = keep.update(nest(moved), keep.init(original))
    return nest(new | flatten(changed(nest({path: old[path] for path in moved}), change)))
