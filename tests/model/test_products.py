import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafe.devices import multiplies_bfloat16
from jaxsafe.model.products import PRODUCT, matrix_products, product, wide_product


def sides(dtype: str, lead: tuple[int, ...] = (3, 5)) -> tuple[jax.Array, jax.Array]:
    """x [*lead, 64] and w [64, 32] of many sizes, in `dtype`."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((*lead, 64)), rng.standard_normal((64, 32)) * np.exp(rng.standard_normal((64, 1)))
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype)


@pytest.mark.parametrize("lead", [(), (7,), (3, 5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_is_the_exact_one_rounded_once(dtype: str, lead: tuple[int, ...]) -> None:
    x, w = sides(dtype, lead)
    y = jax.jit(product)(x, w)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    size = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(w, np.float64))
    half_step = 2.0**-8 * np.abs(exact) if dtype == "bfloat16" else 0.0
    assert y.dtype == dtype and y.shape == (*lead, 32)
    assert np.all(np.abs(np.asarray(y, np.float64) - exact) <= half_step + 2e-6 * size)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_the_exact_ones_rounded_once(dtype: str) -> None:
    x, w = sides(dtype)
    gradient = jnp.asarray(np.random.default_rng(1).standard_normal((3, 5, 32)), dtype)
    dx, dw = jax.jit(lambda x, w: jax.vjp(product, x, w)[1](gradient))(x, w)
    g, x64, w64 = (np.asarray(a, np.float64) for a in (gradient, x, w))
    for got, exact in [(dx, np.einsum("bto,io->bti", g, w64)), (dw, np.einsum("bti,bto->io", x64, g))]:
        assert got.dtype == dtype
        step = (2.0**-8 if dtype == "bfloat16" else 1e-5) * np.abs(exact)
        assert np.all(np.abs(np.asarray(got, np.float64) - exact) <= step + 1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wide_product_and_its_gradients_are_exact_but_for_the_rounded_gradient(dtype: str) -> None:
    x, w = sides(dtype)
    gradient = jnp.asarray(np.random.default_rng(1).standard_normal((3, 5, 32)), jnp.float32)

    def both(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        y, backwards = jax.vjp(wide_product, x, w)
        return y, backwards(gradient)

    y, gradients = jax.jit(both)(x, w)
    g, x64, w64 = (np.asarray(a, np.float64) for a in (gradient.astype(dtype), x, w))
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, x64 @ w64, atol=2e-6 * (np.abs(x64) @ np.abs(w64)).max())
    for got, exact in zip(gradients, (np.einsum("bto,io->bti", g, w64), np.einsum("bti,bto->io", x64, g)), strict=True):
        assert got.dtype == dtype
        step = (2.0**-8 if dtype == "bfloat16" else 1e-5) * np.abs(exact)
        assert np.all(np.abs(np.asarray(got, np.float64) - exact) <= step + 1e-5 * np.abs(exact).max())
    assert not re.search(r"stablehlo.convert .*bf16>\) -> .*f32>", jax.jit(both).lower(x, w).as_text())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_matrix_that_lies_across_gives_the_same_and_a_gradient_that_lies_so(dtype: str) -> None:
    x, w = sides(dtype)
    gradient = jnp.asarray(np.random.default_rng(1).standard_normal((3, 5, 32)), jnp.float32)
    y, backwards = jax.vjp(wide_product, x, w)
    found, found_backwards = jax.vjp(lambda x, w: wide_product(x, w, True), x, w.T)
    np.testing.assert_allclose(found, y, rtol=1e-5, atol=1e-5)
    for ours, wanted in zip(found_backwards(gradient), (backwards(gradient)[0], backwards(gradient)[1].T), strict=True):
        assert ours.dtype == dtype
        ours, wanted = (np.asarray(a, np.float64) for a in (ours, wanted))
        step = (2.0**-7 if dtype == "bfloat16" else 1e-5) * np.abs(wanted)
        assert np.all(np.abs(ours - wanted) <= step + 1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_pairs_and_their_gradients_are_the_exact_ones_rounded_once(dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, w, gradient = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((2, 3, 7, 5), (2, 3, 5, 4), (2, 3, 7, 4)))
    y, backwards = jax.vjp(jax.jit(matrix_products), x, w)
    x64, w64, g = (np.asarray(a, np.float64) for a in (x, w, gradient))
    pairs = [(y, x64 @ w64)]
    pairs += zip(backwards(gradient), (g @ w64.swapaxes(-1, -2), x64.swapaxes(-1, -2) @ g), strict=True)
    for got, exact in pairs:
        assert got.dtype == dtype
        step = (2.0**-8 if dtype == "bfloat16" else 1e-5) * np.abs(exact)
        assert np.all(np.abs(np.asarray(got, np.float64) - exact) <= step + 1e-5 * np.abs(exact).max())


def test_a_backward_pass_may_keep_a_product_in_its_own_dtype() -> None:
    x, w = sides("bfloat16")

    def twice(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sin(jnp.sin(product(x, w))).sum()

    kept = jax.checkpoint(twice, policy=jax.checkpoint_policies.save_only_these_names(PRODUCT))
    residuals = jax.eval_shape(lambda *sides: jax.vjp(kept, *sides)[1], x, w)
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(residuals)]
    assert ((3, 5, 32), jnp.bfloat16) in shapes
    assert all(dtype == jnp.bfloat16 for _, dtype in shapes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_a_weight_is_made_as_the_weight_lies(dtype: str) -> None:
    x, w = sides(dtype)

    def gradient(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.grad(lambda w: jnp.sin(product(x, w)).sum())(w)

    made = re.findall(r"stablehlo.dot_general .* -> tensor<(\d+x\d+)x", jax.jit(gradient).lower(x, w).as_text())
    if jax.default_backend() == "cpu":
        assert "64x32" in made and "32x64" not in made


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of programs for CPUs")
@pytest.mark.skipif(not multiplies_bfloat16(), reason="this processor multiplies no bfloat16")
def test_no_product_of_a_gradient_is_made_in_float32() -> None:
    x, w = jnp.ones((640, 576), jnp.bfloat16), jnp.ones((576, 576), jnp.bfloat16)

    def gradients(x: jax.Array, w: jax.Array) -> tuple[jax.Array, ...]:
        return jax.grad(lambda *sides: jnp.sin(product(*sides)).sum(dtype=jnp.float32), (0, 1))(x, w)

    text = jax.jit(gradients).lower(x, w).compile().as_text()
    types = dict(re.findall(r"%?([\w.\-]+) = (\w+)\[", text)) | dict(re.findall(r"([\w.]+): (\w+)\[", text))
    sides = re.findall(r" dot\(%?([\w.\-]+), %?([\w.\-]+)\)", text)
    assert len(sides) == 3 and all(types[side] == "bf16" for pair in sides for side in pair)
