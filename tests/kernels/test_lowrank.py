"""ActSVD and what is made of it against numpy.linalg.svd of stacked outputs in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from threadpoolctl import threadpool_info, threadpool_limits
from tiny import random_rows, tiny_config, tiny_params

from jaxsafe.kernels import lowrank as module
from jaxsafe.kernels.forward import capture
from jaxsafe.kernels.importance import gram_sums, gram_taps
from jaxsafe.kernels.lowrank import (
    Basis,
    act_svd,
    basis_of,
    by_layers,
    cut_in_noise,
    energy_shares,
    kept,
    random_bases,
    remove_orthogonal,
    remove_ranks,
    removed_ranks,
    resolved,
    subspace_similarity,
)
from jaxsafe.model.weights import flatten, linear_maps, shardings
from jaxsafe.parallel import parse_mesh
from jaxsafe.plan.collectives import collectives
from jaxsafe.rows import pad_rows

CONFIG = tiny_config()
PARAMS = tiny_params(CONFIG)
# Every length is a program where rows run alone.
SAFETY = random_rows([20, 31, 20, 31, 40, 20, 40, 31], behind=[5, 7, 3, 9, 11, 4, 6, 2])
UTILITY = random_rows([20, 31, 20, 40], behind=[14, 9, 12, 21], seed=1)
grams = jax.jit(gram_sums, static_argnames=("config", "positions", "last", "axis_name"))
captured = jax.jit(capture, static_argnames=("config", "taps"))


def matrix(path, layer):
    """One map as the float64 matrix [I, O]."""
    array = np.asarray(flatten(PARAMS)[path][layer], np.float64)
    inputs = len(linear_maps(CONFIG)[path].inputs)
    return array.reshape(int(np.prod(array.shape[:inputs])), -1)


@functools.cache
def outputs(which):
    """{(path, layer): X W [tokens, O]} over the response tokens of every row, each run alone."""
    rows = {"safety": SAFETY, "utility": UTILITY}[which]
    taps = ("attn_in", "heads", "mlp_in", "mlp_hidden")
    stacked = {}
    for row in rows:
        one = pad_rows([row], length=len(row.ids))
        read = captured(CONFIG, PARAMS, one.tokens, one.valid, taps)
        for tap, x in read.items():
            part = np.asarray(x[:, 0, row.instruction_end + 1 :], np.float64)
            stacked[tap] = np.concatenate([stacked[tap], part], 1) if tap in stacked else part
    return {
        (path, layer): stacked[w.tap][layer] @ matrix(path, layer)
        for path, w in linear_maps(CONFIG).items()
        for layer in range(CONFIG.layers)
    }


@functools.cache
def svd(which, path, layer):
    _, s, vt = np.linalg.svd(outputs(which)[path, layer], full_matrices=False)
    R = min(matrix(path, layer).shape)
    return s[:R], vt[:R].T


@functools.cache
def bases(which):
    rows = {"safety": SAFETY, "utility": UTILITY}[which]
    return act_svd(CONFIG, PARAMS, grams(CONFIG, PARAMS, pad_rows(rows)))


ALL = [(path, layer) for path in linear_maps(CONFIG) for layer in range(CONFIG.layers)]


def test_energies_are_squared_singular_values():
    for path, layer in ALL:
        s, _ = svd("safety", path, layer)
        found = np.asarray(flatten(bases("safety"))[path].energy[layer])
        np.testing.assert_allclose(found[: len(s)], s**2, rtol=1e-4, atol=1e-5 * s[0] ** 2, err_msg=path)


def test_every_basis_is_orthonormal_even_where_there_is_no_energy():
    few = grams(CONFIG, PARAMS, pad_rows(random_rows([9, 8], behind=[2, 3])))
    for tree in (bases("safety"), act_svd(CONFIG, PARAMS, few)):
        for path, basis in flatten(tree).items():
            R = basis.vectors.shape[-1]
            inner = np.einsum("lor,los->lrs", *(np.asarray(basis.vectors, np.float64),) * 2)
            np.testing.assert_allclose(inner, np.broadcast_to(np.eye(R), inner.shape), atol=2e-5, err_msg=path)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_projections_are_those_of_the_svd(k):
    for path, layer in ALL:
        s, v = svd("safety", path, layer)
        if s[k - 1] - s[k] < 0.02 * s[0]:
            continue  # not separated: the span is compared by its energy below
        found = np.asarray(flatten(bases("safety"))[path].vectors[layer, :, :k], np.float64)
        np.testing.assert_allclose(found @ found.T, v[:, :k] @ v[:, :k].T, atol=2e-3, err_msg=f"{path} {layer}")


def planted(spectrum, seed=0, tokens=300, inputs=40, outs=24):
    """Inputs X and a map W with X W of the given singular values."""
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.standard_normal((tokens, len(spectrum))))
    v, _ = np.linalg.qr(rng.standard_normal((outs, len(spectrum))))
    w, _ = np.linalg.qr(rng.standard_normal((inputs, inputs)))
    weight = w[:, : len(spectrum)] @ v.T
    x = u * spectrum @ w[:, : len(spectrum)].T
    return x, weight, v


def basis_from(x, weight):
    gram = jnp.asarray(x.T @ x, jnp.float32)[None]
    return basis_of(jnp.asarray(weight, jnp.float32)[None], gram), gram


def test_outputs_give_the_basis_that_inputs_give():
    x, weight, v = planted(2.0 ** -np.arange(10))
    of_outputs = basis_of(None, jnp.asarray((x @ weight).T @ (x @ weight), jnp.float32)[None])
    of_inputs, _ = basis_from(x, weight)
    np.testing.assert_allclose(of_outputs.energy[0, :8], of_inputs.energy[0, :8], rtol=1e-3)
    for k in range(8):
        found = np.asarray(of_outputs.vectors[0])
        assert abs(found[:, k] @ v[:, k]) > 1 - 1e-4


@pytest.mark.parametrize(
    ("changes", "taps"),
    [
        ({}, {"attn_in", "heads", "mlp_in", "down"}),
        ({"head_dim": 16}, {"attn_in", "o", "mlp_in", "down"}),
        ({"mlp": 24}, {"attn_in", "heads", "mlp_in", "mlp_hidden"}),
        ({"mlp_bias": True, "o_bias": True, "head_dim": 16}, {"attn_in", "heads", "mlp_in", "mlp_hidden"}),
    ],
)
def test_the_narrower_side_is_summed_where_it_serves(changes, taps):
    assert set(gram_taps(tiny_config(**changes)).values()) == taps


@pytest.mark.parametrize(("inputs", "outs"), [(40, 24), (24, 40)])
def test_a_well_gapped_spectrum_is_found_by_its_vectors(inputs, outs):
    x, weight, v = planted(2.0 ** -np.arange(10), inputs=inputs, outs=outs)
    found = np.asarray(basis_from(x, weight)[0].vectors[0])
    for k in range(8):  # down to 2^-8 of the largest singular value, 2^-16 in the Gram matrix
        assert abs(found[:, k] @ v[:, k]) > 1 - 1e-3, k


def sketched(x, weight, rank, iterations=20):
    """The first directions by subspace iteration of a sketch exactly `rank` wide, as published: [O, R]."""
    out = x @ weight
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((weight.shape[1], rank)))[0]
    for _ in range(iterations + 1):
        Q = np.linalg.qr(out.T @ (out @ Q))[0]
    return Q


def test_a_flat_spectrum_is_found_by_its_energy_where_the_sketch_is_not():
    x, weight, _ = planted(np.linspace(1, 0.2, 24))
    exact, _ = basis_from(x, weight)
    out = x @ weight
    best = (np.linalg.svd(out)[1][:6] ** 2).sum()
    exact, sketch, few = (
        np.square(out @ vectors).sum() / best
        for vectors in (np.asarray(exact.vectors[0, :, :6]), sketched(x, weight, 6), sketched(x, weight, 6, 0))
    )
    assert exact > 1 - 1e-5
    assert sketch <= exact + 1e-6
    assert few < 0.97


def change_of(params, path, layer):
    array = np.asarray(flatten(params)[path][layer], np.float64)
    return array.reshape(matrix(path, layer).shape)


def test_top_and_bottom_ranks_are_removed():
    for rank in (4, 16):
        without_top = remove_ranks(CONFIG, PARAMS, bases("safety"), rank)
        without_bottom = remove_ranks(CONFIG, PARAMS, bases("safety"), rank, top=False)
        for path, layer in ALL:
            W, R = matrix(path, layer), min(matrix(path, layer).shape)
            share = round(R * rank / CONFIG.embed)
            V = np.asarray(flatten(bases("safety"))[path].vectors[layer], np.float64)
            top, rest = V[:, :share], V[:, : R - share]
            np.testing.assert_allclose(change_of(without_top, path, layer), W - W @ top @ top.T, atol=1e-5)
            np.testing.assert_allclose(change_of(without_bottom, path, layer), W @ rest @ rest.T, atol=1e-5)
    for name in ("embed", "norm"):
        assert without_top[name] is PARAMS[name] or np.array_equal(without_top[name], PARAMS[name])


@pytest.mark.parametrize(("r_s", "r_u"), [(28, 20), (0, 32), (16, 4), (32, 32)])
def test_orthogonal_projection_is_the_papers_formula(r_s, r_u):
    """In the paper's orientation: W - (I - P_u) P_s W with W [O, I]."""
    found = remove_orthogonal(CONFIG, PARAMS, bases("safety"), bases("utility"), r_s, r_u)
    for path, layer in ALL:
        W, R = matrix(path, layer).T, min(matrix(path, layer).shape)
        P = []
        for which, r in (("safety", r_s), ("utility", r_u)):
            V = np.asarray(flatten(bases(which))[path].vectors[layer, :, : round(R * (32 - r) / 32)], np.float64)
            P.append(V @ V.T)
        want = W - (np.eye(len(W)) - P[1]) @ P[0] @ W
        np.testing.assert_allclose(change_of(found, path, layer).T, want, atol=2e-5, err_msg=path)
        lost = np.linalg.matrix_rank(want - W, tol=1e-4)
        assert lost <= removed_ranks(CONFIG, r_s, r_u)[path] <= R


def test_nothing_is_removed_where_utility_takes_every_rank():
    whole = remove_orthogonal(CONFIG, PARAMS, bases("safety"), bases("utility"), 0, 0)
    for path, layer in ALL:
        I, O = matrix(path, layer).shape
        if O <= I:  # all ranks span the output space
            np.testing.assert_allclose(change_of(whole, path, layer), matrix(path, layer), atol=1e-5)


def test_a_grid_compiles_once():
    for r in (3, 9, 30):
        remove_orthogonal(CONFIG, PARAMS, bases("safety"), bases("utility"), r, r)
        remove_ranks(CONFIG, PARAMS, bases("safety"), r)
    before = remove_orthogonal._cache_size(), remove_ranks._cache_size()
    remove_orthogonal(CONFIG, PARAMS, bases("safety"), bases("utility"), 17, 5)
    remove_ranks(CONFIG, PARAMS, bases("safety"), 17)
    assert (remove_orthogonal._cache_size(), remove_ranks._cache_size()) == before


def test_kept_ranks_are_those_of_the_paper_and_shares_elsewhere():
    wide = tiny_config(embed=4096, heads=32, kv_heads=8, head_dim=128, mlp=11008)
    assert kept(wide, 4096, 4090) == 6 and kept(wide, 4096, 0) == 4096 and kept(wide, 4096, 4096) == 0
    assert kept(wide, 1024, 4000) == 24
    assert removed_ranks(wide, 4090, 4000)["layers/q"] == 6
    assert removed_ranks(wide, 4000, 50)["layers/down"] == 50


def test_similarity_is_one_for_the_same_span_and_that_of_the_definition():
    same = subspace_similarity(bases("safety"), bases("safety"), 5)
    for value in same.values():
        np.testing.assert_allclose(value, 1, atol=1e-4)
    found = subspace_similarity(bases("safety"), bases("utility"), 5)
    for path, layer in ALL:
        a, b = (np.asarray(flatten(bases(w))[path].vectors[layer, :, :5], np.float64) for w in ("safety", "utility"))
        np.testing.assert_allclose(found[path][layer], np.linalg.norm(a.T @ b) ** 2 / 5, atol=1e-5)


def test_ranks_that_end_in_noise_are_counted():
    """Singular values fall by a decade a direction: 1e-3 is told from noise, 1e-4 is not."""
    energy = jnp.asarray(np.stack([10.0 ** (-2.0 * np.arange(32)), np.ones(32)]), jnp.float32)
    bases = {"layers": {name: Basis(jnp.zeros((2, 32, 32)), energy) for name in ("o", "down")}}
    assert [count.tolist() for count in resolved(bases).values()] == [[4, 32]] * 2
    wide = tiny_config(layers=2, embed=32)
    # What is kept is the width less r.
    assert [cut_in_noise(wide, bases, r) for r in (0, 1, 27, 28, 31)] == [0, 0.5, 0.5, 0, 0]


def test_energy_shares_rise_to_one():
    for path, shares in energy_shares(bases("safety")).items():
        assert (np.diff(shares, axis=1) > -1e-6).all(), path
        np.testing.assert_allclose(shares[:, -1], 1, atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 8, 16, 20, 32])
def test_random_directions_lie_in_the_span_and_are_orthonormal(ranks):
    for path, basis in flatten(random_bases(CONFIG, bases("safety"), 1, ranks)).items():
        V, U = (np.asarray(b.vectors[0], np.float64) for b in (basis, flatten(bases("safety"))[path]))
        count = kept(CONFIG, U.shape[1], CONFIG.embed - ranks)
        assert V.shape == U.shape and not V[:, count:].any()
        np.testing.assert_allclose(V[:, :count].T @ V[:, :count], np.eye(count), atol=1e-4)
        np.testing.assert_allclose(U @ (U.T @ V), V, atol=1e-4)
        if 0 < count < U.shape[1] / 2:
            assert np.linalg.norm(U[:, :count].T @ V[:, :count], 2) < 0.99


@pytest.mark.parametrize("ranks", [8, 24])
def test_a_draw_follows_from_its_seed_and_from_the_span_alone(ranks):
    q, rng = "layers/q", np.random.default_rng(0)

    def projection(bases, seed=1):
        V = flatten(random_bases(CONFIG, bases, seed, ranks))[q].vectors
        return np.asarray(V @ V.mT)

    basis = flatten(bases("safety"))[q]
    turn, _ = np.linalg.qr(rng.standard_normal((basis.vectors.shape[2],) * 2))
    turned = jax.tree.map(lambda a: a, bases("safety"))
    turned["layers"]["q"] = Basis(basis.vectors @ turn.astype(np.float32), basis.energy)
    np.testing.assert_allclose(projection(turned), projection(bases("safety")), atol=1e-4)
    assert not np.allclose(projection(bases("safety"), 2), projection(bases("safety")), atol=0.1)


def test_random_directions_prefer_none():
    drawn = [flatten(random_bases(CONFIG, bases("safety"), seed, 8))["layers/q"].vectors for seed in range(200)]
    basis = flatten(bases("safety"))["layers/q"].vectors
    # The mean projection of uniform directions is k / R times the identity.
    met = np.mean([np.square(np.einsum("lor,lok->lrk", basis, V)).sum(2) for V in drawn], axis=0)
    np.testing.assert_allclose(met, 8 / 32, atol=0.06)


def test_the_same_bases_on_eight_devices():
    mesh = parse_mesh("data:4,model:2")
    placed = jax.device_put(PARAMS, shardings(CONFIG, mesh))
    sums = grams(CONFIG, placed, pad_rows(SAFETY))
    found = act_svd(CONFIG, placed, sums)
    for path, basis in flatten(found).items():
        want: Basis = flatten(bases("safety"))[path]
        np.testing.assert_allclose(basis.energy, want.energy, rtol=1e-4, atol=1e-5 * float(want.energy.max()))


@pytest.mark.parametrize(("layers", "share"), [(8, (1, 16, 16)), (3, (3, 4, 8)), (9, (9, 4, 8))])
def test_layers_are_split_over_the_devices(layers, share):
    """By layers where they divide, else by the sides of the directions."""
    mesh = parse_mesh("data:4,model:2")
    rng = np.random.default_rng(0)
    weight, root = (rng.standard_normal((layers, 32, n)).astype(np.float32) for n in (16, 32))
    gram = root @ root.swapaxes(1, 2)
    found, want = by_layers(mesh, basis_of, weight, gram), basis_of(weight, gram)
    assert {shard.data.shape for shard in found.vectors.addressable_shards} == {share}
    np.testing.assert_allclose(found.energy, want.energy, rtol=1e-4)
    np.testing.assert_allclose(np.abs(np.einsum("lok,lok->lk", found.vectors, want.vectors)), 1, atol=1e-3)


def test_the_maps_of_a_device_are_all_that_it_gets():
    """No device ever holds all layers of a map."""
    mesh = parse_mesh("data:4,model:2")
    where = NamedSharding(mesh, PartitionSpec(None, "data", "model"))
    maps, grams = (jax.ShapeDtypeStruct((8, 256, n), jnp.float32, sharding=where) for n in (256, 256))
    compiled = by_layers.lower(mesh, basis_of, maps, grams).compile()
    assert not any(c.kind == "all-gather" for c in collectives(compiled.as_text()))


def test_decompositions_leave_blas_to_the_threads_that_call_it(monkeypatch):
    """And give its threads back."""
    seen = []

    def watched(*given):
        seen.extend(library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas")
        return basis_of(*given)

    monkeypatch.setattr(module, "basis_of", watched)
    with threadpool_limits(3, user_api="blas"):
        act_svd(CONFIG, PARAMS, grams(CONFIG, PARAMS, pad_rows(SAFETY)))
        after = [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]
    assert seen and set(seen) == {1} and set(after) == {3}
