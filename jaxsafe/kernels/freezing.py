"""What training may not move: optax transformations to be placed last in a chain, and the way back.

They act on the updates that an optimiser made, weight decay included, so that what is frozen keeps its bits.
Each takes an update tree of the structure of the parameters or of a part of it, so the change of weights that
low-rank adapters make is frozen by the same transformations. Masks and bases lie in the state, as data: no
compiled program holds them as constants.

L layers, I and O input and output axis of a linear map, R rank
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from jaxsafe.kernels.selection import Mask
from jaxsafe.model.transformer import Params
from jaxsafe.model.weights import flatten, nest

# An update that keeps the bits of any weight: adding +0.0 would turn -0.0 into 0.0.
STAY = -0.0

Update = Float[Array, "..."]
"""What is added to a weight, of its shape."""


def freeze(mask: Mask) -> optax.GradientTransformation:
    """No weight moves where `mask` is true.

    `mask` is a tree of booleans of the shapes of the parameters; weights that it does not name are free.
    Initialising raises ValueError for a mask that does not fit the parameters.
    """

    def init(params: Any) -> dict[str, Any]:
        given, flat = flatten(mask), flatten(params)
        for path, part in given.items():
            _known("mask", path, flat)
            if part.shape != flat[path].shape:
                raise ValueError(f"mask of {path!r} has shape {part.shape}; the weight has {flat[path].shape}")
        # Zeros of the weight bring the mask to the weight's devices, as a copy that may be donated.
        return {path: jnp.zeros_like(flat[path], bool) | jnp.asarray(part, bool) for path, part in given.items()}

    return optax.GradientTransformation(init, _update_free)


def outside(bases: Mapping[str, Any]) -> optax.GradientTransformation:
    """Linear maps y = x W move only outside a subspace of their outputs: dW <- dW - (dW U) U^T.

    `bases` is a tree of orthonormal columns U, [L, O, R] a map, the axes of its output flattened to O; maps
    that it does not name are free. Initialising raises ValueError for bases that do not fit the parameters.
    """

    def init(params: Any) -> dict[str, Any]:
        given, flat = flatten(bases), flatten(params)
        for path, basis in given.items():
            _known("basis", path, flat)
            shape = flat[path].shape
            ends = [math.prod(shape[axis:]) for axis in range(2, len(shape))]
            if basis.ndim != 3 or basis.shape[0] != shape[0] or basis.shape[1] not in ends:
                raise ValueError(
                    f"basis of {path!r} has shape {basis.shape}; it needs [layers, outputs, rank] of a weight {shape}"
                )
        return {path: jnp.array(basis, jnp.float32) for path, basis in given.items()}

    return optax.GradientTransformation(init, _update_outside)


def layers(chosen: Sequence[int]) -> optax.GradientTransformation:
    """Only the layers `chosen` move, e.g. `range(4, 8)`; embedding, last norm and unembedding stay as well.

    Initialising raises ValueError for a layer that the model does not have.
    """

    def init(params: Any) -> dict[str, Any]:
        count = next(leaf.shape[0] for path, leaf in flatten(params).items() if path.startswith("layers/"))
        beyond = sorted(layer for layer in chosen if not 0 <= layer < count)
        if beyond:
            raise ValueError(f"layer {beyond[0]} is not one of this model's; it has layers 0 to {count - 1}")
        return {"moves": jnp.asarray(np.isin(np.arange(count), list(chosen)))}

    return optax.GradientTransformation(init, _update_layers)


def rewind(tuned: Params, original: Params, mask: Mask) -> dict[str, Any]:
    """The `original` weights where `mask` is true, the `tuned` ones elsewhere and where the mask has no tree.

    Raises ValueError for a mask of a weight that the trees do not have.
    """
    flat, before, given = flatten(tuned), flatten(original), flatten(mask)
    for path in given:
        _known("mask", path, flat)
    return nest({path: jnp.where(given[path], before[path], w) if path in given else w for path, w in flat.items()})


def _known(what: str, path: str, flat: Mapping[str, Any]) -> None:
    if path not in flat:
        raise ValueError(f"{what} of {path!r} fits no weight; the weights are {sorted(flat)}")


def _by_path(move: Callable[[str, Update, Any], Update]) -> Callable[..., tuple[Any, Any]]:
    """The update that moves each weight by what `move(path, update, state)` leaves of its own."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return nest({path: move(path, u, state) for path, u in flatten(updates).items()}), state

    return update


def _free(path: str, update: Update, state: Mapping[str, Bool[Array, "..."]]) -> Update:
    return jnp.where(state[path], STAY, update) if path in state else update


def _outside(path: str, update: Update, state: Mapping[str, Float[Array, "L O R"]]) -> Update:
    if path not in state:
        return update
    basis = state[path]
    flat = update.reshape(update.shape[0], -1, basis.shape[1]).astype(jnp.float32)
    inside = jnp.einsum("lio,lor->lir", flat, basis, precision="highest")
    kept = flat - jnp.einsum("lir,lor->lio", inside, basis, precision="highest")
    return kept.reshape(update.shape).astype(update.dtype)


def _in_layers(path: str, update: Update, state: Mapping[str, Bool[Array, " L"]]) -> Update:
    if not path.startswith("layers/"):
        return jnp.full_like(update, STAY)
    moves = state["moves"].reshape(-1, *[1] * (update.ndim - 1))
    return jnp.where(moves, update, STAY)


# One function for all masks and one for all bases: what is compiled for one mask serves the others.
_update_free, _update_outside, _update_layers = map(_by_path, (_free, _outside, _in_layers))
