"""What freezing is worth under fine-tuning attacks: defences, their controls, and numbers over seeds.

A defence keeps a region of the model as it was: weights that matter to safety and not to utility, directions of the
outputs that safety data uses most, or a range of layers. It freezes the region during training or winds it back
afterwards, as was published (Wei et al., arXiv 2402.05162, section 4.4). A control keeps as much, chosen at random.

L layers, O outputs of a linear map, R ranks
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import optax

from jaxsafe.evaluation.attack_settings import Setting, clustered_rate
from jaxsafe.kernels.freezing import freeze, outside, rewind
from jaxsafe.kernels.lora import LoRA, changed
from jaxsafe.kernels.lowrank import kept, random_bases
from jaxsafe.kernels.selection import sparsity
from jaxsafe.methods.brittleness import Material, Point, mask_of
from jaxsafe.methods.fine_tuning import FREE
from jaxsafe.methods.finetuning_attacks import Attack
from jaxsafe.methods.partial_tuning import layer_mask
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.transformer import Params
from jaxsafe.model.weights import flatten, nest

PARTS: Mapping[str, tuple[str, ...]] = {
    "nothing": (),
    "weights": ("q", "p"),
    "ranks": ("k",),
    "layers": ("first", "stop"),
}
"""Part of the model -> the numbers that say how much of it: top q of safety not in the top p of utility, k directions
out of the model's width, first <= layer < stop."""


@dataclasses.dataclass(frozen=True)
class Defence:
    """A region (`part` with its `values`) kept by freezing or, with `rewind`, by winding it back after training.

    `random` keeps as much at random. Raises ValueError for an unknown part, another count of numbers, and a random
    region of nothing.
    """

    part: str = "nothing"
    values: tuple[float, ...] = ()
    random: bool = False
    rewind: bool = False

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"part {self.part!r} of a model is not known; use one of {', '.join(PARTS)}")
        if len(self.values) != len(PARTS[self.part]):
            raise ValueError(f"a defence of {self.part} takes {PARTS[self.part]}; got {self.values}")
        if self.part == "nothing" and (self.random or self.rewind):
            raise ValueError("a defence of nothing is neither random nor a rewind")

    @property
    def name(self) -> str:
        """A name that tells it from every other defence."""
        if self.part == "nothing":
            return "none"
        words = ["rewind" if self.rewind else "freeze", *(["random"] if self.random else []), self.region]
        return " ".join(words)

    @property
    def region(self) -> str:
        """What it keeps, in words, as of its control."""
        numbers = (f"{k}={v:g}" for k, v in zip(PARTS[self.part], self.values, strict=True))
        return " ".join([self.part, *numbers])

    @property
    def original(self) -> "Defence":
        """What a control is the control of."""
        return dataclasses.replace(self, random=False)

    @property
    def needs_scores(self) -> bool:
        """Whether its region follows from scored data."""
        return self.part in ("weights", "ranks")


NONE = Defence()


def defences(regions: Mapping[str, Sequence[Any]], controls: bool, rewinds: bool) -> list[Defence]:
    """No defence; then every region of `regions` {part: its tuples of numbers} frozen and rewound, with controls."""
    out = [NONE]
    for part, grid in regions.items():
        for values in grid:
            numbers = tuple(values) if isinstance(values, tuple | list) else (values,)
            for rewinding in (False, True)[: 1 + rewinds]:
                for random in (False, True)[: 1 + controls]:
                    out.append(Defence(part, numbers, random, rewinding))
    return out


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How an attack trains: all weights, or adapters; `learning_rate` None leaves the attack's."""

    name: str
    lora: LoRA | None = None
    learning_rate: float | None = None


@dataclasses.dataclass(frozen=True)
class Cell:
    """One attacked model: an attack, how it trains, what defends, and the seed of examples, order and controls."""

    attack: Attack
    tuning: Tuning
    defence: Defence
    seed: int

    @property
    def name(self) -> str:
        """A name that tells it from every other cell of a grid."""
        return f"{self.attack.label}, {self.tuning.name}, {self.defence.name}, seed {self.seed}"


def runs(
    attacks: Sequence[Attack], tunings: Sequence[Tuning], guards: Sequence[Defence], seeds: Sequence[int]
) -> list[list[Cell]]:
    """The cells of the grid by training run: the first of a list is trained, the others are its rewinds."""
    out = []
    for attack in attacks:
        for tuning in tunings:
            for seed in seeds:
                free = [d for d in guards if d == NONE or d.rewind]
                alone = [[d] for d in guards if d != NONE and not d.rewind]
                out += [[Cell(attack, tuning, d, seed) for d in group] for group in [free, *alone]]
    return out


@dataclasses.dataclass(frozen=True)
class Region:
    """What a defence keeps: entries of weights (`mask`) or directions of outputs (`bases`), [L, O, R] by path."""

    mask: Mapping[str, Any] | None = None
    bases: Mapping[str, Any] | None = None

    @property
    def share(self) -> float:
        """Share of the entries of the linear maps, or of the dimensions of their outputs (the mean over maps)."""
        if self.mask is not None:
            return sparsity(self.mask)
        shares = [b.shape[-1] / b.shape[1] for b in flatten(self.bases or {}).values()]
        return float(np.mean(shares)) if shares else 0.0


def region(material: Material, defence: Defence, seed: int) -> Region:
    """What `defence` keeps; random choices follow from `seed`.

    A random mask holds as many weights of every matrix, random ranks are as many directions in the span of the
    outputs, a random range of layers is as long and begins elsewhere.
    """
    config = material.config
    match defence.part:
        case "weights":
            return Region(mask=mask_of(material, Point("set_difference", defence.values, _control(defence, seed))))
        case "ranks":
            bases, ranks = material.safety_bases(), int(defence.values[0])
            if defence.random:
                bases = random_bases(config, bases, seed, ranks)
            return Region(bases=leading(config, bases, ranks))
        case "layers":
            first, stop = (int(v) for v in defence.values)
            if defence.random:
                first, stop = _elsewhere(config, first, stop, seed)
            return Region(mask=layer_mask(config, first, stop))
    return Region()


def _control(defence: Defence, seed: int) -> int | None:
    return seed if defence.random else None


def _elsewhere(config: ModelConfig, first: int, stop: int, seed: int) -> tuple[int, int]:
    starts = [i for i in range(config.layers - (stop - first) + 1) if i != first]
    if not starts:
        raise ValueError(f"layers {first} to {stop} are the whole model; there is no other range of this length")
    start = int(np.random.default_rng(seed).choice(starts))
    return start, start + stop - first


def leading(config: ModelConfig, bases: Mapping[str, Any], k: int) -> dict[str, Any]:
    """The `k` first directions of each map's basis, [L, O, k]; a map of fewer ranks gives the same share of its own.

    Raises ValueError for a k outside 1 to the model's width.
    """
    if not 1 <= k <= config.embed:
        raise ValueError(f"{k} ranks are not between 1 and the model's width, {config.embed}")
    counts = {path: kept(config, b.vectors.shape[-1], config.embed - k) for path, b in flatten(bases).items()}
    return nest({path: b.vectors[:, :, : counts[path]] for path, b in flatten(bases).items()})


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
    before, after = flatten(original), flatten(tuned)
    keep = outside(region.bases)
    moved = {path: after[path].astype("float32") - before[path].astype("float32") for path in flatten(region.bases)}
    change, _ = keep.update(nest(moved), keep.init(original))
    return nest(after | flatten(changed(nest({path: before[path] for path in moved}), change)))


def complied(samples: Sequence[Mapping[str, Any]], setting: Setting) -> list[bool | None]:
    """Whether each harmful prompt was complied with under `setting`: each of its answers, in order."""
    told = [s["refused"] for s in samples if s["setting"] == setting.name and s["harmful"] is not False]
    return [None if refused is None else not refused for refused in told]


def summary(
    attack: Attack,
    tunings: Sequence[Tuning],
    guards: Sequence[Defence],
    seeds: Sequence[int],
    lines: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """A row for each way of training and each defence: what the end of training found, over seeds.

    `lines` {name of a cell, or label of an attack for the model before it: {"cell", "samples"}}. asr, refusal: rates
    on harmful and on harmless prompts; curve: asr by step; against_none, against_control: how much lower asr is than
    without a defence, and than with the random region of the same size.
    """
    start = [lines[attack.label]["cell"]["curve"][0]["complied"]]
    out = []
    for tuning in tunings:
        found = {guard: [lines[Cell(attack, tuning, guard, seed).name] for seed in seeds] for guard in guards}
        curves = {guard: [line["cell"]["curve"] for line in each] for guard, each in found.items()}
        told = {guard: [curve[-1]["complied"] for curve in each] for guard, each in curves.items()}
        for guard, each in found.items():
            ends = [curve[-1] for curve in curves[guard]]
            row: dict[str, Any] = {
                "attack": attack.label,
                "tuning": tuning.name,
                "defence": guard.name,
                "region": guard.region,
                "control": guard.random,
                "rewind": guard.rewind,
                "share": float(np.mean([line["cell"]["share"] for line in each])),
                "asr": pooled(told[guard]),
                "refusal": pooled([_refused(line["samples"]) for line in each]),
                "perplexity": _mean(end["perplexity"] for end in ends),
                "answer_perplexity": _mean(end["fluency"]["answer_perplexity"] for end in ends),
                "repetition": _mean(end["fluency"]["repetition"] for end in ends),
                "curve": [{"step": 0, **pooled(start)}, *_pooled_curve(curves[guard])],
            }
            control = dataclasses.replace(guard, random=True) if guard != NONE and not guard.random else guard
            if guard != NONE:
                row["against_none"] = difference(told[NONE], told[guard])
            if control != guard and control in told:
                row["against_control"] = difference(told[control], told[guard]) | {"control": control.name}
            out.append(row)
    return out


def _pooled_curve(curves: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    return [
        {"step": points[0]["step"], **pooled([point["complied"] for point in points])}
        for points in zip(*curves, strict=True)
    ]


def _refused(samples: Sequence[Mapping[str, Any]]) -> list[bool | None]:
    """Whether each harmless prompt was refused."""
    return [s["refused"] for s in samples if s["harmful"] is False]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


# Numbers over seeds. A flag is whether a prompt was complied with, None where the judge could not tell.

Flags = Sequence[Sequence[bool | None]]
"""[seed][prompt]"""


def pooled(flags: Flags) -> dict[str, Any]:
    """The mean rate over seeds, its 95% interval with prompts as clusters, and the rate of every seed."""
    by_seed = [[bool(f) for f in row if f is not None] for row in flags]
    rates = [float(np.mean(row)) if row else None for row in by_seed]
    return clustered_rate(list(zip(*flags, strict=True))).as_dict() | {"seeds": rates}


def difference(first: Flags, second: Flags) -> dict[str, Any]:
    """How much lower the rate of `second` is than that of `first`, on the same prompts, with a 95% interval.

    Square-and-add of both Wilson intervals with the correlation of the prompts' means (Newcombe 1998, method 10,
    here with intervals that allow for clusters). None where one of both has no scored flag.
    """
    a, b = pooled(first), pooled(second)
    if a["value"] is None or b["value"] is None:
        return {"value": None, "ci_low": None, "ci_high": None}
    r = max(0.0, _correlation(_means(first), _means(second)))
    d = a["value"] - b["value"]
    low = _span(a["value"] - a["ci_low"], b["ci_high"] - b["value"], r)
    high = _span(a["ci_high"] - a["value"], b["value"] - b["ci_low"], r)
    return {"value": d, "ci_low": d - low, "ci_high": d + high}


def _span(x: float, y: float, r: float) -> float:
    return math.sqrt(max(0.0, x**2 + y**2 - 2 * r * x * y))


def _means(flags: Flags) -> np.ndarray:
    columns = [[f for f in column if f is not None] for column in zip(*flags, strict=True)]
    return np.array([np.mean(column) if column else math.nan for column in columns])


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    known = np.isfinite(x) & np.isfinite(y)
    if known.sum() < 2 or np.ptp(x[known]) == 0 or np.ptp(y[known]) == 0:
        return 0.0
    return float(np.corrcoef(x[known], y[known])[0, 1])
