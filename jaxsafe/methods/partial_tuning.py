"""Safely partial-parameter fine-tuning (SPPFT, Li et al., arXiv 2408.17003): a range of layers that is not trained.

The range is where the model tells harmful requests apart. Making its weights larger makes the model refuse more of
what merely looks harmful, so that ranges are compared by how many prompts of an over-refusal set they refuse.

L layers
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsafe.evaluation.judges import Judge
from jaxsafe.io.chat_model import ChatModel
from jaxsafe.kernels.generate import generate_rows
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.transformer import Params
from jaxsafe.model.weights import flatten, layer_shape, linear_maps, nest


@dataclasses.dataclass(frozen=True)
class LayerScan:
    """The range `first` <= layer < `stop`, and how many prompts were refused at every range that was tried.

    upper, lower: {"first", "stop", "refused"} for each end tried, in this order; dense: refused without scaling.
    """

    first: int
    stop: int
    dense: int
    upper: tuple[Mapping[str, int], ...]
    lower: tuple[Mapping[str, int], ...]


@functools.partial(jax.jit, static_argnames="config")
def scaled(
    config: ModelConfig, params: Params, first: jax.Array | int, stop: jax.Array | int, alpha: jax.Array | float
) -> dict[str, Any]:
    """`params` with the attention and MLP maps of the layers `first` <= layer < `stop` times `alpha`.

    Another range or factor does not recompile.
    """
    layer = jnp.arange(config.layers)
    factor = jnp.where((layer >= first) & (layer < stop), alpha, 1.0)

    def times(weight: jax.Array) -> jax.Array:
        wide = factor.reshape(-1, *[1] * (weight.ndim - 1))
        return (weight * wide).astype(weight.dtype)

    flat, maps = flatten(params), linear_maps(config)
    return nest({path: times(weight) if path in maps else weight for path, weight in flat.items()})


def scan_layers(refused: Callable[[int, int], int], layers: int, first: int, stop: int) -> LayerScan:
    """The range of layers at which `refused(first, stop)` is highest: the upper end first, then the lower.

    From the range `first` <= layer < `stop` every other upper end above `first` is tried, then every lower end below
    the best upper one. Of equals the one that moves the end least is taken. Source: arXiv 2408.17003, section 3.4.
    Raises ValueError for a range that is empty or outside the model.
    """
    if not 0 <= first < stop <= layers:
        raise ValueError(f"layers {first} to {stop} are no range of the {layers} layers of this model")

    def best(counts: Mapping[int, int], start: int) -> int:
        return max(counts, key=lambda end: (counts[end], -abs(end - start)))

    dense = refused(0, 0)
    upper = {end: refused(first, end) for end in range(first + 1, layers + 1)}
    top = best(upper, stop)
    lower = {begin: upper[top] if begin == first else refused(begin, top) for begin in range(top)}
    return LayerScan(
        best(lower, first),
        top,
        dense,
        tuple({"first": first, "stop": end, "refused": n} for end, n in upper.items()),
        tuple({"first": begin, "stop": top, "refused": n} for begin, n in lower.items()),
    )


def safety_layers(
    model: ChatModel,
    prompts: Sequence[str],
    judge: Judge,
    alpha: float,
    first: int,
    stop: int,
    max_new_tokens: int = 16,
    batch_size: int = 32,
    done: Callable[[int], None] = lambda n: None,
) -> LayerScan:
    """`scan_layers` of a model, by refusals of over-refusal `prompts` with a range's weights times `alpha`.

    `done` hears of every answered prompt. Raises ValueError for no prompts, an `alpha` that is not positive or is 1,
    and as `scan_layers` does.
    """
    if alpha <= 0 or alpha == 1:
        raise ValueError(f"alpha {alpha} scales nothing; need a positive factor other than 1, such as 1.2")
    rows = model.rows(prompts)

    def refused(first: int, stop: int) -> int:
        params = scaled(model.config, model.params, first, stop, alpha)
        out = generate_rows(
            model.config,
            params,
            rows,
            batch_size,
            max_new_tokens,
            mesh=model.mesh,
            done=done,
            eos=model.tokenizer.eos_ids,
        )
        return sum(judge.refused(text) is True for text in model.tokenizer.decode(out.tokens, out.lengths))

    return scan_layers(refused, model.config.layers, first, stop)


def layer_mask(config: ModelConfig, first: int, stop: int) -> dict[str, Any]:
    """True at the attention and MLP maps of the layers `first` <= layer < `stop`, for `freeze` and `rewind`.

    Norms, embedding and head are not named and stay trainable, as in the paper. Raises ValueError for a range that is
    empty or outside the model.
    """
    if not 0 <= first < stop <= config.layers:
        raise ValueError(f"layers {first} to {stop} are no range of the {config.layers} layers of this model")
    inside = (np.arange(config.layers) >= first) & (np.arange(config.layers) < stop)

    def mask(shape: tuple[int, ...]) -> np.ndarray:
        return np.broadcast_to(inside.reshape(-1, *[1] * len(shape)), (config.layers, *shape))

    return nest({path: mask(layer_shape(config, weight)) for path, weight in linear_maps(config).items()})
