"""Brittleness of safety alignment (Wei et al., ICML 2024, arXiv 2402.05162): what to remove, and from what.

A point is one edit of the model: weights that matter to safety and not to utility, ranks that do, or a random choice
of the same size, its control. Material is what points are made from.
"""

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsafe.chat.model import ChatModel
from jaxsafe.io.bases import bases_once
from jaxsafe.io.store import JSON, Json, Store
from jaxsafe.io.sums import sums_once
from jaxsafe.kernels.blocks import range_of, with_ranges
from jaxsafe.kernels.lowrank import (
    Bases,
    act_svd,
    change_norms,
    cut_in_noise,
    random_bases,
    remove_norm,
    remove_orthogonal,
    remove_ranks,
    removed_ranks,
)
from jaxsafe.kernels.selection import (
    PER,
    Mask,
    Scores,
    apply_mask,
    bottom,
    layer_shares,
    magnitude,
    n_of_m,
    random_like,
    random_of_norm,
    random_scores,
    set_difference,
    sparsity,
    top,
    weight_difference,
)
from jaxsafe.kernels.sums import Scoring, Statistics
from jaxsafe.kernels.units import Head, head_mask
from jaxsafe.methods.heads import head_accuracies, ranking
from jaxsafe.methods.sequential import Change, change_blocks
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.layers import LayerRange
from jaxsafe.model.transformer import Params
from jaxsafe.model.weights import flatten, linear_maps, nest
from jaxsafe.progress import Watch, unwatched
from jaxsafe.records.brittleness import About
from jaxsafe.records.run import Variant, plain
from jaxsafe.rows import Row, data_sha256

METHODS: Mapping[str, tuple[str, ...]] = {
    "set_difference": ("q", "p"),
    "top": ("fraction",),
    "bottom": ("fraction",),
    "n_of_m": ("n", "m"),
    "heads": ("k",),
    "orthogonal": ("r_s", "r_u"),
    "top_ranks": ("rank",),
    "bottom_ranks": ("rank",),
}
"""Method -> the numbers that it takes. Fractions are shares, ranks are counted out of the model's width."""
RANKS = ("orthogonal", "top_ranks", "bottom_ranks")
TWO_SIDED = ("set_difference", "orthogonal")
"""Methods that both sides' data decide."""
GROUPED = ("set_difference", "top", "bottom")
"""Methods that compare weights by group."""
IN_BLOCKS = ("top", "bottom", "n_of_m", *RANKS)
"""Methods that can go block by block; a set difference is published of the scores of the dense model alone."""
SIDES = ("safety", "utility")
SUMMED = ("snip", "wanda")
CONTROLS = ("number", "norm")
"""What a random control has in common with its point, in each matrix: the number of weights or ranks that are removed,
or the norm of the change of the weights."""
SCORES = (*SUMMED, "magnitude", "weight_difference", "random")


@dataclasses.dataclass(frozen=True)
class Point:
    """One edit: a `method` with its numbers; `control` is the seed of its random counterpart, None for itself.

    by: what the counterpart has in common with it, one of `CONTROLS`; per: the group in which weights are compared, one
    of `PER`, None for that of the settings; sequential: whether it goes block by block, each block scored on the model
    as changed below it. Raises ValueError for an unknown method, group or control, for another count of numbers, and
    for a method that knows no such group or order.
    """

    method: str
    values: tuple[float, ...] = ()
    control: int | None = None
    per: str | None = None
    sequential: bool = False
    by: str = "number"

    def __post_init__(self) -> None:
        if self.by not in CONTROLS:
            raise ValueError(f"a control by {self.by!r} is not known; use one of {', '.join(CONTROLS)}")
        if self.method == "dense":
            return
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} is not known; use one of {', '.join(METHODS)}")
        if len(self.values) != len(METHODS[self.method]):
            raise ValueError(f"{self.method} takes {METHODS[self.method]}; got {self.values}")
        if self.per is not None and self.per not in PER:
            raise ValueError(f"per {self.per!r} is not known; use one of {', '.join(PER)}")
        if self.per is not None and self.method not in GROUPED:
            raise ValueError(f"{self.method} compares no weights per {self.per}; use it with {', '.join(GROUPED)}")
        if self.sequential and self.method not in IN_BLOCKS:
            raise ValueError(f"{self.method} does not go block by block; use one of {', '.join(IN_BLOCKS)}")

    @property
    def parameters(self) -> dict[str, float]:
        """The numbers by name."""
        return dict(zip(METHODS.get(self.method, ()), self.values, strict=True))

    @property
    def of_ranks(self) -> bool:
        """Whether it removes ranks rather than weights."""
        return self.method in RANKS

    @property
    def of_scores(self) -> bool:
        """Whether it removes weights by their scores."""
        return self.method in METHODS and not self.of_ranks and self.method != "heads"

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides whose data decide what it removes."""
        return () if self.method == "dense" else SIDES if self.method in (*TWO_SIDED, "heads") else SIDES[:1]

    @property
    def name(self) -> str:
        """A name that tells it from every other point."""
        return self.group if self.control is None else f"{self.group} seed {self.control}"

    @property
    def group(self) -> str:
        """The name of what points that differ by seed alone share."""
        words = [self.method.replace("_", " "), *(f"{k}={v:g}" for k, v in self.parameters.items())]
        words += [f"per {self.per}"] if self.per is not None else []
        words += ["block by block"] if self.sequential else []
        name = " ".join(words if self.control is None else ["random for", *words])
        return f"{name}, equal norm" if self.of_norm else name

    @property
    def of_norm(self) -> bool:
        """Whether it is a control of equal norm."""
        return self.control is not None and self.by == "norm"

    @property
    def original(self) -> "Point":
        """What a control is the control of."""
        return dataclasses.replace(self, control=None, by="number")

    def variant(self, material: "Material", controls: int, by: str = "number") -> Variant:
        """The point as a variant of `material`'s model, held against the dense model and its `controls` random ones.

        Its columns are those of `records.brittleness.About`. Scores are made for the sparsity where the material's
        store does not hold it.
        """
        controlled = controls > 0 and self.control is None and self != DENSE
        found = removed(material, self)
        return Variant(
            self.name,
            material.follows(self),
            baseline=None if self == DENSE else DENSE.name,
            control=dataclasses.replace(self, control=0, by=by).name if controlled else None,
            group=self.group,
            about=plain(
                About(
                    family(self, material.settings.score),
                    self.control is not None,
                    self.parameters,
                    None if found is None else found["sparsity"],
                    mean_ranks(material.config, self),
                )
            ),
        )


DENSE = Point("dense")


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How the points of a sweep are made: `by_row`, the methods that compare weights by row, whatever the group of the
    others is, `sequential`, the methods that go block by block, and `controls_by`, what random ones have in common.

    Published (arXiv 2402.05162): the set difference per matrix; top and bottom by row; these, and all ranks, block by
    block.
    """

    by_row: tuple[str, ...] = ()
    sequential: tuple[str, ...] = ()
    controls_by: tuple[str, ...] = CONTROLS[:1]

    def point(self, method: str, values: tuple[float, ...]) -> Point:
        """The point of `method`. Raises ValueError as `Point` does."""
        return Point(method, values, None, "row" if method in self.by_row else None, method in self.sequential)


def points(methods: Mapping[str, Any], controls: int, how: Protocol = Protocol()) -> list[Point]:
    """The dense model, then every point of `methods` {method: its tuples of numbers}, each with its controls."""
    grid = [DENSE]
    for method, values in methods.items():
        for each in values:
            point = how.point(method, tuple(each) if isinstance(each, tuple | list) else (each,))
            drawn = itertools.product(how.controls_by, range(controls))
            grid += [point, *(dataclasses.replace(point, control=seed, by=by) for by, seed in drawn)]
    return grid


@dataclasses.dataclass(frozen=True)
class ScoreSettings:
    """How weights are scored and compared.

    score: one of `SCORES`; positions, loss, batch_size: of the sums behind scores and bases (see `Scoring`); per: the
    group in which weights are compared where a point names none; change:
    the activation or gradient of snip and wanda counts with |W - W_base| in place of |W|; seed: of random scores and
    of the probes of heads; probe_batch_size: prompts that heads are read from at a time; layers_at_a_time: how many
    layers have sums, scores and bases at once, None for all. Raises ValueError for an unknown name, for a change by a
    score that has no data, and for weights that are compared across layers which are not scored at once.
    """

    score: str = "snip"
    positions: str = "response"
    loss: str = "mean"
    per: str = "matrix"
    batch_size: int = 8
    change: bool = False
    seed: int = 0
    probe_batch_size: int = 32
    layers_at_a_time: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("score", SCORES), ("per", PER)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is not known; use one of {', '.join(known)}")
        if self.change and self.score not in SUMMED:
            raise ValueError(f"change goes with score {' or '.join(map(repr, SUMMED))}, not with {self.score!r}")
        check_turns(self, self.per)
        self.scoring("gram")

    def scoring(self, kind: str, layers: LayerRange | None = None) -> Scoring:
        """How sums of `kind` are made, of some `layers` or of all."""
        return Scoring(kind, self.positions, self.loss, self.batch_size, layers)


def check_turns(settings: ScoreSettings, per: str) -> None:
    """Raises ValueError where weights are compared `per` model and layers are not scored at once."""
    if per == "model" and settings.layers_at_a_time is not None:
        raise ValueError("per 'model' compares the weights of all layers; give no layers_at_a_time with it")


class Material:
    """What points are made from: scores, bases and a ranking of heads, made when they are needed, and once.

    model: the model that is edited; rows: gives the scored rows of a side, "safety" or "utility"; prompts: of each
    side, for the probes of heads; base: the model whose weights take the place of removed ones and are differed from,
    None for zero; watch: shows how far a stage is. Sums and rankings are kept in `store`. Raises ValueError for a
    base of another architecture, and for none where the score needs it.

    `parts` are the material of some layers each. To scores, selection and bases these layers are a whole model.
    """

    def __init__(
        self,
        model: ChatModel,
        rows: Callable[[str], Sequence[Row]],
        store: Store,
        settings: ScoreSettings = ScoreSettings(),
        prompts: Mapping[str, Sequence[str]] | None = None,
        base: ChatModel | None = None,
        watch: Watch = unwatched,
    ) -> None:
        if base is not None and base.config_sha256() != model.config_sha256():
            raise ValueError(f"the base model {base.name!r} has another architecture than {model.name}")
        if base is None and (settings.change or settings.score == "weight_difference"):
            raise ValueError(f"score {settings.score!r}{' of changes' * settings.change} needs a base model")
        self.model, self.store, self.settings, self.base = model, store, settings, base
        self.layers: LayerRange | None = None  # those of a part
        self._prompts, self._watch = prompts or {}, watch
        self._made: dict[tuple[str, str], Any] = {}
        self._rows = rows
        self.held: dict[Point, Params] = {}  # the last edit that went block by block, until it is asked for

    def parts(self) -> Iterator["Material"]:
        """The material of as many layers at a time as the settings say, one range after the other; else itself."""
        count, layers = self.settings.layers_at_a_time, self.model.config.layers
        if count is None or self.layers is not None:
            yield self
            return
        for first in range(0, layers, count):
            part = copy.copy(self)
            part.layers, part._rows, part._made = LayerRange(first, min(first + count, layers)), self.rows, {}
            yield part

    def own(self, stacks: Mapping[str, Any]) -> dict[str, Any]:
        """Of a tree of stacks of all layers those of this part."""
        layers = self.layers
        return dict(stacks) if layers is None else jax.tree.map(lambda a: a[layers.slice], dict(stacks))

    @property
    def config(self) -> ModelConfig:
        """The configuration of the model, of a part with its number of layers."""
        config = self.model.config
        return config if self.layers is None else dataclasses.replace(config, layers=len(self.layers))

    @property
    def params(self) -> Params:
        """The weights of the model, of a part those of its layers, taken out when they are asked for."""
        return self._params(self.model)

    @property
    def base_params(self) -> Params | None:
        """The weights of the base model in the same way."""
        return None if self.base is None else self._params(self.base)

    def _params(self, model: ChatModel) -> Params:
        return model.params if self.layers is None else range_of(model.config, model.params, self.layers)[1]

    def _stage(self, what: str, side: str) -> str:
        return f"{what}, {side}" + ("" if self.layers is None else f", layers {self.layers}")

    def _once(self, what: str, side: str, make: Callable[[str], Any]) -> Any:
        if (what, side) not in self._made:
            self._made[what, side] = make(side)
        return self._made[what, side]

    def rows(self, side: str) -> list[Row]:
        """The rows of a side."""
        return self._once("rows", side, lambda side: list(self._rows(side)))

    def statistics(self, kind: str, side: str) -> Statistics:
        """The sums of `kind` over the rows of a side, kept in the store."""
        rows = self.rows(side)
        with self._watch(self._stage(kind, side), len(rows)) as done:
            return sums_once(self.store, self.settings.scoring(kind, self.layers), self.model, rows, done)

    def scores(self, side: str) -> Scores:
        """The score of every weight by the data of a side; higher: matters more."""
        return self._once("scores", side, self._scores)

    def _scores(self, side: str) -> Scores:
        match self.settings.score:
            case "magnitude":
                return magnitude(self.params)
            case "weight_difference":
                assert self.base_params is not None
                return weight_difference(self.params, self.base_params)
            case "random":
                seed = self.settings.seed + SIDES.index(side)
                return self.own(random_scores(self.model.config, seed, self.model.mesh))
        weights: Params = self.params
        if self.settings.change:
            assert self.base_params is not None
            weights = weight_difference(weights, self.base_params)
        return self.statistics(self.settings.score, side).scores(self.config, weights)

    def about_scores(self, side: str) -> dict[str, Json]:
        """What `save_scores` says of the scores of a side."""
        how, rows = self.settings, self.rows(side) if self.settings.score in SUMMED else []
        return {
            "kind": how.score,
            "change_from": self.base.fingerprint() if how.change and self.base is not None else None,
            "model": self.model.fingerprint(),
            "data": data_sha256(rows),
            "n": len(rows),
            "loss": how.loss if how.score == "snip" else None,
            "positions": how.positions,
        }

    def bases(self, side: str) -> Bases:
        """The directions of every map's outputs by the energy that the data of a side put there."""
        return self._once("bases", side, self._bases)

    def _bases(self, side: str) -> Bases:
        if self.layers is None:
            return self._act_svd(side)
        made = self.settings.scoring("gram", self.layers).follows
        follows = {"model": self.model.fingerprint(), "data": data_sha256(self.rows(side)), **made}
        return bases_once(self.store, follows, lambda: self._act_svd(side), self.model.mesh)

    def _act_svd(self, side: str) -> Bases:
        sums = self.statistics("gram", side).sums
        with self._watch(self._stage("ActSVD", side), len(linear_maps(self.config))) as done:
            return act_svd(self.config, self.params, sums, done)

    def heads(self) -> list[Head]:
        """The heads that tell harmful prompts (of "safety") from benign ones (of "utility"), most accurate first.

        Raises ValueError where a side has no prompts.
        """
        return self._once("heads", "", lambda _: self._heads())

    def _heads(self) -> list[Head]:
        harmful, benign = (list(self._prompts.get(side, ())) for side in SIDES)
        if not harmful or not benign:
            raise ValueError("a ranking of heads needs prompts for safety and for utility, not files of pairs")

        def make() -> Json:
            seed, size = self.settings.seed, self.settings.probe_batch_size
            with self._watch("probes of heads", len(harmful) + len(benign)) as done:
                found = ranking(head_accuracies(self.model, harmful, benign, size, seed=seed, done=done))
            return [list(head) for head in found]

        follows = [self.model.fingerprint(), harmful, benign, self.settings.seed]
        return [(layer, head) for layer, head in self.store.once("heads", follows, make)]

    def sequential(self, kind: str, change: Change, sides: Sequence[str]) -> Params:
        """The parameters with `change` applied block by block, each block scored by `kind` as changed below it.

        `change` gets the statistics of each of the `sides`.
        """
        with self._watch(f"{kind}, block by block", self.config.layers) as done:
            rows, *beside = (self.rows(side) for side in sides)
            scoring = self.settings.scoring(kind)
            return change_blocks(scoring, self.config, self.params, rows, change, done, beside)

    def follows(self, point: Point) -> Json:
        """What the edit of `point` follows from besides the model, in values of JSON; None for the dense model."""
        if point == DENSE:
            return None
        how = self.settings
        made: dict[str, Json] = {"method": point.method, "values": list(point.values), "control": point.control}
        if point.method == "heads":
            made |= {"by": point.by} if point.of_norm else {}
            return made | {"prompts": [list(self._prompts.get(side, ())) for side in SIDES], "seed": how.seed}
        kind = "gram" if point.of_ranks else how.score
        if point.of_scores:
            base = None if self.base is None else self.base.fingerprint()
            made |= {"score": how.score, "change": how.change, "per": point.per or how.per, "base": base}
            made |= {"seed": how.seed} if how.score == "random" else {}
        if kind in ("gram", *SUMMED):
            made |= how.scoring(kind).follows
            made |= {"data": {side: data_sha256(self.rows(side)) for side in point.sides}}
        if point.of_norm:
            return made | {"by": point.by, "sequential": point.sequential}
        return made | {"sequential": in_turn(point)}


def check_blocks(settings: ScoreSettings, point: Point, base: bool) -> None:
    """Raises ValueError where `point` goes block by block and its score or a base model does not."""
    if not point.sequential or not point.of_scores:
        return
    if settings.score not in SUMMED:
        raise ValueError(f"{point.name} goes with score {' or '.join(SUMMED)}, not with {settings.score!r}")
    if base or settings.change:
        raise ValueError(f"{point.name} puts zeros in the place of weights, scored by |W|; give no base model")


def in_turn(point: Point) -> bool:
    """Whether a point goes block by block; a control is drawn at once."""
    return point.sequential and point.control is None


def mask_of(material: Material, point: Point) -> Mask:
    """The weights that a point removes: a boolean tree of the linear maps.

    A control removes as many weights of each matrix as its original, or weights of the same norm, at random. Raises
    ValueError for weights that are compared across layers which are not scored at once.
    """
    config, seed = material.config, point.control or 0
    if point.of_norm:
        original = original_mask(material, point.original)
        return by_map(material, original, lambda mask: random_of_norm(config, mask, changes_of(material, mask), seed))
    if point.control is not None:
        mask = mask_of(material, dataclasses.replace(point, control=None))
        return by_map(material, mask, lambda mask: random_like(config, mask, seed))
    if point.method == "heads":
        return head_mask(config, material.heads()[: int(point.values[0])])
    return joined(scored_mask(part, point) for part in material.parts())


def scored_mask(material: Material, point: Point) -> Mask:
    """The weights that a point removes by their scores, of all layers or of those of a part."""
    per = point.per or material.settings.per
    check_turns(material.settings, per)
    if point.method != "set_difference":
        return one_sided(material.config, material.scores("safety"), point, per)
    safety, utility = (material.scores(side) for side in SIDES)
    return set_difference(material.config, safety, utility, point.values[0], point.values[1], per)


def changes_of(material: Material, mask: Mask) -> Scores:
    """By how much each weight of the maps of `mask` changes where it is removed, float32."""

    def these(params: Params) -> Params:
        return nest({path: flatten(params)[path] for path in flatten(mask)})

    few, base = these(material.params), material.base_params
    return magnitude(few) if base is None else weight_difference(few, these(base))


def by_map(material: Material, mask: Mask, make: Callable[[Mask], Mask]) -> Mask:
    """What `make` makes of `mask`: map by map where layers go in turns, so that numbers of one map exist at a time."""
    if material.settings.layers_at_a_time is None:
        return make(mask)
    made = [make(nest({path: leaf})) for path, leaf in flatten(mask).items()]
    return nest({path: leaf for each in made for path, leaf in flatten(each).items()})


def joined(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Trees of the stacks of some layers each as one of all of them."""
    return jax.tree.map(lambda *some: some[0] if len(some) == 1 else jnp.concatenate(some), *map(dict, parts))


@functools.lru_cache(maxsize=1)
def original_mask(material: Material, point: Point) -> Mask:
    """The weights that `point`, which is no control, removes; held for the draws of its controls."""
    if in_turn(point):
        return _changes(material.params, block_by_block(material, point), material.config)
    return mask_of(material, point)


@functools.lru_cache(maxsize=1)
def original_norms(material: Material, point: Point) -> Mapping[str, Any]:
    """The norm of the change of every map at `point`, which is no control; see `change_norms`."""
    if in_turn(point):
        return change_norms(material.config, material.params, edited(material, point)[0])
    return joined(change_norms(part.config, part.params, without_ranks(part, point)) for part in material.parts())


def one_sided(config: ModelConfig, scores: Scores, point: Point, per: str) -> Mask:
    """The weights that a point of "top", "bottom" or "n_of_m" removes by `scores`. Raises ValueError for others."""
    match point.method, point.values:
        case "top", (fraction,):
            return top(config, scores, fraction, per)
        case "bottom", (fraction,):
            return bottom(config, scores, fraction, per)
        case "n_of_m", (n, m):
            return n_of_m(config, scores, int(n), int(m))
    raise ValueError(f"{point.method} removes no single weights by one score")


def block_by_block(material: Material, point: Point) -> Params:
    """The parameters at `point`, whose blocks are scored on the model as changed below them.

    Source: Wanda (arXiv 2306.11695), ActSVD and orthogonal projection as published (arXiv 2402.05162, appendix B).
    Raises ValueError as `check_blocks` does.
    """
    check_blocks(material.settings, point, material.base is not None)

    def strip(config: ModelConfig, params: Params, *found: Statistics) -> Params:
        bases = [act_svd(config, params, each.sums) for each in found]
        ranks = [int(value) for value in point.values]
        if point.method == "orthogonal":
            return remove_orthogonal(config, params, *bases, *ranks)
        return remove_ranks(config, params, *bases, *ranks, top=point.method == "top_ranks")

    def prune(config: ModelConfig, params: Params, found: Statistics) -> Params:
        per = point.per or material.settings.per
        return apply_mask(params, one_sided(config, found.scores(config, params), point, per))

    if point.of_ranks:
        return material.sequential("gram", strip, point.sides)
    return material.sequential(material.settings.score, prune, point.sides)


def edited(material: Material, point: Point) -> tuple[Params, Mask | None]:
    """The parameters at `point`, and the mask of removed weights where there is one.

    A control of ranks takes random directions, of the space that the map's outputs span, for the safety ones: as many,
    or as many as change the weights of a map by the same norm.
    """
    config, params = material.config, material.params
    if point == DENSE:
        return params, None
    if in_turn(point):
        changed = material.held.pop(point) if point in material.held else block_by_block(material, point)
        return changed, None if point.of_ranks else _changes(params, changed, config)
    if not point.of_ranks:
        mask = mask_of(material, point)
        return apply_mask(params, mask, material.base_params), mask
    norms = original_norms(material, point.original) if point.of_norm else None
    if material.settings.layers_at_a_time is None:
        return without_ranks(material, point, norms), None
    parts = ((part.layers, without_ranks(part, point, norms)) for part in material.parts())
    return with_ranges(config, params, parts), None


def without_ranks(material: Material, point: Point, norms: Mapping[str, Any] | None = None) -> Params:
    """The parameters at a point of ranks, of all layers or of those of a part, each scored on the dense model.

    norms: of the changes that a control of equal norm makes, of all layers.
    """
    config, params = material.config, material.params
    safety, rank = material.bases("safety"), int(point.values[0])
    drawn = functools.partial(random_bases, material.model.config, safety, point.control or 0, layers=material.layers)
    if norms is not None:
        return remove_norm(config, params, drawn(config.embed), material.own(norms))
    if point.control is not None:
        safety = drawn(rank if point.method == "top_ranks" else config.embed - rank)
    if point.method == "orthogonal":
        return remove_orthogonal(config, params, safety, material.bases("utility"), rank, int(point.values[1]))
    return remove_ranks(config, params, safety, rank, top=point.method == "top_ranks")


def _changes(before: Params, after: Params, config: ModelConfig) -> Mask:
    """True where a weight of the linear maps is another one."""
    old, new = flatten(before), flatten(after)
    return nest({path: new[path] != old[path] for path in linear_maps(config)})


def removed(material: Material, point: Point) -> dict[str, Any] | None:
    """The share of the weights that `point` removes, of all ("sparsity") and by layer of each map ("layers").

    Kept in the material's store; None for the dense model and for ranks.
    """
    if point == DENSE or point.of_ranks:
        return None

    def make() -> Json:
        material.held.clear()
        if in_turn(point):
            material.held[point] = block_by_block(material, point)
            mask = _changes(material.params, material.held[point], material.config)
        else:
            mask = mask_of(material, point)
        return {"sparsity": sparsity(mask), "layers": {k: v.tolist() for k, v in layer_shares(mask).items()}}

    return material.store.once("removed", [material.model.fingerprint(), material.follows(point)], make, JSON)


def noise(material: Material, point: Point) -> float:
    """The largest share of maps, over the data of `point`, whose ranks are cut where they cannot be told apart.

    Judged by the dense model. 0 where weights are removed, and for controls, whose directions are random.
    """
    if not point.of_ranks or point.control is not None:
        return 0.0
    ranks = [int(value) for value in point.values]
    if point.method == "top_ranks":
        ranks = [material.config.embed - ranks[0]]
    cuts = list(zip(point.sides, ranks, strict=True))
    parts = [
        [cut_in_noise(part.config, part.bases(side), r) * part.config.layers for side, r in cuts]
        for part in material.parts()
    ]
    return max(map(sum, zip(*parts, strict=True))) / material.config.layers


def mean_ranks(config: ModelConfig, point: Point) -> float | None:
    """How many ranks a map loses at `point` at most, the mean over maps; None for weights and for controls of norm."""
    if not point.of_ranks or point.of_norm:
        return None
    if point.method == "orthogonal":
        return float(np.mean(list(removed_ranks(config, int(point.values[0]), int(point.values[1])).values())))
    return float(np.mean(list(removed_ranks(config, config.embed - int(point.values[0]), config.embed).values())))


def family(point: Point, score: str) -> str:
    """The line of a plot that a point belongs to."""
    if point == DENSE:
        return "dense"
    if point.control is not None:
        return ("random ranks" if point.of_ranks else "random weights") + ", equal norm" * point.of_norm
    words = [point.method.replace("_", " "), *(["block by block"] if point.sequential else [])]
    return " ".join(words if point.of_ranks else [*words, f"({score})"])
