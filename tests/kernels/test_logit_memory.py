"""No program that reads logits holds those of all slots: asked of XLA's own account of a program's memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import new_cache
from tiny import decoding, random_rows, tiny_config, tiny_params

from jaxsafe.kernels.generate import Generated, prefill_and_decode
from jaxsafe.kernels.importance import no_sums, snip_sums
from jaxsafe.kernels.likelihood import answer_nll, likelihood
from jaxsafe.kernels.sampling import drawing
from jaxsafe.kernels.steering import answer_divergence, steered_nll
from jaxsafe.kernels.training import value_and_gradient
from jaxsafe.model.taps import edit
from jaxsafe.model.transformer import forward
from jaxsafe.rows import pad_rows

ROWS, SLOTS = 4, 1024
CONFIG = tiny_config(layers=1, vocab=8000, context=4096)
ALL_LOGITS = 4 * ROWS * SLOTS * CONFIG.vocab
WHOLE = f"tensor<{ROWS}x{SLOTS}x{CONFIG.vocab}xf32>"
"""How a program's text writes them: a compiler may fuse products of so small a model with what reads them."""
PARAMS = jax.eval_shape(lambda: tiny_params(CONFIG))
BATCH = pad_rows(random_rows([SLOTS] * ROWS, vocab=CONFIG.vocab, behind=[SLOTS - 2] * ROWS))
CACHE = jax.eval_shape(lambda: new_cache(CONFIG, ROWS, 2 * SLOTS))
EDITS = {"resid": edit(add=jnp.ones((CONFIG.layers, CONFIG.embed)))}
ANSWERS = Generated(jnp.zeros((ROWS, SLOTS), jnp.int32), jnp.full(ROWS, SLOTS, jnp.int32))


def training():
    def loss(params, batch):
        return answer_nll(CONFIG, params, batch)[0].sum()

    return jax.jit(functools.partial(value_and_gradient, loss)).lower(PARAMS, BATCH)


def snip():
    step = jax.jit(snip_sums, static_argnums=0)
    return step.lower(CONFIG, PARAMS, BATCH, jax.eval_shape(lambda: no_sums(CONFIG)))


def generation():
    return prefill_and_decode.lower(CONFIG, PARAMS, BATCH, drawing(decoding(8, eos=[1]), np.arange(ROWS)))


PROGRAMS = {
    "loss": lambda: answer_nll.lower(CONFIG, PARAMS, BATCH),
    "training": training,
    "snip": snip,
    "likelihood": lambda: likelihood.lower(CONFIG, PARAMS, BATCH, np.zeros(ROWS, np.int32)),
    "generation": generation,
    "steered loss": lambda: steered_nll.lower(CONFIG, PARAMS, BATCH, CACHE, {}, SLOTS),
    "divergence": lambda: answer_divergence.lower(CONFIG, PARAMS, BATCH, CACHE, (None, EDITS), ANSWERS, 1),
}


def held(lowered):
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("loss", "divergence") else pytest.mark.slow) for n in PROGRAMS]
)
def test_the_logits_of_all_slots_are_never_held(name):
    program = PROGRAMS[name]()
    assert WHOLE not in program.as_text()
    assert held(program) < 0.6 * ALL_LOGITS


def test_a_program_that_holds_them_is_seen():
    def loss(params):
        logits = forward(CONFIG, params, BATCH.tokens, BATCH.valid)
        return jax.nn.logsumexp(jnp.sort(logits, axis=-1), axis=-1).sum()

    program = jax.jit(loss).lower(PARAMS)
    assert WHOLE in program.as_text()
    assert held(program) >= ALL_LOGITS
