"""Units of a model as masks of its weights: heads, ranges of layers."""

from collections.abc import Collection

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxsafe.kernels.selection import Mask
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.layers import LayerRange
from jaxsafe.model.weights import Weight, layer_shape, linear_maps, nest


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
    units = {"heads": chosen, "kv_heads": group}

    def mask(weight: Weight) -> Bool[Array, "L ..."]:
        shape = (config.layers, *layer_shape(config, weight))
        axes = (*weight.inputs, *weight.outputs)
        axis = next((axis for axis in axes if axis in units), None)
        if axis is None:
            return jnp.zeros(shape, bool)
        along = [size if name == axis else 1 for name, size in zip(axes, shape[1:], strict=True)]
        return jnp.broadcast_to(units[axis].reshape(config.layers, *along), shape)

    return nest({path: mask(weight) for path, weight in linear_maps(config).items()})
