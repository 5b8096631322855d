"""Units of a model as masks of its weights: heads, neurons, ranges of layers.

L layers, N heads, F mlp
"""

from collections.abc import Collection, Mapping

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Shaped

from jaxsafe.kernels.selection import Mask
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.layers import LayerRange
from jaxsafe.model.weights import Weight, layer_shape, linear_maps, nest, weights


def layer_mask(config: ModelConfig, layers: LayerRange) -> Mask:
    """True at the attention and MLP maps of `layers`, for `freeze` and `rewind`.

    Norms, embedding and head are not named and stay trainable, as in arXiv 2408.17003. Raises ValueError for a range
    that the model does not have.
    """
    inside = layers.mask(config.layers)

    def mask(shape: tuple[int, ...]) -> np.ndarray:
        return np.broadcast_to(inside.reshape(-1, *[1] * len(shape)), (config.layers, *shape))

    return nest({path: mask(layer_shape(config, weight)) for path, weight in linear_maps(config).items()})


Head = tuple[int, int]
"""(layer, head), both counted from 0."""


def head_mask(config: ModelConfig, heads: Collection[Head]) -> Mask:
    """The mask that ablates `heads`: their outputs of q and inputs of o, over all seven maps.

    k and v belong to a group of query heads and are covered only where the whole group is in `heads`. Raises
    ValueError for a head that the model does not have.
    """
    chosen = np.zeros((config.layers, config.heads), bool)
    for layer, head in heads:
        if not (0 <= layer < config.layers and 0 <= head < config.heads):
            raise ValueError(f"no head {(layer, head)}; the model has {config.layers} layers of {config.heads} heads")
        chosen[layer, head] = True
    group = chosen.reshape(config.layers, config.kv_heads, config.groups).all(-1)
    units = {"heads": chosen, "kv_heads": np.asarray(group)}
    return nest({path: _along(config, weight, units) for path, weight in linear_maps(config).items()})


@flax.struct.dataclass
class Units:
    """One value for each unit: attention heads and MLP neurons."""

    heads: Shaped[np.ndarray, "L N"]
    neurons: Shaped[np.ndarray, "L F"]


def unit_mask(config: ModelConfig, units: Units) -> Mask:
    """The mask that freezes `units` (booleans): every weight of the blocks with an axis of heads or neurons.

    Rows of q and columns of o, of gate, up and down, with their biases and norms of their own; k and v of a group where
    any of its query heads is in `units`. For `freeze` and `rewind`. Raises ValueError for units of another model.
    """
    expected = ((config.layers, config.heads), (config.layers, config.mlp))
    if (units.heads.shape, units.neurons.shape) != expected:
        raise ValueError(f"units have shapes {units.heads.shape} and {units.neurons.shape}; the model has {expected}")
    group = units.heads.reshape(config.layers, config.kv_heads, config.groups).any(-1)
    chosen = {"heads": units.heads, "kv_heads": np.asarray(group), "mlp": units.neurons}
    owned = {path: w for path, w in weights(config).items() if w.stacked and chosen.keys() & {*w.inputs, *w.outputs}}
    return nest({path: _along(config, weight, chosen) for path, weight in owned.items()})


def _along(config: ModelConfig, weight: Weight, chosen: Mapping[str, Bool[np.ndarray, "L _"]]) -> Bool[Array, "L ..."]:
    """True where the axis of `weight` that `chosen` names runs through a chosen unit."""
    shape = (config.layers, *layer_shape(config, weight))
    axes = (*weight.inputs, *weight.outputs)
    axis = next((axis for axis in axes if axis in chosen), None)
    if axis is None:
        return jnp.zeros(shape, bool)
    along = [size if name == axis else 1 for name, size in zip(axes, shape[1:], strict=True)]
    return jnp.broadcast_to(chosen[axis].reshape(config.layers, *along), shape)
