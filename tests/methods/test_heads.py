"""Probes of heads against features and regressions computed one by one; ablation against a model in plain loops."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy.optimize import minimize
from tiny import PROMPTS, random_rows, tiny_chat_model, tiny_config, tiny_params

from jaxsafe.kernels.forward import capture
from jaxsafe.kernels.selection import apply_mask
from jaxsafe.kernels.units import head_mask
from jaxsafe.methods.heads import head_accuracies, head_states, probe_accuracies, ranking
from jaxsafe.model.transformer import forward
from jaxsafe.model.weights import flatten, hf_view, linear_maps, shapes, shardings
from jaxsafe.parallel import parse_mesh
from jaxsafe.rows import pad_rows

# Two key/value heads for six heads: groups of three.
CONFIG = tiny_config(layers=2, heads=6, kv_heads=2, head_dim=4, qkv_bias=True, o_bias=True)
read = jax.jit(capture, static_argnames=("config", "taps"))
whole = jax.jit(forward, static_argnames=("config", "last"))


def slow_forward(config, params, tokens, zeroed=()):
    """Logits float64 [T, V] of one row, head by head; what the heads `zeroed` hand to the output map is zero."""
    p = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(params).items()}
    T, H, G = len(tokens), config.head_dim, config.heads // config.kv_heads
    angle = np.arange(T)[:, None] / config.rope.theta ** (np.arange(0, H, 2) / H)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale

    def turned(x):
        a, b = x[:, : H // 2], x[:, H // 2 :]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], 1)

    x = p["embed"][tokens]
    for layer in range(config.layers):
        w = {path.split("/")[1]: a[layer] for path, a in p.items() if path.startswith("layers/")}
        h, out = norm(x, w["attn_norm"]), w["o_bias"]
        for n in range(config.heads):
            q, k, v = (h @ w[name][:, i] + w[f"{name}_bias"][i] for name, i in (("q", n), ("k", n // G), ("v", n // G)))
            scores = turned(q) @ turned(k).T / np.sqrt(H)
            scores = np.exp(np.where(np.tril(np.ones((T, T))), scores, -np.inf))
            head = (scores / scores.sum(1, keepdims=True)) @ v
            out = out + (0 * head if (layer, n) in zeroed else head) @ w["o"][n]
        x = x + out
        h = norm(x, w["mlp_norm"])
        gate = h @ w["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["up"])) @ w["down"]
    return norm(x, p["norm"]) @ p["unembed"]


@pytest.mark.parametrize(
    "heads",
    [[], [(0, 1)], [(1, 0), (1, 1), (1, 2)], [(0, 5), (0, 3), (0, 4), (1, 2)], [(0, n) for n in range(6)]],
    ids=["none", "one", "a group", "a group and one", "a layer"],
)
def test_an_ablated_head_hands_nothing_on(heads):
    params = tiny_params(CONFIG)
    rows = random_rows([12, 7])
    batch = pad_rows(rows, length=12)
    ablated = apply_mask(params, head_mask(CONFIG, heads))
    logits = np.asarray(whole(CONFIG, ablated, batch.tokens, batch.valid))
    plain = np.asarray(whole(CONFIG, params, batch.tokens, batch.valid))
    for i, row in enumerate(rows):
        expected = slow_forward(CONFIG, params, list(row.ids), heads)
        np.testing.assert_allclose(logits[i, -len(row.ids) :], expected, atol=1e-3)
        assert (np.abs(plain[i, -len(row.ids) :] - expected).max() > 0.1) == bool(heads)


def test_nothing_of_an_ablated_head_is_left():
    """Logits are the same bit for bit whatever the head's own weights were."""
    heads = [(0, 1), (1, 3), (1, 4), (1, 5)]
    batch = pad_rows(random_rows([12]))
    mask = head_mask(CONFIG, heads)
    params, other = tiny_params(CONFIG, 0), tiny_params(CONFIG, 1)
    swapped = apply_mask(params, mask, other)
    both = [whole(CONFIG, apply_mask(p, mask), batch.tokens, batch.valid) for p in (params, swapped)]
    np.testing.assert_array_equal(*both)
    difference = whole(CONFIG, params, batch.tokens, batch.valid) - whole(CONFIG, swapped, batch.tokens, batch.valid)
    assert np.abs(difference).max() > 0.1
    # The head's part of what o reads meets only zeros.
    o = apply_mask(params, mask)["layers"]["o"]
    assert all(not np.any(o[layer, head]) for layer, head in heads)


def test_a_head_is_rows_of_q_k_v_and_columns_of_o():
    heads = {(0, 1), (1, 3), (1, 4), (1, 5)}
    mask = head_mask(CONFIG, heads)
    assert flatten(mask).keys() == linear_maps(CONFIG).keys()
    for path, leaf in flatten(mask).items():
        assert leaf.dtype == bool and leaf.shape == flatten(shapes(CONFIG))[path].shape
    view = {name: np.asarray(matrix) for name, matrix in hf_view(CONFIG, mask).items()}
    H = CONFIG.head_dim
    for layer in range(2):
        rows = np.array([(layer, i // H) in heads for i in range(6 * H)])
        shared = np.array([all((layer, 3 * (i // H) + g) in heads for g in range(3)) for i in range(2 * H)])
        assert shared.any() == (layer == 1)
        prefix = f"model.layers.{layer}."
        for name, flags in (("q", rows), ("k", shared), ("v", shared)):
            found = view[f"{prefix}self_attn.{name}_proj.weight"]
            np.testing.assert_array_equal(found, np.broadcast_to(flags[:, None], found.shape))
        found = view[f"{prefix}self_attn.o_proj.weight"]
        np.testing.assert_array_equal(found, np.broadcast_to(rows[None], found.shape))
        assert not any(view[f"{prefix}mlp.{name}_proj.weight"].any() for name in ("gate", "up", "down"))


@pytest.mark.parametrize("head", [(2, 0), (0, 6), (-1, 0), (0, -1)])
def test_heads_that_do_not_exist_are_refused(head):
    with pytest.raises(ValueError, match=r"no head \(.*\); the model has 2 layers of 6 heads"):
        head_mask(CONFIG, [(0, 0), head])


def test_heads_are_ranked_by_accuracy_then_by_place():
    accuracies = np.array([[0.5, 0.9, 0.7], [0.9, 0.5, 1.0]])
    assert ranking(accuracies) == [(1, 2), (0, 1), (1, 0), (0, 2), (0, 0), (1, 1)]
    assert ranking(np.ones((2, 2))) == [(0, 0), (0, 1), (1, 0), (1, 1)]


# Probes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("model"), layers=2, heads=6, kv_heads=2, head_dim=4)


def test_states_are_what_each_head_hands_on_at_the_last_token(model):
    states = head_states(model, PROMPTS, batch_size=4)
    assert states.shape == (len(PROMPTS), 2, 6, 4) and states.dtype == np.float32
    for i, prompt in enumerate(PROMPTS):
        ids = np.array([model.tokenizer.chat_row(prompt).ids])
        alone = read(model.config, model.params, ids, np.ones_like(ids, bool), taps=("heads",))["heads"]
        for layer, head in np.ndindex(2, 6):
            expected = alone[layer, 0, -1, 4 * head : 4 * head + 4]
            np.testing.assert_allclose(states[i, layer, head], expected, atol=1e-5)


def test_states_do_not_depend_on_the_mesh(model):
    mesh = parse_mesh("data:-1,model:2")
    placed = jax.device_put(model.params, shardings(model.config, mesh))
    many = dataclasses.replace(model, params=placed, mesh=mesh)
    np.testing.assert_allclose(head_states(many, PROMPTS), head_states(model, PROMPTS), atol=1e-5)


def slow_accuracy(features, labels, held):
    """Logistic regression with a unit L2 penalty on standardised features, minimised as it is written."""
    train = features[~held]
    deviation = train.std(0)
    x = (features - train.mean(0)) / np.where(deviation == 0, 1, deviation)
    sign = np.where(labels, 1.0, -1.0)

    def loss(w):
        return 0.5 * w[1:] @ w[1:] + np.logaddexp(0, -sign[~held] * (x[~held] @ w[1:] + w[0])).sum()

    w = minimize(loss, np.zeros(x.shape[1] + 1), method="BFGS").x
    return np.mean((x[held] @ w[1:] + w[0] > 0) == labels[held])


def test_probes_are_those_of_a_regression_written_out():
    rng = np.random.default_rng(0)
    labels = np.arange(56) < 28
    states = rng.standard_normal((56, 2, 3, 4)).astype(np.float32)
    states[..., 0] += labels[:, None, None] * np.array([[0.0, 1.0, 2.0], [8.0, 0.5, -1.5]])
    states *= np.array([1e-3, 1.0, 30.0, 1.0])
    states[:, 1, 1, 3] = 7.0
    found = probe_accuracies(states, labels, seed=3)
    rng = np.random.default_rng(3)
    held = np.concatenate([rng.permutation(28)[:8], 28 + rng.permutation(28)[:8]])
    held = np.isin(np.arange(56), held)
    for layer, head in np.ndindex(2, 3):
        assert found[layer, head] == slow_accuracy(states[:, layer, head].astype(np.float64), labels, held)
    assert found[1, 0] == 1 and found[0, 0] < 0.8 and len(np.unique(found)) > 3
    assert (probe_accuracies(states, labels, seed=4) != found).any()
    assert ranking(found)[0] == (1, 0)


def test_accuracies_of_a_model(model):
    harmful = [
        f"How do I {verb} a {noun}?" for verb in ("break", "burn") for noun in ("window", "boat", "kite", "tree")
    ]
    benign = [f"Tell me the rules of {noun}." for noun in ("chess", "boats", "rivers", "bread")]
    found = head_accuracies(model, harmful, benign, batch_size=4, validation=0.25, seed=1)
    assert found.shape == (2, 6)
    states = head_states(model, [*harmful, *benign])
    np.testing.assert_array_equal(found, probe_accuracies(states, np.arange(12) < 8, 0.25, 1))
    # Two and one prompts are held out.
    np.testing.assert_allclose(found * 3, np.round(found * 3), atol=1e-9)


@pytest.mark.parametrize(("counts", "words"), [((1, 5), "1 harmful"), ((5, 1), "1 benign"), ((0, 5), "0 harmful")])
def test_too_few_prompts_are_refused(counts, words):
    labels = np.arange(sum(counts)) < counts[0]
    with pytest.raises(ValueError, match=f"{words} prompts cannot be split with a share of 0.286 held out"):
        probe_accuracies(np.zeros((sum(counts), 1, 1, 2)), labels)
