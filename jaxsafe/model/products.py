"""Products of activations and weights.

Axes: B any leading axes, I inputs, O outputs
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

PRODUCT = "product"
"""What a backward pass may keep: the names of `jax.checkpoint_policies` know products by it."""


def product(x: Float[Array, "*B I"], w: Float[Array, "I O"]) -> Float[Array, "*B O"]:
    """x @ w in the dtype of `x`, named `PRODUCT`; summed in float32 and rounded once."""
    return checkpoint_name(_wide(x, w) if asks_for_float32(x.dtype) else x @ w, PRODUCT)


def asks_for_float32(dtype: jnp.dtype) -> bool:
    """Whether products of this dtype are faster where a float32 result is asked for and rounded afterwards.

    So it is on CPUs, whose products with half-precision results convert both sides first in jax 0.10. Accelerators
    sum in float32 by themselves.
    """
    return jax.default_backend() == "cpu" and dtype in (jnp.bfloat16, jnp.float16)


@jax.custom_vjp
def _wide(x: Float[Array, "*B I"], w: Float[Array, "I O"]) -> Float[Array, "*B O"]:
    return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def _forwards(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _wide(x, w), (x, w)


def _backwards(inputs: tuple[Array, Array], gradient: Float[Array, "*B O"]) -> tuple[Array, Array]:
    """Gradients of both sides; JAX's own rule would multiply a float32 gradient by half-precision weights."""
    x, w = inputs
    rows, columns = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    return _wide(gradient, w.T), _wide(rows.T, columns)


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
