"""Ranks of linear maps: ActSVD, removal of ranks, orthogonal projection (Wei et al., arXiv 2402.05162, section 2.3).

A map y = x W is met by the inputs X of a data set. The right singular vectors of the outputs X W, which are the
left ones of the paper's W X, order the directions of the output space by the energy that the data put there.

Precision: they are the eigenvectors of W^T (X^T X) W, a Gram matrix, which squares the condition number; where
the outputs are fewer than the inputs it is summed directly. In
float32 a direction is told from its neighbours down to about 3e-4 of the largest singular value, below which its
energy is noise; the basis stays orthonormal throughout. Where singular values lie close together the directions
among them are not determined, only the span and its energy are.

L layers, I inputs and O outputs of a linear map, R = min(I, O) ranks, F features of a tap
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int
from threadpoolctl import threadpool_limits

from jaxsafe.kernels.importance import gram_taps
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.layers import LayerRange
from jaxsafe.model.transformer import Params
from jaxsafe.model.weights import flatten, linear_maps, nest, sizes
from jaxsafe.progress import Progress, silent

_EXACT = jax.lax.Precision.HIGHEST

RESOLUTION = 3e-4
"""The singular value, out of a map's largest, down to which a float32 Gram matrix tells directions apart."""

Count = int | Int[Array, ""]
"""A number of directions, which may be traced."""


@flax.struct.dataclass
class Basis:
    """Directions of a map's output space, most energy first.

    vectors: float32 [L, O, R], orthonormal columns; energy: float32 [L, R], squared singular values of X W.
    """

    vectors: Float[Array, "L O R"]
    energy: Float[Array, "L R"]


Bases = Mapping[str, Any]
"""A tree like the parameters, with a `Basis` for every linear map."""


def as_matrices(config: ModelConfig, path: str, array: Float[Array, "L ..."]) -> Float[Array, "L I O"]:
    """A stacked weight as [L, I, O]."""
    weight = linear_maps(config)[path]
    return array.reshape(config.layers, math.prod(sizes(config, weight.inputs)), -1)


def act_svd(
    config: ModelConfig, params: Params, grams: Mapping[str, Float[Array, "L F F"]], done: Progress = silent
) -> dict[str, Any]:
    """The `Basis` of every linear map, a tree like the parameters; all ranks from one eigendecomposition a map.

    `grams` {tap: float32 [L, F, F]} are those of `gram_sums`, of each map's inputs or of its outputs. Layers are one
    batch, split over the devices of the mesh that `params` lie on; maps follow one another, and `done` is called after
    each. Not centred, as published.
    Source: arXiv 2402.05162, section 2.3.
    """
    weight, maps, taps = flatten(params), linear_maps(config), gram_taps(config)

    def basis(path: str, gram: jax.Array) -> Basis:
        mesh = mesh_of(weight[path])
        W = as_matrices(config, path, weight[path]) if taps[path] == maps[path].tap else None
        made = basis_of(W, gram) if mesh is None else by_layers(mesh, basis_of, W, gram)
        jax.block_until_ready(made)
        done(1)
        return made

    with one_blas_thread():
        return nest({path: basis(path, grams[tap]) for path, tap in taps.items()})


def one_blas_thread() -> threadpool_limits:
    """While it is entered, BLAS and LAPACK of the CPU compute on the threads that call them.

    Threads of BLAS's own beside those of jaxlib make results depend on the number of cores and are, rarely, wrong; they
    are no faster.
    """
    import scipy.linalg  # noqa: F401 (what jaxlib calls; only a library that is loaded can be limited)

    return threadpool_limits(1, user_api="blas")


def mesh_of(array: Any) -> Mesh | None:
    """The mesh that an array lies on, where there is one."""
    where = getattr(array, "sharding", None)
    return where.mesh if isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh) else None


@functools.partial(jax.jit, static_argnames=("mesh", "function"))
def by_layers(mesh: Mesh, function: Callable[..., Any], *arrays: Float[Array, "L ..."] | None) -> Any:
    """`function` of arrays with a leading axis of layers, each device of `mesh` with layers of its own.

    Results lie by layers where these are a multiple of the devices, else as `sides` says; zeros then make up for the
    layers that are missing. Devices along the model axis share a layer where the data axis is as long as there are
    layers: to move so few over both axes the compiler brings the whole to every device.
    """
    (L,) = {len(a) for a in arrays if a is not None}
    axes = mesh.axis_names[:1] if mesh.shape["data"] >= L else mesh.axis_names
    own, places = PartitionSpec(axes), math.prod(mesh.shape[axis] for axis in axes)
    count = -(-L // places) * places
    given = jax.tree.map(lambda a: _to_layers(mesh, jnp.pad(a, [(0, count - L)] + [(0, 0)] * (a.ndim - 1))), arrays)
    made = jax.shard_map(function, mesh=mesh, in_specs=own, out_specs=own, check_vma=False)(*given)
    return made if L % mesh.size == 0 else jax.tree.map(lambda a: _to_sides(mesh, a)[:L], made)


def sides(mesh: Mesh, shape: Sequence[int]) -> PartitionSpec:
    """How an array [L, A, B] lies on `mesh` with all layers on every device: A over data, B over model if divisible."""
    split = zip(shape[1:], mesh.axis_names, strict=True) if len(shape) == 3 else ()
    return PartitionSpec(None, *(axis if n % mesh.shape[axis] == 0 else None for n, axis in split))


def bases_spec(mesh: Mesh, shape: Sequence[int]) -> PartitionSpec:
    """How `by_layers` leaves an array [L, A, B] or [L, A] on `mesh`."""
    return sides(mesh, shape) if shape[0] % mesh.size else PartitionSpec(mesh.axis_names)


# One axis of the mesh at a time; both at once the compiler does by bringing the whole to every device.
def _to_layers(mesh: Mesh, a: Float[Array, "L ..."]) -> Float[Array, "L ..."]:
    free = (PartitionSpec.UNCONSTRAINED,) * (a.ndim - 1)
    return jax.lax.with_sharding_constraint(a, NamedSharding(mesh, PartitionSpec("data", *free)))


def _to_sides(mesh: Mesh, a: Float[Array, "L ..."]) -> Float[Array, "L ..."]:
    spec = sides(mesh, a.shape)
    halfway = PartitionSpec("data", None, *spec[2:])
    for step in (halfway, spec) if a.ndim == 3 else (spec,):
        a = jax.lax.with_sharding_constraint(a, NamedSharding(mesh, step))
    return a


@jax.jit
def basis_of(weight: Float[Array, "L I O"] | None, gram: Float[Array, "L F F"]) -> Basis:
    """The basis of maps [L, I, O] whose inputs have the `gram` float32 [L, I, I]; None: outputs have it, [L, O, O].

    Where O > I the outputs lie in the row space of W; with Q an orthonormal basis of it [O, I] the eigenproblem is
    that of (W Q)^T X^T X (W Q), of size I, and its vectors are carried over by Q.
    """
    mean = jnp.einsum("lii->l", gram)[:, None, None] / gram.shape[-1]
    G = gram / jnp.maximum(mean, jnp.finfo(jnp.float32).tiny)  # sums over many tokens leave the range of float32
    if weight is None:
        energy, vectors = _by_energy(G)
    elif weight.shape[2] <= weight.shape[1]:
        energy, vectors = _by_energy(_of_outputs(weight.astype(jnp.float32), G))
    else:
        W = weight.astype(jnp.float32)
        Q = _row_space(W)
        energy, inside = _by_energy(_of_outputs(jnp.einsum("lio,lor->lir", W, Q, precision=_EXACT), G))
        vectors = jnp.einsum("lor,lrk->lok", Q, inside, precision=_EXACT)
    return Basis(vectors, jnp.maximum(energy, 0) * mean[:, 0])


def _of_outputs(W: Float[Array, "L I O"], gram: Float[Array, "L I I"]) -> Float[Array, "L O O"]:
    return jnp.einsum("lio,lij,ljp->lop", W, gram, W, precision=_EXACT)


def _by_energy(gram: Float[Array, "L R R"]) -> tuple[Float[Array, "L R"], Float[Array, "L R R"]]:
    """Eigenvalues and eigenvectors, the largest first."""
    energy, vectors = _eigh((gram + gram.swapaxes(1, 2)) / 2)
    return energy[:, ::-1], vectors[:, :, ::-1]


def _row_space(W: Float[Array, "L I O"]) -> Float[Array, "L O I"]:
    """Orthonormal columns [L, O, I] that span the rows of W [L, I, O], I < O; a rank that W lacks is a zero column.

    W^T E D^-1/2 with W W^T = E D E^T is orthonormal to about 1e-7 times the squared condition number of W; the
    Newton-Schulz steps, matrix products all, bring it to float32's precision.
    """
    values, E = _eigh(jnp.einsum("lio,ljo->lij", W, W, precision=_EXACT))
    floor = 1e-6 * values[:, -1:]
    scale = jnp.where(values > floor, jax.lax.rsqrt(jnp.maximum(values, floor)), 0)
    return _orthonormal(jnp.einsum("lio,lir->lor", W, E * scale[:, None, :], precision=_EXACT), 3)


def _eigh(A: Float[Array, "L R R"]) -> tuple[Float[Array, "L R"], Float[Array, "L R R"]]:
    """Eigenvalues, ascending, and eigenvectors of symmetric [L, R, R]; layers one by one on CPUs.

    jaxlib hands a batch of LAPACK calls to the very threads that wait for it, and several such calls at once stop
    for ever on machines of few cores.
    """
    one_by_one = functools.partial(jax.lax.map, jnp.linalg.eigh)
    values, vectors = jax.lax.platform_dependent(A, cpu=one_by_one, default=jnp.linalg.eigh)
    return values, vectors


def kept(config: ModelConfig, R: int, r: Count) -> Any:
    """How many first directions a map of `R` ranks keeps when `r` of the model's width D are set aside.

    R - r where R = D, as published; a map of fewer ranks (grouped keys and values) keeps the same share of its own.
    `r` may be traced. Rounded half up.
    """
    D = config.embed
    return (2 * R * (D - r) + D) // (2 * D)


def first(basis: Basis, k: Count) -> Float[Array, "L O R"]:
    """The `k` (traced) directions of most energy, the others zero: [L, O, R]."""
    keep = jnp.arange(basis.vectors.shape[-1]) < k
    return basis.vectors * keep.astype(jnp.float32)[None, None]


def onto(W: Float[Array, "L I O"], vectors: Float[Array, "L O R"]) -> Float[Array, "L I O"]:
    """The part of maps [L, I, O] whose outputs lie in the span of `vectors` [L, O, R]: W V V^T."""
    inside = jnp.einsum("lio,lor->lir", W, vectors, precision=_EXACT)
    return jnp.einsum("lir,lor->lio", inside, vectors, precision=_EXACT)


def _edited(config: ModelConfig, params: Params, change: Callable[[str, jax.Array], jax.Array]) -> dict[str, Any]:
    """`params` whose maps W [L, I, O] are W + change(path, W), computed in float32."""
    weight = flatten(params)
    out = dict(weight)
    for path in linear_maps(config):
        W = as_matrices(config, path, weight[path]).astype(jnp.float32)
        out[path] = (W + change(path, W)).reshape(weight[path].shape).astype(weight[path].dtype)
    return nest(out)


@functools.partial(jax.jit, static_argnames=("config", "top"))
def remove_ranks(config: ModelConfig, params: Params, bases: Bases, rank: Count, top: bool = True) -> dict[str, Any]:
    """`params` without the `rank` directions of most energy in every map's output (`top`), or of least.

    Top: W <- W - W V V^T with V the `rank` first directions. Bottom: W <- W V V^T with V all but the `rank` last.
    A map of fewer ranks than the model's width loses the same share (see `kept`). Another rank does not
    recompile. Source: arXiv 2402.05162, section 2.2.
    """
    basis = flatten(bases)

    def change(path: str, W: jax.Array) -> jax.Array:
        R = basis[path].vectors.shape[-1]
        if top:
            return -onto(W, first(basis[path], kept(config, R, config.embed - rank)))
        return onto(W, first(basis[path], kept(config, R, rank))) - W

    return _edited(config, params, change)


@functools.partial(jax.jit, static_argnames=("config",))
def remove_orthogonal(
    config: ModelConfig,
    params: Params,
    safety: Bases,
    utility: Bases,
    r_s: Count,
    r_u: Count,
) -> dict[str, Any]:
    """`params` without the safety ranks that are orthogonal to the utility ranks: W - W P_s (I - P_u).

    P_s spans the `kept` R - r_s first safety directions, P_u the R - r_u first utility directions, R = min(I, O) of
    each map, so that large r leave few directions. (In the paper's orientation W - (I - P_u) P_s W.) A grid of
    (r_s, r_u) needs one decomposition and one compilation. Source: arXiv 2402.05162, section 2.3.
    """
    safe, useful = flatten(safety), flatten(utility)

    def change(path: str, W: jax.Array) -> jax.Array:
        R = safe[path].vectors.shape[-1]
        part = onto(W, first(safe[path], kept(config, R, r_s)))
        return onto(part, first(useful[path], kept(config, R, r_u))) - part

    return _edited(config, params, change)


@functools.partial(jax.jit, static_argnames=("config",))
def change_norms(config: ModelConfig, before: Params, after: Params) -> dict[str, Float[Array, " L"]]:
    """{path: float32 [L]} the Frobenius norm of what became another in every linear map."""
    old, new = flatten(before), flatten(after)
    change = {path: new[path].astype(jnp.float32) - old[path].astype(jnp.float32) for path in linear_maps(config)}
    return {path: jnp.sqrt(jnp.sum(jnp.square(each), range(1, each.ndim))) for path, each in change.items()}


@functools.partial(jax.jit, static_argnames=("config",))
def remove_norm(
    config: ModelConfig, params: Params, bases: Bases, norms: Mapping[str, Float[Array, " L"]]
) -> dict[str, Any]:
    """`params` without the first directions of `bases`, as many as change every map by the norm that `norms` has.

    norms: {path: float32 [L]} as `change_norms` gives. The last direction is removed in part, so that the norms are
    equal: W <- W - W V diag(a) V^T, where a is 1 before it and 0 behind.
    """
    basis = flatten(bases)

    def change(path: str, W: jax.Array) -> jax.Array:
        V = basis[path].vectors
        energy = jnp.sum(jnp.square(jnp.einsum("lio,lor->lir", W, V, precision=_EXACT)), axis=1)
        left = jnp.square(norms[path])[:, None] - (jnp.cumsum(energy, axis=1) - energy)
        share = jnp.clip(left / jnp.maximum(energy, jnp.finfo(jnp.float32).tiny), 0, 1)
        return -onto(W, V * jnp.power(share, 0.25)[:, None])  # squared twice: in V V^T and in the norm

    return _edited(config, params, change)


def random_bases(
    config: ModelConfig, bases: Bases, seed: int, ranks: int, layers: LayerRange | None = None
) -> dict[str, Any]:
    """Bases like `bases` whose first `ranks` directions are random ones of the space that they span, the others zero.

    Inside that span, since what lies outside of it never meets the data: the control of rank removal. A map of fewer
    ranks than the model's width gets the same share (see `kept`). All directions have equal energy; each draw is
    uniform, and the same for any orthonormal basis of the span. `layers` are those of the `config` that `bases` hold,
    None for all; a layer's draw is the same in any range.
    """
    first = 0 if layers is None else layers.first
    out = {}
    with one_blas_thread():
        for i, path in enumerate(sorted(flat := flatten(bases))):
            count = int(kept(config, flat[path].vectors.shape[-1], config.embed - ranks))
            key, mesh = jax.random.fold_in(jax.random.key(seed), i), mesh_of(flat[path].vectors)
            drawn = _drawn(flat[path], key, count, mesh, config.layers, first)
            out[path] = jax.block_until_ready(drawn)
    return nest(out)


@functools.partial(jax.jit, static_argnames=("count", "mesh", "layers"))
def _drawn(basis: Basis, key: jax.Array, count: int, mesh: Mesh | None, layers: int, first: Count) -> Basis:
    """The draw for the layers that `basis` holds, those from `first` on of so many `layers`."""
    L, O, R = basis.vectors.shape
    few = count <= R // 2
    # Drawn for all layers; a compiler that fuses makes no others than those that are taken.
    N = jax.random.normal(key, (layers, O, count if few else R))
    N = jax.lax.dynamic_slice_in_dim(N, first, L)
    N = jnp.einsum("lor,lok->lrk", basis.vectors, N, precision=_EXACT)  # in the coordinates of the basis
    if few:
        Q = _orthonormal(N / (math.sqrt(R) + math.sqrt(count)))
    else:  # N is then too near to a singular matrix; the eigenvectors of N D N^T are uniform as well
        D = jnp.where(jnp.arange(R) % 2, -1.0, 1.0)
        A = jnp.einsum("lrk,k,lsk->lrs", N, D, N, precision=_EXACT)
        Q = (_eigh(A) if mesh is None else by_layers(mesh, _eigh, A))[1][:, :, :count]
    vectors = jnp.einsum("lor,lrk->lok", basis.vectors, Q, precision=_EXACT)
    return Basis(jnp.pad(vectors, [(0, 0), (0, 0), (0, R - count)]), jnp.ones_like(basis.energy))


def _orthonormal(A: Float[Array, "L R K"], steps: int = 16) -> Float[Array, "L R K"]:
    """The orthonormal factor of the polar decomposition of A [L, R, K], whose singular values are below 1.7.

    By Newton-Schulz steps, matrix products all: 16 bring a singular value of 0.01 to 1 within float32's precision.
    """
    for _ in range(steps):
        gram = jnp.einsum("lrk,lrm->lkm", A, A, precision=_EXACT)
        A = 1.5 * A - 0.5 * jnp.einsum("lrk,lkm->lrm", A, gram, precision=_EXACT)
    return A


def overlap(a: Basis, b: Basis, k: Count) -> Float[Array, " L"]:
    """||A^T B||_F^2 / k of the `k` first directions of both, in [0, 1]; float32 [L].

    The subspace similarity of Hu et al., arXiv 2106.09685, appendix G, as in arXiv 2402.05162, section 4.3.
    """
    inner = jnp.einsum("lor,los->lrs", first(a, k), first(b, k), precision=_EXACT)
    return jnp.sum(jnp.square(inner), axis=(1, 2)) / jnp.minimum(k, a.vectors.shape[-1])


@jax.jit
def subspace_similarity(a: Bases, b: Bases, rank: Count) -> dict[str, Float[Array, " L"]]:
    """{path: [L]} similarity of the `rank` first directions of every map in two trees of bases."""
    return {path: overlap(basis, flatten(b)[path], rank) for path, basis in flatten(a).items()}


def energy_shares(bases: Bases) -> dict[str, Float[Array, "L R"]]:
    """{path: [L, R]} share of a map's output energy in its first 1, 2, ... R directions."""
    return {
        path: jnp.cumsum(b.energy, axis=1) / jnp.maximum(b.energy.sum(1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        for path, b in flatten(bases).items()
    }


def resolved(bases: Bases) -> dict[str, Int[Array, " L"]]:
    """{path: [L]} how many directions of each map lie above `RESOLUTION`; the others are noise in their order."""
    energies = {path: basis.energy for path, basis in flatten(bases).items()}
    return {path: (e > RESOLUTION**2 * e.max(1, keepdims=True)).sum(1) for path, e in energies.items()}


def cut_in_noise(config: ModelConfig, bases: Bases, r: int) -> float:
    """The share of maps whose directions are cut among those that are not `resolved` where `r` are set aside."""
    ranks = {path: basis.energy.shape[1] for path, basis in flatten(bases).items()}
    cuts = {path: int(kept(config, R, r)) for path, R in ranks.items()}
    lost = [(known < cuts[path]) & (cuts[path] < ranks[path]) for path, known in resolved(bases).items()]
    return float(jnp.concatenate(lost).mean())


def removed_ranks(config: ModelConfig, r_s: int, r_u: int) -> dict[str, int]:
    """{path: the most ranks that `remove_orthogonal` can take from a map}: safety ranks, beyond no utility rank."""
    out = {}
    for path, w in linear_maps(config).items():
        R = min(math.prod(sizes(config, w.inputs)), math.prod(sizes(config, w.outputs)))
        out[path] = min(kept(config, R, r_s), R - kept(config, R, r_u))
    return out
