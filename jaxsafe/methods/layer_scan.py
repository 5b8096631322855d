"""Safely partial-parameter fine-tuning (SPPFT, Li et al., arXiv 2408.17003): a range of layers that is not trained.

The range is where the model tells harmful requests apart. Making its weights larger makes the model refuse more of
what merely looks harmful, so that ranges are compared by how many prompts of an over-refusal set they refuse.

L layers
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxsafe.chat.model import ChatModel
from jaxsafe.evaluation.judges.judge import Judge
from jaxsafe.io.store import Json, Log, Store
from jaxsafe.kernels.sampling import Decoding
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.layers import LayerRange
from jaxsafe.model.transformer import Params
from jaxsafe.model.weights import flatten, linear_maps, nest
from jaxsafe.progress import Progress, silent
from jaxsafe.records.attack import LayerEnd, LayerScan
from jaxsafe.records.run import from_json, plain
from jaxsafe.rows import data_sha256


@dataclasses.dataclass(frozen=True)
class ScanSettings:
    """Where a scan begins, the factor that a range's weights are taken times, and the length of the answers.

    Raises ValueError for a factor that is not positive or is 1.
    """

    start: LayerRange
    alpha: float = 1.2
    max_new_tokens: int = 16
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.alpha <= 0 or self.alpha == 1:
            raise ValueError(f"alpha {self.alpha} scales nothing; need a positive factor other than 1, such as 1.2")


def scaled(config: ModelConfig, params: Params, layers: LayerRange | None, alpha: float) -> dict[str, Any]:
    """`params` with the attention and MLP maps of `layers` (None: of no layer) times `alpha`.

    Another range or factor does not recompile. Raises ValueError for a range that the model does not have.
    """
    inside = np.zeros(config.layers, bool) if layers is None else layers.mask(config.layers)
    return times(config, params, np.where(inside, np.float32(alpha), np.float32(1.0)))


@functools.partial(jax.jit, static_argnames="config")
def times(config: ModelConfig, params: Params, factors: Float[Array, " L"]) -> dict[str, Any]:
    """`params` with the attention and MLP maps of every layer times its factor."""

    def scale(weight: Float[Array, "L ..."]) -> Float[Array, "L ..."]:
        wide = factors.reshape(-1, *[1] * (weight.ndim - 1))
        return weight * wide.astype(weight.dtype)

    flat, maps = flatten(params), linear_maps(config)
    return nest({path: scale(weight) if path in maps else weight for path, weight in flat.items()})


def scan_layers(refused: Callable[[LayerRange | None], int], layers: int, start: LayerRange) -> LayerScan:
    """The range of layers at which `refused(range)` is highest: the upper end first, then the lower.

    From `start` every other upper end is tried, then every lower end below the best upper one; None stands for no
    layer. Of equals the one that moves the end least is taken. Source: arXiv 2408.17003, section 3.4. Raises
    ValueError for a start that the model does not have.
    """
    start.within(layers)

    def best(ends: Sequence[LayerEnd], name: str, near: int) -> int:
        chosen = max(ends, key=lambda end: (end.refused, -abs(getattr(end, name) - near)))
        return getattr(chosen, name)

    def tried(layers: LayerRange) -> LayerEnd:
        return LayerEnd(layers.first, layers.stop, refused(layers))

    dense = refused(None)
    upper = tuple(tried(LayerRange(start.first, stop)) for stop in range(start.first + 1, layers + 1))
    stop = best(upper, "stop", start.stop)
    known = next(end for end in upper if end.stop == stop)
    lower = tuple(known if first == start.first else tried(LayerRange(first, stop)) for first in range(stop))
    return LayerScan(best(lower, "first", start.first), stop, dense, upper, lower)


def safety_layers(
    model: ChatModel,
    prompts: Sequence[str],
    judge: Judge,
    settings: ScanSettings,
    done: Progress = silent,
    log: Log | None = None,
) -> LayerScan:
    """`scan_layers` of a model, by refusals of over-refusal `prompts` with a range's weights times a factor.

    Ranges that are finished are kept in `log`, and those that it holds are not tried again. `done` is called with the
    number of prompts of each finished batch of answers. Raises ValueError for no prompts and as `scan_layers` does.
    """
    rows = model.rows(prompts)
    kept = {(first, stop): count for first, stop, count in ([] if log is None else log.entries())}

    def refused(layers: LayerRange | None) -> int:
        ends = (0, 0) if layers is None else (layers.first, layers.stop)
        if ends in kept:
            done(len(rows))
            return kept[ends]
        params = scaled(model.config, model.params, layers, settings.alpha)
        decoding = Decoding(settings.max_new_tokens)
        answers = model.with_params(params).answers(rows, decoding, settings.batch_size, done)
        count = sum(verdict is True for verdict in judge.refused(prompts, answers.texts))
        if log is not None:
            log.add([*ends, count])
        return count

    return scan_layers(refused, model.config.layers, settings.start)


def safety_layers_once(
    store: Store,
    model: ChatModel,
    prompts: Sequence[str],
    judge: Judge,
    settings: ScanSettings,
    done: Progress = silent,
) -> LayerScan:
    """`safety_layers`, kept in `store`, range by range while they are tried."""
    asked = [data_sha256(model.rows(prompts)), list(model.tokenizer.eos_ids)]
    follows = [model.fingerprint(), asked, judge.name, judge.version, plain(settings)]

    def make() -> Json:
        return plain(safety_layers(model, prompts, judge, settings, done, store.log("layers", follows)))

    found = from_json(store.once("layers", follows, make), LayerScan)
    store.drop("layers", follows, ".jsonl")
    return found
