"""Selections against stable sorts in NumPy: exact counts, ties, groups, meshes; and what masks do to parameters."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config, tiny_params

from jaxsafe.kernels import selection
from jaxsafe.kernels.selection import (
    PER,
    apply_mask,
    bottom,
    jaccard,
    largest,
    layer_shares,
    magnitude,
    n_of_m,
    random_like,
    random_of_norm,
    random_scores,
    set_difference,
    sparsity,
    tally,
    top,
    weight_difference,
)
from jaxsafe.model.weights import flatten, linear_maps, nest, shapes, shardings
from jaxsafe.parallel import parse_mesh

# Every axis has a length of its own, but for the layers and the key/value heads.
CONFIG = tiny_config(layers=2, embed=4, mlp=10, heads=6, kv_heads=2, head_dim=8)
NAMES = ("q", "k", "v", "o", "gate", "up", "down")
few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10**6)
# How many different values the scores have: 1 makes every one a tie.
levels = st.sampled_from([1, 2, 3, 20, None])
fractions = st.floats(0, 1) | st.sampled_from([0.0, 0.01, 0.29, 0.5, 1.0])


def random_tree(config, seed, distinct=None):
    """Random float32 scores, negative ones among them, of `distinct` values or all different."""
    rng = np.random.default_rng(seed)

    def draw(shape):
        if distinct is None:
            return rng.standard_normal(shape).astype(np.float32)
        return (rng.integers(0, distinct, shape) - distinct // 2).astype(np.float32) * np.float32(0.1)

    return {"layers": {name: draw(shapes(config)["layers"][name].shape) for name in NAMES}}


def matrix(config, name, layer):
    """One layer's array as the matrix [out, in], written out by hand."""
    if name in ("q", "k", "v"):
        return layer.reshape(config.embed, -1).T
    return layer.reshape(-1, config.embed).T if name == "o" else layer.T


def matrices(config, tree):
    """[(name, layer, matrix)] in the order of the table."""
    leaves = {name: np.asarray(leaf) for name, leaf in tree["layers"].items()}
    return [(n, i, matrix(config, n, leaves[n][i])) for n in NAMES if n in leaves for i in range(config.layers)]


def first_of_sorted(values, count, lowest):
    """The flags of the `count` highest or lowest of a flat array, ties to the first."""
    values = values.astype(np.float64)
    order = np.argsort(values if lowest else -values, kind="stable")
    flags = np.zeros(len(values), bool)
    flags[order[:count]] = True
    return flags


def reference(config, tree, fraction, per, lowest=False):
    """{(name, layer): flags [out, in]} by sorting."""
    whole = matrices(config, tree)
    if per == "model":
        flat = np.concatenate([m.ravel() for _, _, m in whole])
        flags = first_of_sorted(flat, int(len(flat) * fraction), lowest)
        parts = np.split(flags, np.cumsum([m.size for _, _, m in whole])[:-1])
        return {(n, i): part.reshape(m.shape) for (n, i, m), part in zip(whole, parts, strict=True)}
    if per == "matrix":
        found = [first_of_sorted(m.ravel(), int(m.size * fraction), lowest).reshape(m.shape) for _, _, m in whole]
    else:
        found = [np.stack([first_of_sorted(r, int(len(r) * fraction), lowest) for r in m]) for _, _, m in whole]
    return {(n, i): flags for (n, i, _), flags in zip(whole, found, strict=True)}


def assert_same(config, mask, expected):
    found = matrices(config, mask)
    assert {(n, i) for n, i, _ in found} == expected.keys()
    for name, layer, flags in found:
        assert flags.dtype == bool
        np.testing.assert_array_equal(flags, expected[name, layer], err_msg=f"{name} of layer {layer}")


# Top and bottom


@pytest.mark.parametrize("per", PER)
@given(seed=seeds, distinct=levels, fraction=fractions)
@few
def test_top_and_bottom_are_those_of_a_stable_sort(per, seed, distinct, fraction):
    tree = random_tree(CONFIG, seed, distinct)
    assert_same(CONFIG, top(CONFIG, tree, fraction, per), reference(CONFIG, tree, fraction, per))
    assert_same(CONFIG, bottom(CONFIG, tree, fraction, per), reference(CONFIG, tree, fraction, per, lowest=True))


@pytest.mark.parametrize("per", PER)
@given(seed=seeds, distinct=levels, pair=st.tuples(fractions, fractions))
@few
def test_a_larger_fraction_selects_more(per, seed, distinct, pair):
    tree, (small, large) = random_tree(CONFIG, seed, distinct), sorted(pair)
    for select in (top, bottom):
        a, b = (select(CONFIG, tree, fraction, per) for fraction in (small, large))
        assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x <= y).all()), a, b)))


@given(seed=seeds, distinct=levels, fraction=fractions)
@few
def test_rows_know_nothing_of_each_other(seed, distinct, fraction):
    tree = random_tree(CONFIG, seed, distinct)
    order = np.random.default_rng(seed).permutation(CONFIG.mlp)
    moved = {"layers": {name: tree["layers"][name][..., order] for name in ("gate", "up")}}
    mask, other = top(CONFIG, tree, fraction, "row"), top(CONFIG, moved, fraction, "row")
    for name in ("gate", "up"):
        np.testing.assert_array_equal(mask["layers"][name][..., order], other["layers"][name])


def test_the_groups_differ():
    tree = random_tree(CONFIG, 0)
    shares = [np.asarray(top(CONFIG, tree, 0.3, per)["layers"]["down"]) for per in PER]
    assert all((a != b).any() for a, b in itertools.combinations(shares, 2))


@pytest.mark.parametrize("per", PER)
def test_every_kind_of_float_keeps_its_place(per):
    rng = np.random.default_rng(0)
    odd = [0.0, -0.0, 1e-45, -1e-45, 1e-39, -1e-39, 3.4e38, -3.4e38, 1.0, np.nextafter(np.float32(1), 2), -1.0]
    tree = jax.tree.map(lambda a: rng.choice(np.array(odd, np.float32), a.shape), random_tree(CONFIG, 0))
    for fraction in (0.1, 0.45, 0.5, 0.55, 0.9):
        assert_same(CONFIG, top(CONFIG, tree, fraction, per), reference(CONFIG, tree, fraction, per))
        assert_same(CONFIG, bottom(CONFIG, tree, fraction, per), reference(CONFIG, tree, fraction, per, lowest=True))


@pytest.mark.parametrize("per", PER)
def test_some_of_the_maps_are_compared_among_themselves(per):
    tree = {"layers": {name: random_tree(CONFIG, 1, 5)["layers"][name] for name in ("down", "o")}}
    assert_same(CONFIG, top(CONFIG, tree, 0.37, per), reference(CONFIG, tree, 0.37, per))


def test_bfloat16_scores_are_compared_as_they_are():
    tree = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), random_tree(CONFIG, 0))
    expected = reference(CONFIG, jax.tree.map(lambda a: np.asarray(a, np.float32), tree), 0.4, "matrix")
    assert_same(CONFIG, top(CONFIG, tree, 0.4), expected)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.75, 1.0])
def test_counts_beyond_int32_are_exact(monkeypatch, share):
    """Fourteen matrices of 2^31 - 1 scores each: half of every one is 0, the rest -1."""
    size = 2**31 - 1
    ones, zeros = (int(selection._key(jnp.float32(x))) for x in (-1, 0))
    higher = size // 2

    def fake(config, scores, threshold, lowest):
        above = (zeros > threshold) * higher + (ones > threshold) * (size - higher)
        ties = (zeros == threshold) * higher + (ones == threshold) * (size - higher)
        return np.full((7, 2), above, np.int32), np.full((7, 2), ties, np.int32)

    monkeypatch.setattr(selection, "tally", fake)
    count = int(14 * size * share)
    found = selection._shares(CONFIG, random_tree(CONFIG, 0), count, lowest=False)
    assert [path.split("/")[1] for path in found] == list(NAMES)
    flat = [int(n) for row in found.values() for n in row]
    assert sum(flat) == count
    # What is left of the count when every zero is taken goes to the -1s, in order.
    left, expected = max(count - 14 * higher, 0), []
    for i in range(14):
        zeros_taken = min(higher, max(count - i * higher, 0))
        expected.append(zeros_taken + min(size - higher, max(left - i * (size - higher), 0)))
    assert flat == expected


def test_another_fraction_compiles_nothing():
    tree = jax.tree.map(jnp.asarray, random_tree(CONFIG, 0))
    for per in PER:
        top(CONFIG, tree, 0.123, per)
    sizes = largest._cache_size(), tally._cache_size()
    for per, fraction in itertools.product(PER, (0, 0.2, 0.9, 1)):
        top(CONFIG, tree, fraction, per)
    assert (largest._cache_size(), tally._cache_size()) == sizes


def test_selection_within_a_compiled_program():
    tree = random_tree(CONFIG, 0)
    mask = jax.jit(lambda scores: bottom(CONFIG, jax.tree.map(jnp.square, scores), 0.3, "row"))(tree)
    assert_same(CONFIG, mask, reference(CONFIG, jax.tree.map(np.square, tree), 0.3, "row", lowest=True))


# n of m


@pytest.mark.parametrize(("n", "m", "lowest"), [(1, 2, True), (2, 4, True), (2, 4, False), (0, 2, True), (2, 2, True)])
def test_n_of_m_is_that_of_sorted_blocks(n, m, lowest):
    config = tiny_config(layers=2, embed=8, mlp=12, heads=6, kv_heads=2, head_dim=2)
    for distinct in (2, 3, None):
        tree = random_tree(config, n + m, distinct)
        expected = {
            (name, layer): np.stack(
                [np.concatenate([first_of_sorted(b, n, lowest) for b in row.reshape(-1, m)]) for row in whole]
            )
            for name, layer, whole in matrices(config, tree)
        }
        assert_same(config, n_of_m(config, tree, n, m, lowest), expected)


def test_blocks_that_do_not_fill_a_map_are_refused():
    with pytest.raises(ValueError, match="'layers/down' has 10 input columns, which blocks of 4 do not fill"):
        n_of_m(CONFIG, random_tree(CONFIG, 0), 2, 4)
    for n, m in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"{n}:{m} selects nothing"):
            n_of_m(CONFIG, random_tree(CONFIG, 0), n, m)


# Refusals


@pytest.mark.parametrize("fraction", [-0.1, 1.01, math.nan, 5])
def test_a_fraction_outside_is_refused(fraction):
    with pytest.raises(ValueError, match=rf"fraction {fraction} does not lie in \[0, 1\]"):
        top(CONFIG, random_tree(CONFIG, 0), fraction)


def test_scores_that_cannot_be_compared_are_refused():
    tree = random_tree(CONFIG, 0)
    tree["layers"]["up"][1, 2, 3] = np.nan
    for select in (lambda: top(CONFIG, tree, 0.5), lambda: n_of_m(CONFIG, tree, 1, 2)):
        with pytest.raises(ValueError, match="the scores of 'layers/up' hold NaN"):
            select()
    with pytest.raises(ValueError, match="per 'column' is not known; use one of row, matrix, model"):
        top(CONFIG, random_tree(CONFIG, 0), 0.5, "column")
    with pytest.raises(ValueError, match="'layers/attn_norm' is no linear map of a block"):
        top(CONFIG, {"layers": {"attn_norm": np.ones((2, 4), np.float32)}}, 0.5)
    with pytest.raises(ValueError, match=r"'layers/o' has shape \(2, 4, 6, 8\); the config asks \(2, 6, 8, 4\)"):
        top(CONFIG, {"layers": {"o": np.ones((2, 4, 6, 8), np.float32)}}, 0.5)


# Meshes


def spread(config, tree, mesh):
    layout = shardings(config, mesh)
    return {"layers": {name: jax.device_put(leaf, layout["layers"][name]) for name, leaf in tree["layers"].items()}}


COLLECTIVE = re.compile(r"= (.+?) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(")


@pytest.mark.parametrize("per", PER)
def test_a_mesh_changes_no_choice_and_gathers_nothing(per):
    config, mesh = tiny_config(layers=2), parse_mesh("data:-1,model:2")
    for distinct in (3, None):
        tree = random_tree(config, 7, distinct)
        placed = spread(config, tree, mesh)
        for select in (top, bottom):
            alone, many = select(config, tree, 0.21, per), select(config, placed, 0.21, per)
            jax.tree.map(np.testing.assert_array_equal, alone, many)
            for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(placed), strict=True):
                assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    counts = {f"layers/{name}": np.full(2, 3, np.int32) for name in NAMES}
    programs = [largest.lower(config, placed, counts, per="row" if per == "row" else "matrix")]
    programs += [tally.lower(config, placed, np.uint32(5), lowest=False)] if per == "model" else []
    for program in programs:
        found = COLLECTIVE.findall(program.compile().as_text())
        assert {kind for _, kind in found} == {"all-reduce"}
        # A sum holds one number a group, of which the rows of gate and up are the most.
        most = max(math.prod(map(int, n.split(","))) for shape, _ in found for n in re.findall(r"\[([\d,]+)\]", shape))
        assert most <= (2 * config.mlp if per == "row" else 2 * 7)


def test_n_of_m_on_a_mesh_gathers_nothing():
    config, mesh = tiny_config(layers=2), parse_mesh("data:-1,model:2")
    tree = random_tree(config, 3, 4)
    placed = spread(config, tree, mesh)
    jax.tree.map(np.testing.assert_array_equal, n_of_m(config, tree, 2, 4), n_of_m(config, placed, 2, 4))
    text = selection._in_blocks.lower(config, placed, jnp.int32(2), 4, True).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text


def test_random_choices_do_not_depend_on_the_mesh():
    config, mesh = tiny_config(layers=2), parse_mesh("data:-1,model:2")
    alone, many = random_scores(config, 5), random_scores(config, 5, mesh)
    jax.tree.map(np.testing.assert_array_equal, alone, many)
    assert many["layers"]["q"].sharding == shardings(config, mesh)["layers"]["q"]
    mask = top(config, alone, 0.1)
    controls = random_like(config, mask, 1), random_like(config, spread(config, mask, mesh), 1)
    jax.tree.map(np.testing.assert_array_equal, *controls)


# Scores and sets


def test_set_difference_is_one_top_without_the_other():
    safety, utility = random_tree(CONFIG, 0, 30), random_tree(CONFIG, 1, 30)
    for per in PER:
        wanted, spared = reference(CONFIG, safety, 0.3, per), reference(CONFIG, utility, 0.4, per)
        expected = {key: wanted[key] & ~spared[key] for key in wanted}
        assert any((expected[key] != wanted[key]).any() for key in wanted)
        assert_same(CONFIG, set_difference(CONFIG, safety, utility, q=0.3, p=0.4, per=per), expected)


def test_scores_without_data():
    params, base = tiny_params(CONFIG, 0), tiny_params(CONFIG, 1)
    scores, differences = magnitude(params), weight_difference(params, base)
    assert list(scores) == list(differences) == ["layers"]
    assert scores["layers"].keys() == differences["layers"].keys() == set(NAMES)
    for name in NAMES:
        w, b = (np.asarray(p["layers"][name], np.float64) for p in (params, base))
        np.testing.assert_array_equal(scores["layers"][name], np.abs(w))
        np.testing.assert_allclose(differences["layers"][name], np.abs(w - b), rtol=1e-6)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(weight_difference(half, base))} == {jnp.dtype("float32")}
    with pytest.raises(ValueError, match=r"'layers/gate' has shape .* the base model has"):
        weight_difference(params, tiny_params(tiny_config(layers=2, embed=4, mlp=8, heads=6, kv_heads=2, head_dim=8)))


def test_random_scores_are_uniform_and_follow_the_seed():
    config = tiny_config()
    one, same, other = (random_scores(config, seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    values = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(one)])
    assert values.min() >= 0 and values.max() < 1
    np.testing.assert_allclose(np.histogram(values, 4, (0, 1))[0] / len(values), 0.25, atol=0.02)
    assert len(np.unique(values)) > 0.99 * len(values)
    assert not any((a == b).all() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_random_weights_of_equal_norm_are_the_first_of_an_order():
    """Against sorting and running sums."""
    params = tiny_params(CONFIG)
    mask, sizes = top(CONFIG, magnitude(params), 0.1), magnitude(params)
    found = random_of_norm(CONFIG, mask, sizes, 3)
    assert sparsity(found) > 0.15, "those of most norm are fewer than random ones"
    for number, path in enumerate(linear_maps(CONFIG)):
        leaf, size = (np.asarray(flatten(tree)[path]).reshape(CONFIG.layers, -1) for tree in (found, sizes))
        drawn = jax.random.bits(jax.random.fold_in(jax.random.key(3), number), flatten(mask)[path].shape)
        order = np.argsort(np.asarray(drawn).reshape(leaf.shape), axis=1)
        energy = np.take_along_axis(size.astype(np.float64) ** 2, order, 1).cumsum(1)
        wanted = np.where(np.asarray(flatten(mask)[path]).reshape(leaf.shape), size, 0).astype(np.float64)
        count = (energy <= np.square(wanted).sum(1, keepdims=True)).sum(1)
        np.testing.assert_array_equal(leaf.sum(1), count)
        for row, places, k in zip(leaf, order, count, strict=True):
            assert row[places[:k]].all()


def test_a_random_mask_has_the_counts_of_its_model():
    mask = top(CONFIG, random_tree(CONFIG, 0), 0.2, "model")
    control, again, other = (random_like(CONFIG, mask, seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, control, again)
    pairs = [matrices(CONFIG, tree) for tree in (mask, control, other)]
    counts = [[flags.sum() for _, _, flags in tree] for tree in pairs]
    assert counts[0] == counts[1] == counts[2] and len(set(counts[0])) > 3
    different = [[(a[2] != b[2]).any() for a, b in zip(*two, strict=True)] for two in itertools.combinations(pairs, 2)]
    assert all(any(row) for row in different)
    part = {"layers": {"up": mask["layers"]["up"]}}
    np.testing.assert_array_equal(random_like(CONFIG, part, 1)["layers"]["up"], other["layers"]["up"])


# Masks


def test_masked_weights_become_zero_or_those_of_the_base_model():
    params, base = tiny_params(CONFIG, 0), tiny_params(CONFIG, 1)
    mask = top(CONFIG, random_tree(CONFIG, 0), 0.3)
    mask = {"layers": {name: mask["layers"][name] for name in ("q", "down")}}
    for other in (None, base):
        out = flatten(apply_mask(params, mask, other))
        assert out.keys() == flatten(params).keys()
        for path, leaf in flatten(params).items():
            if path not in flatten(mask):
                assert out[path] is leaf
                continue
            where, w = (np.asarray(a) for a in (flatten(mask)[path], leaf))
            expected = w.copy()
            expected[where] = 0 if other is None else np.asarray(flatten(other)[path])[where]
            assert where.any() and not where.all()
            np.testing.assert_array_equal(out[path], expected)
    compiled = jax.jit(apply_mask)(params, mask, base)
    jax.tree.map(np.testing.assert_array_equal, compiled, apply_mask(params, mask, base))


def test_masks_keep_the_dtype_and_the_layout_of_the_parameters():
    config, mesh = tiny_config(layers=2, dtype="bfloat16"), parse_mesh("data:-1,model:2")
    params = jax.device_put(tiny_params(config), shardings(config, mesh))
    mask = top(config, random_tree(config, 0), 0.3)
    for base in (None, jax.tree.map(lambda a: a.astype(jnp.float32), params)):
        out = apply_mask(params, jax.tree.map(np.asarray, mask), base)
        for path, leaf in flatten(out).items():
            assert leaf.dtype == jnp.bfloat16, path
            assert leaf.sharding.is_equivalent_to(flatten(params)[path].sharding, leaf.ndim), path


def test_masks_of_other_weights_are_refused():
    params = tiny_params(CONFIG)
    with pytest.raises(ValueError, match=r"the mask holds 'layers/w' of shape .* no such weight"):
        apply_mask(params, nest({"layers/w": np.ones((2, 2), bool)}))
    with pytest.raises(ValueError, match=r"the mask holds 'layers/up' of shape \(2, 2\); .* \(2, 4, 10\)"):
        apply_mask(params, nest({"layers/up": np.ones((2, 2), bool)}))
    with pytest.raises(ValueError, match=r"the mask holds 'layers/up' .* \(3, 32, 48\)"):
        apply_mask(params, nest({"layers/up": np.ones((2, 4, 10), bool)}), tiny_params(tiny_config()))


def test_shares_of_a_mask():
    mask = top(CONFIG, random_tree(CONFIG, 0), 0.2, "model")
    flags = matrices(CONFIG, mask)
    assert sparsity(mask) == sum(f.sum() for _, _, f in flags) / sum(f.size for _, _, f in flags)
    shares = layer_shares(mask)
    assert shares.keys() == set(NAMES)
    for name, layer, f in flags:
        assert shares[name][layer] == f.mean() and shares[name].shape == (2,)
    assert sparsity(jax.tree.map(jnp.zeros_like, mask)) == 0 and sparsity(jax.tree.map(jnp.ones_like, mask)) == 1


def test_jaccard_overlap():
    a, b = (top(CONFIG, random_tree(CONFIG, seed), 0.3, "model") for seed in (0, 1))
    found = jaccard(a, b)
    pairs = list(zip(matrices(CONFIG, a), matrices(CONFIG, b), strict=True))
    for (name, layer, x), (_, _, y) in pairs:
        sets = [set(np.flatnonzero(f).tolist()) for f in (x, y)]
        assert found[name][layer] == len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    nothing = jax.tree.map(jnp.zeros_like, a)
    assert all((row == 1).all() for tree in (jaccard(a, a), jaccard(nothing, nothing)) for row in tree.values())
    assert all((row == 0).all() for row in jaccard(a, nothing).values())
    with pytest.raises(ValueError, match="masks of different maps"):
        jaccard(a, {"layers": {"q": a["layers"]["q"]}})
