"""Bases of linear maps, kept in a store."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from jaxsafe.io.store import HOST_TREE, Json, Store
from jaxsafe.kernels.lowrank import Bases, Basis, bases_spec
from jaxsafe.model.weights import flatten, nest


def bases_once(store: Store, follows: Json, make: Callable[[], Bases], mesh: Mesh | None) -> Bases:
    """The bases that follow from `follows`, made now unless they are in `store`; on `mesh` as `act_svd` leaves them."""

    def arrays() -> dict[str, Any]:
        parts = {path: {"vectors": b.vectors, "energy": b.energy} for path, b in flatten(make()).items()}
        return nest({f"{path}/{name}": array for path, part in parts.items() for name, array in part.items()})

    def placed(array: Any) -> jax.Array:
        return jax.device_put(array, None if mesh is None else NamedSharding(mesh, bases_spec(mesh, array.shape)))

    kept = jax.tree.map(placed, store.once("bases", follows, arrays, HOST_TREE))
    return {"layers": {name: Basis(**basis) for name, basis in kept["layers"].items()}}
