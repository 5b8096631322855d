"""Everything that is done to a model works on each family: one tiny random model of each, no word of PyTorch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import logits_of
from families import FAMILY_MODELS
from tiny import random_rows, tiny_params

from jaxsafe.io.hf import save_hf
from jaxsafe.io.hub import load_hf
from jaxsafe.io.masks import load_mask, save_mask
from jaxsafe.kernels import lora
from jaxsafe.kernels.ablation import ablation, orthogonalised
from jaxsafe.kernels.blocks import layer_of
from jaxsafe.kernels.forward import capture, embed, final_states, joined_states, run_block
from jaxsafe.kernels.generate import generate
from jaxsafe.kernels.importance import gram_sums, no_sums, snip_sums, wanda_scores, wanda_sums
from jaxsafe.kernels.likelihood import answer_nll
from jaxsafe.kernels.lowrank import act_svd, remove_ranks
from jaxsafe.kernels.sampling import Decoding
from jaxsafe.kernels.selection import apply_mask, top
from jaxsafe.model.attention import Slots
from jaxsafe.model.families import config_from_hf
from jaxsafe.model.taps import OUTSIDE, TAPS
from jaxsafe.model.transformer import forward
from jaxsafe.model.weights import flatten, linear_maps, shapes, shardings
from jaxsafe.parallel import make_mesh, parse_mesh
from jaxsafe.plan.costs import flops
from jaxsafe.rows import Row, pad_rows

ROWS = random_rows([40, 25, 9], vocab=64, behind=[6, 5, 3])


# Of what each family has, these have something; the others' turn comes with the slow tests.
QUICK = ("gemma3", "phi3")


@pytest.fixture(
    params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILY_MODELS],
    scope="module",
)
def model(request):
    config = config_from_hf(FAMILY_MODELS[request.param])
    return config, tiny_params(config), pad_rows(ROWS)


def test_ablation_is_the_same_in_weights_and_while_running(model, tmp_path):
    config, params, batch = model
    r = jax.random.normal(jax.random.key(3), (config.embed,))
    edits = ablation(config, params, r)
    running = logits_of(config, params, batch.tokens, batch.valid, edits=edits)
    changed, baked = orthogonalised(config, params, r)
    assert not changed.tied
    logits = logits_of(changed, baked, batch.tokens, batch.valid)
    plain = logits_of(config, params, batch.tokens, batch.valid)
    assert np.abs(running - plain)[batch.valid].max() > 0.02
    np.testing.assert_allclose(logits[batch.valid], running[batch.valid], atol=2e-4, rtol=1e-4)
    stream = capture(changed, baked, batch.tokens, batch.valid)["resid"]
    along = jnp.einsum("lbtd,d->lbt", stream, r / jnp.linalg.norm(r)) / jnp.linalg.norm(stream, axis=-1)
    assert np.abs(along[:, batch.valid]).max() < 1e-5
    source = save_hf(tmp_path / "source", config, params)
    again, saved = load_hf(save_hf(tmp_path / "out", changed, baked, like=source))
    assert again == changed
    np.testing.assert_array_equal(logits_of(again, saved, batch.tokens, batch.valid), logits)


def test_block_after_block_is_the_whole_model(model):
    config, params, batch = model
    whole = capture(config, params, batch.tokens, batch.valid, (*TAPS, *OUTSIDE))
    x = embed(config, params, batch.tokens)
    np.testing.assert_allclose(x, whole["embed"], atol=1e-6)
    for layer in range(config.layers):
        x, _ = run_block(config, layer_of(params, layer), layer, x, batch.valid)
        np.testing.assert_allclose(x[batch.valid], whole["resid"][layer][batch.valid], rtol=1e-4, atol=1e-4)
    before = jnp.concatenate([whole["embed"][None], whole["resid"][:-1]])
    np.testing.assert_allclose(whole["resid"], before + whole["attn_out"] + whole["mlp_out"], rtol=1e-4, atol=1e-4)


def test_scores_masks_ranks_and_adapters(model, tmp_path):
    config, params, batch = model
    sums = wanda_sums(config, params, batch)
    grams = gram_sums(config, params, batch)
    assert len(grams) == len(sums)
    for tap, squares in ((tap, squares) for tap, squares in sums.items() if tap in grams):
        np.testing.assert_allclose(jnp.einsum("lff->lf", grams[tap]), squares, rtol=1e-3, atol=1e-4)
    snip = flatten(snip_sums(config, params, batch, no_sums(config)))
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in snip.values())
    mask = top(config, wanda_scores(config, params, sums, 3), 0.1)
    save_mask(tmp_path / "mask.safetensors", config, mask)
    again, _ = load_mask(tmp_path / "mask.safetensors", config)
    jax.tree.map(np.testing.assert_array_equal, again, jax.tree.map(np.asarray, mask))
    fewer = remove_ranks(config, params, act_svd(config, params, grams), 4)
    adapters = lora.init(config, lora.LoRA(2), 0)
    adapters = jax.tree.map(lambda a: a + 0.05, adapters)
    merged = lora.merge_adapters(config, params, adapters, 16.0)
    plain = logits_of(config, params, batch.tokens, batch.valid)
    for other in (apply_mask(params, mask), fewer, merged):
        changed = logits_of(config, other, batch.tokens, batch.valid)
        assert np.isfinite(changed[batch.valid]).all() and np.abs(changed - plain)[batch.valid].max() > 1e-3


def test_sharded_is_equal(model):
    config, params, batch = model
    mesh = parse_mesh("data:-1,model:2")
    placed = jax.device_put(params, shardings(config, mesh))
    np.testing.assert_allclose(
        logits_of(config, placed, batch.tokens, batch.valid)[batch.valid],
        logits_of(config, params, batch.tokens, batch.valid)[batch.valid],
        atol=1e-4,
        rtol=1e-4,
    )


def test_likelihood_is_that_of_the_logits_and_trains(model):
    config, params, batch = model
    nll, counts = answer_nll(config, params, batch)
    logits = jax.nn.log_softmax(logits_of(config, params, batch.tokens, batch.valid)[:, :-1])
    token = -jnp.take_along_axis(logits, batch.tokens[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(nll, jnp.sum(jnp.where(batch.response[:, 1:], token, 0), 1), rtol=1e-4, atol=1e-4)
    gradient = jax.grad(lambda p: answer_nll(config, p, batch)[0].sum())(params)
    for path, leaf in flatten(gradient).items():
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-7, path
    answers = generate(config, params, pad_rows(random_rows([20, 7], vocab=64)), Decoding(4, eos=(-1,)))
    assert answers.tokens.shape == (2, 4) and (counts > 0).all()


def test_a_joined_row_has_the_states_of_its_rows(model):
    config, params, _ = model
    begin = ROWS[0].ids[:24]
    rows = [Row((*begin, *row.ids), 24 + row.instruction_end) for row in ROWS]
    batch = pad_rows(rows, shared=24)
    wanted = final_states(config, params, (batch.tokens, Slots(batch.valid), None))
    valid = batch.valid[:, 24:]
    assert not valid.all()
    np.testing.assert_allclose(joined_states(config, params, batch)[valid], wanted[:, 24:][valid], atol=5e-5)


def test_a_plan_counts_every_layers_window(model):
    config, _, _ = model
    wide = dataclasses.replace(config, window=None, sliding=(), local_rope=None)
    one = make_mesh({"data": 1, "model": 1}, jax.devices()[:1])
    seen = [min(100, window or 100) for window in config.windows]
    attention = 4.0 * 100 * config.heads * config.head_dim
    counted = flops(wide, one, 1, 100, 100, 1) - flops(config, one, 1, 100, 100, 1)
    assert counted == pytest.approx(attention * (100 * config.layers - sum(seen)))


def test_the_program_does_not_grow_with_layers(model):
    config = model[0]

    def instructions(layers):
        each = [(getattr(config, name) * 4)[:layers] for name in ("sliding", "turned")]
        longer = dataclasses.replace(config, layers=layers, sliding=each[0], turned=each[1])
        args = jax.ShapeDtypeStruct((2, 48), "int32"), jax.ShapeDtypeStruct((2, 48), "bool")
        return jax.jit(forward, static_argnums=0).lower(longer, shapes(longer), *args).as_text().count(" = ")

    assert instructions(9) == instructions(6) and set(linear_maps(config))
