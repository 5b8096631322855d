"""Products of activations and weights.

Axes: B any leading axes, I inputs, O outputs
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

PRODUCT = "product"
"""What a backward pass may keep: the names of `jax.checkpoint_policies` know products by it."""


def product(x: Float[Array, "*B I"], w: Float[Array, "I O"]) -> Float[Array, "*B O"]:
    """x @ w in the dtype of `x`, named `PRODUCT`; summed in float32 and rounded once.

    On a CPU it has derivatives in reverse mode alone (`jax.grad`, `jax.vjp`).
    """
    return checkpoint_name(_wide(x, w) if jax.default_backend() == "cpu" else x @ w, PRODUCT)


def transposed(a: Float[Array, "m n"]) -> Float[Array, "n m"]:
    """a.T, as a side of a product.

    On a CPU it is laid out anew in half precision, of which jax multiplies natively only what lies row by row.
    """
    if a.dtype.itemsize > 2:
        return a.T
    by_rows = Layout((0, 1))
    return jax.lax.platform_dependent(a, cpu=lambda a: with_layout_constraint(a.T, by_rows), default=lambda a: a.T)


@jax.custom_vjp
def _wide(x: Float[Array, "*B I"], w: Float[Array, "I O"]) -> Float[Array, "*B O"]:
    """x @ w as a CPU does it fastest, forwards and backwards.

    Products with half-precision results convert both sides first in jax 0.10. JAX's own rule makes the gradient of `w`
    transposed, for which XLA transposes that of y together with all that it follows from, element by element.
    """
    return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def _forwards(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _wide(x, w), (x, w)


def _backwards(inputs: tuple[Array, Array], gradient: Float[Array, "*B O"]) -> tuple[Array, Array]:
    """Gradients of both sides; JAX's own rule would multiply a float32 gradient by half-precision weights, too."""
    x, w = inputs
    rows, columns = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    return _wide(gradient, transposed(w)), _wide(transposed(rows), columns)


_wide.defvjp(_forwards, _backwards)


@jax.custom_vjp
def wide_product(x: Float[Array, "*B I"], w: Float[Array, "I O"]) -> Float[Array, "*B O"]:
    """x @ w in float32. The gradient is rounded to the dtype of `x` and `w`, neither of which is converted for it."""
    return jnp.matmul(x, w, preferred_element_type=jnp.float32)


def _wide_forwards(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return wide_product(x, w), (x, w)


def _rounded_backwards(inputs: tuple[Array, Array], gradient: Float[Array, "*B O"]) -> tuple[Array, Array]:
    return _backwards(inputs, gradient.astype(inputs[0].dtype))


wide_product.defvjp(_wide_forwards, _rounded_backwards)
