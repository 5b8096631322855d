"""Roles of attention heads and MLP neurons: safety, utility, complex, redundant (SSAH, arXiv 2410.10862).

A unit's importance on a data set follows from its channels j of the input X of o (a head's) or of down (a neuron):

    I_j = Var(X_j) |W_j|^2,    a head's squared,    z = (I - mean I) / std I over the channels of a layer

over the tokens of the responses; a head is the mean of its channels. S on safety data and U on utility data rank all
units of the model by S + U (the redundant) and by S - U (of safety, of utility). This is what their code computes.
Ours: the cost of a head under grouped queries, ties, and that a pruned head loses its columns of o, not its rows of
q, k and v, which other heads may share.

L layers, F features of a tap, D embed
"""

import dataclasses
import enum

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jaxsafe.chat.model import ChatModel
from jaxsafe.kernels.units import Units
from jaxsafe.methods.unit_inputs import INPUTS, InputMoments
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.taps import Both, edit
from jaxsafe.model.transformer import Params


class Role(enum.IntEnum):
    """What a unit is for; utility goes before safety, and safety before redundant, where several would apply."""

    REDUNDANT = 0
    SAFETY = 1
    UTILITY = 2
    COMPLEX = 3


@dataclasses.dataclass(frozen=True)
class RoleShares:
    """Shares of the cost of all units, as published: most by S - U, least by S - U, least by S + U.

    Raises ValueError for a share outside 0 to 1.
    """

    safety: float = 0.01
    utility: float = 0.1
    redundant: float = 0.1

    def __post_init__(self) -> None:
        for name, share in dataclasses.asdict(self).items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} {share:g} is no share of the units' cost; it lies between 0 and 1")


def unit_scores(config: ModelConfig, params: Params, moments: InputMoments) -> Units:
    """The importance of every unit, float64: z by layer, of a head the mean over its channels.

    Channels of a layer that are all equally important have z = 0.
    """
    z = {}
    for name, tap in INPUTS.items():
        weight = jnp.square(jnp.asarray(params["layers"][name], jnp.float32)).sum(-1)
        importance = moments.variance[tap] * np.asarray(weight, np.float64).reshape(config.layers, -1)
        importance = importance**2 if name == "o" else importance
        spread = importance.std(-1, ddof=1, keepdims=True)
        z[name] = (importance - importance.mean(-1, keepdims=True)) / np.where(spread == 0, 1, spread)
    return Units(z["o"].reshape(config.layers, config.heads, config.head_dim).mean(-1), z["down"])


def head_cost(config: ModelConfig) -> int:
    """What a head costs where a neuron costs 1: its weights by those of a neuron, rounded down; 170 of Llama-2-7B.

    A key/value head is shared out among the query heads of its group.
    """
    return (2 * config.head_dim * config.groups + 2 * config.head_dim) // (3 * config.groups)


def unit_roles(config: ModelConfig, safety: Units, utility: Units, shares: RoleShares = RoleShares()) -> Units:
    """The `Role` of every unit, int8, from its scores on safety and on utility data.

    A share takes the units first in order whose summed cost is nearest to it, the fewer where two are as near. Ties
    are in the order heads before neurons, layer by layer.
    """
    of_safety, of_utility = _flat(safety), _flat(utility)
    cost = np.repeat([head_cost(config), 1], [safety.heads.size, safety.neurons.size])
    roles = np.full(len(cost), Role.COMPLEX, np.int8)
    roles[_first(of_safety + of_utility, cost, shares.redundant)] = Role.REDUNDANT
    roles[_first(of_utility - of_safety, cost, shares.safety)] = Role.SAFETY
    roles[_first(of_safety - of_utility, cost, shares.utility)] = Role.UTILITY
    heads, neurons = np.split(roles, [safety.heads.size])
    return Units(heads.reshape(safety.heads.shape), neurons.reshape(safety.neurons.shape))


def _flat(units: Units) -> np.ndarray:
    return np.concatenate([units.heads.ravel(), units.neurons.ravel()])


def _first(keys: np.ndarray, cost: np.ndarray, share: float) -> np.ndarray:
    """Indices of the units of least `keys` that cost `share` of all."""
    order = np.argsort(keys, kind="stable")
    so_far = np.concatenate([[0], np.cumsum(cost[order])])
    return order[: np.argmin(np.abs(so_far - share * so_far[-1]))]


def units_of(roles: Units, role: Role) -> Units:
    """The units of one role, as booleans."""
    return Units(roles.heads == role, roles.neurons == role)


def kept_units(roles: Units, safety: Units, complex_share: float) -> Units:
    """The units that are frozen in fine-tuning, as booleans: all of safety, and complex ones of the highest score.

    Of these there are as many as the share `complex_share` of all units, rounded, or all. `safety` are the scores S by
    which they are ranked, which is ours: nothing says what their "top" complex units are top in. Ties are as in
    `unit_roles`.
    """
    of, score = _flat(roles), _flat(safety)
    order = np.argsort(np.where(of == Role.COMPLEX, -score, np.inf), kind="stable")
    most = min(round(complex_share * len(of)), int((of == Role.COMPLEX).sum()))
    kept = of == Role.SAFETY
    kept[order[:most]] = True
    heads, neurons = np.split(kept, [roles.heads.size])
    return Units(heads.reshape(roles.heads.shape), neurons.reshape(roles.neurons.shape))


def random_units(units: Units, seed: int) -> Units:
    """As many random heads and neurons of each layer as `units` has; from the whole layer, those of `units` as well."""
    rng = np.random.default_rng(seed)
    return Units(*(rng.permuted(each, axis=1) for each in (units.heads, units.neurons)))


def role_transfer(before: Units, after: Units) -> Int[np.ndarray, "4 4"]:
    """How many units of each role (rows) have which role (columns) in `after`, say the model after fine-tuning."""
    counts = np.zeros((len(Role), len(Role)), np.int64)
    np.add.at(counts, (_flat(before), _flat(after)), 1)
    return counts


def without_units(model: ChatModel, units: Units, moments: InputMoments) -> ChatModel:
    """`model` with `units` (booleans) replaced by their mean input in `moments`, of the safety data as published.

    Their columns of o and down are zero, and what the means give through these is added at the taps "o" and "down":
    an edit, no weight, before edits that `model` has there.
    """
    config, layers, edits = model.config, dict(model.params["layers"]), dict(model.edits or {})
    channels = {"o": np.repeat(units.heads, config.head_dim, axis=1), "down": units.neurons}
    for name, tap in INPUTS.items():
        weight = layers[name]
        lost = jnp.where(channels[name], jnp.asarray(moments.mean[tap], jnp.float32), 0)
        matrix = weight.reshape(config.layers, -1, config.embed)
        given = jnp.einsum("lf,lfd->ld", lost, matrix.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        layers[name] = jnp.where(channels[name][..., None], 0, matrix).reshape(weight.shape)
        edits[name] = Both(edit(add=given), edits[name]) if name in edits else edit(add=given)
    return model.with_params({**model.params, "layers": layers}).with_edits(edits)
