"""Products of matrices as a processor makes them fastest, forwards and backwards.

Axes: B any leading axes, n axes that both sides have, I inputs, O outputs, R rows
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

PRODUCT = "product"
"""What a backward pass may keep: the names of `jax.checkpoint_policies` know products by it."""


def product(x: Float[Array, "*B I"], w: Float[Array, "I O"], wide: bool = False) -> Float[Array, "*B O"]:
    """x @ w in the dtype of `x`, or, where `wide`, in float32; named `PRODUCT`. Summed in float32 and rounded once.

    On a CPU it has derivatives in reverse mode alone (`jax.grad`, `jax.vjp`).
    """
    return checkpoint_name(wide_product(x, w) if wide else matrix_products(x, w), PRODUCT)


def matrix_products(x: Float[Array, "*n R I"], w: Float[Array, "*n I O"]) -> Float[Array, "*n R O"]:
    """The product of every pair of matrices, in the dtype of `x`; summed, rounded and differentiated as `product`."""
    return _wide(x, w) if jax.default_backend() == "cpu" else x @ w


def transposed(a: Float[Array, "*n I O"]) -> Float[Array, "*n O I"]:
    """The transpose of every matrix, as a side of a product.

    On a CPU it is laid out anew in half precision, of which jax multiplies natively only what lies row by row.
    """
    if a.dtype.itemsize > 2:
        return a.mT
    by_rows = Layout(tuple(range(a.ndim)))

    def anew(a: Array) -> Array:
        # What `a` follows from is computed before, not entry by entry while it is transposed.
        return with_layout_constraint(jax.lax.optimization_barrier(a).mT, by_rows)

    return jax.lax.platform_dependent(a, cpu=anew, default=lambda a: a.mT)


@jax.custom_vjp
def _wide(x: Float[Array, "*B I"], w: Float[Array, "*n I O"]) -> Float[Array, "*B O"]:
    """x @ w, of one matrix w or of as many as x has, as a CPU does it fastest, forwards and backwards.

    Products with half-precision results convert both sides first in jax 0.10. JAX's own rule makes the gradient of `w`
    transposed, for which XLA transposes that of y together with all that it follows from, element by element.
    """
    return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def _forwards(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _wide(x, w), (x, w)


def _backwards(inputs: tuple[Array, Array], gradient: Float[Array, "*B O"]) -> tuple[Array, Array]:
    """Gradients of both sides; JAX's own rule would multiply a float32 gradient by half-precision weights, too."""
    x, w = inputs
    rows, columns = (x, gradient) if w.ndim > 2 else (_as_matrix(x), _as_matrix(gradient))
    return _wide(gradient, transposed(w)), _wide(transposed(rows), columns)


def _as_matrix(x: Float[Array, "*B I"]) -> Float[Array, "R I"]:
    return x.reshape(-1, x.shape[-1])


_wide.defvjp(_forwards, _backwards)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def wide_product(
    x: Float[Array, "*B I"], w: Float[Array, "I O"] | Float[Array, "O I"], across: bool = False
) -> Float[Array, "*B O"]:
    """x @ w in float32; x @ w.T where w lies `across`, [O, I], as its gradient then does.

    The gradient is rounded to the dtype of `x` and `w`, neither of which is converted for it.
    """
    return jnp.matmul(x, w.T if across else w, preferred_element_type=jnp.float32)


def _wide_forwards(x: Array, w: Array, across: bool) -> tuple[Array, tuple[Array, Array]]:
    return wide_product(x, w, across), (x, w)


def _rounded_backwards(across: bool, inputs: tuple[Array, Array], gradient: Float[Array, "*B O"]) -> tuple[Any, Any]:
    x, w = inputs
    rounded = gradient.astype(x.dtype)
    if not across:
        return _backwards(inputs, rounded)
    return _wide(rounded, w), _wide(transposed(_as_matrix(rounded)), _as_matrix(x))


wide_product.defvjp(_wide_forwards, _rounded_backwards)
