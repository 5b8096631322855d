"""Statistics of a data set: batches, devices, merging, resuming, refusals; and blocks changed one after another."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny import random_rows, tiny_config, tiny_params

from jaxsafe.io.store import Store
from jaxsafe.io.sums import sums_once
from jaxsafe.kernels import sums
from jaxsafe.kernels.blocks import layer_of
from jaxsafe.kernels.forward import capture, embed, run_block
from jaxsafe.kernels.importance import gram_sums, sample_losses, wanda_scores, wanda_sums
from jaxsafe.kernels.likelihood import cross_entropy
from jaxsafe.kernels.lowrank import act_svd, remove_ranks
from jaxsafe.kernels.selection import apply_mask, bottom
from jaxsafe.kernels.sums import KINDS, Scoring, add_batch, gather, gather_parts, merge, nothing
from jaxsafe.kernels.sums import shardings as sum_shardings
from jaxsafe.methods.sequential import change_blocks
from jaxsafe.model.transformer import forward
from jaxsafe.model.weights import count_parameters, flatten, linear_maps, shapes, shardings, sizes, weights
from jaxsafe.parallel import parse_mesh
from jaxsafe.plan.collectives import collectives
from jaxsafe.rows import Row, pad_rows

CONFIG = tiny_config()
PARAMS = tiny_params(CONFIG)
# Lengths of one bucket, so that few shapes are compiled; other lengths are test_importance's.
ROWS = random_rows([33, 41, 37, 45, 48, 34, 43, 39, 42, 38], behind=[5, 7, 3, 9, 11, 4, 6, 2, 1, 3])


def close(got, want, tolerance=2e-5):
    for path, value in flatten(want).items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(
            np.asarray(flatten(got)[path]) / scale, np.asarray(value) / scale, atol=tolerance, err_msg=path
        )


@pytest.mark.parametrize("kind", KINDS)
def test_batches_devices_and_halves_give_the_same_sums(kind):
    whole = gather(Scoring(kind, batch_size=10), CONFIG, PARAMS, ROWS)
    assert whole.n == 10
    small = Scoring(kind, batch_size=4)
    close(gather(small, CONFIG, PARAMS, ROWS).sums, whole.sums)
    halves = [gather(small, CONFIG, PARAMS, rows) for rows in (ROWS[:4], ROWS[4:])]
    assert merge(*halves).n == 10
    close(merge(*halves).sums, whole.sums)
    mesh = parse_mesh("data:4,model:2")
    placed = jax.device_put(PARAMS, shardings(CONFIG, mesh))
    spread = gather(Scoring(kind), CONFIG, placed, ROWS, mesh)
    assert spread.n == 10
    close(jax.device_get(spread.sums), whole.sums)
    for path, leaf in flatten(spread.sums).items():
        parts = 8 if kind != "wanda" else 4 if path in ("attn_in", "mlp_in") else 2  # one axis of features has one side
        assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // parts}, path


BEGINNING = random_rows([24], seed=7)[0].ids
ALIKE = [Row((*BEGINNING, *row.ids), 24 + row.instruction_end) for row in ROWS if len(row.ids) > 40]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", ["response", "all"])
def test_rows_that_begin_alike_have_the_sums_of_each(kind, positions, monkeypatch):
    scoring, shapes = Scoring(kind, positions, batch_size=4), []

    def seen(*args):
        shapes.append((args[3].shared, args[3].tokens.shape))
        return add_batch(*args)

    monkeypatch.setattr(sums, "add_batch", seen)
    ours = gather(scoring, CONFIG, PARAMS, ALIKE)
    joined = positions == "response" and kind != "snip"
    assert shapes == ([(24, (4, 72)), (24, (1, 72))] if joined else [(0, (4, 96)), (0, (1, 96))])
    alone = [gather(scoring, CONFIG, PARAMS, [row]) for row in ALIKE]
    assert {shared for shared, _ in shapes[2:]} == {0}
    close(ours.sums, functools.reduce(merge, alone).sums)


@pytest.mark.parametrize("positions", ["response", "prompt", "all"])
def test_sums_of_a_batch_that_shares_tokens_are_those_of_one_that_does_not(positions):
    own = pad_rows(ALIKE, length=72, shared=24)
    for sums_of in (wanda_sums, gram_sums):
        ours, wanted = (
            sums_of(CONFIG, PARAMS, batch, positions) for batch in (own, dataclasses.replace(own, shared=0))
        )
        close(ours, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_on_a_mesh_goes_on_from_whole_sums(kind):
    mesh, scoring = parse_mesh("data:4,model:2"), Scoring(kind, batch_size=4)
    placed = jax.device_put(PARAMS, shardings(CONFIG, mesh))
    sums = {}
    for part in gather_parts(scoring, CONFIG, placed, ROWS, mesh):
        sums[part.batches] = jax.device_get(part.sums)
    (last,) = gather_parts(scoring, CONFIG, placed, ROWS, mesh, start=(sums[2], 2))
    for a, b in zip(jax.tree.leaves(jax.device_get(last.sums)), jax.tree.leaves(sums[3]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_devices_hold_rows_of_their_own_and_one_layer_of_gathered_weights(kind):
    """Beyond its shares of weights and sums a device has no stack of layers of either, nor activations of all rows."""
    mesh = parse_mesh("data:4,model:2")
    config = dataclasses.replace(CONFIG, layers=16)
    batch, outline = pad_rows(ROWS[:8]), KINDS[kind].outline(config)
    params, sums = (
        jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), *pair)
        for pair in ((shapes(config), shardings(config, mesh)), (outline, sum_shardings(kind, config, mesh)))
    )
    rows = NamedSharding(mesh, PartitionSpec("data"))
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows), batch)
    text = add_batch.lower(Scoring(kind), config, params, batch, sums, 16, mesh).compile().as_text()
    # [L, B, T, F] of all rows holds the features of one place on the data axis: no more than the rows of one.
    widest = max(
        batch.tokens.shape[1] * math.prod(sizes(config, axes))
        for m in linear_maps(config).values()
        for axes in (m.inputs, m.outputs)
    )
    stacks = [tuple(map(int, found)) for found in re.findall(r"f32\[16,8,(\d+),(\d+)\]", text)]
    assert all(slots * features <= widest / 4 for slots, features in stacks)
    weights_bytes = 4 * count_parameters(shapes(config)["layers"])
    gathered = max(c.bytes / c.count for c in collectives(text) if c.kind == "all-gather")
    assert gathered < weights_bytes / config.layers


def test_one_pass_is_the_loop_over_layers():
    """The published loop takes the gradient of one block at a time; all at once gives the same."""
    names = [path.split("/")[1] for path in linear_maps(CONFIG)]
    layers = PARAMS["layers"]

    @jax.jit
    def one_block(layer, batch):
        def loss(maps):
            changed = {name: layers[name].at[layer].set(maps[name]) for name in names}
            logits = forward(CONFIG, {**PARAMS, "layers": {**layers, **changed}}, batch.tokens, batch.valid)
            nll = cross_entropy(logits[:, :-1], batch.tokens[:, 1:])
            return sample_losses(nll, batch, "response", "mean").sum()

        return jax.tree.map(jnp.abs, jax.grad(loss)({name: layers[name][layer] for name in names}))

    loop = {name: np.zeros(layers[name].shape) for name in names}
    for layer in range(CONFIG.layers):
        for row in ROWS:
            for name, gradient in one_block(layer, pad_rows([row], length=48)).items():
                loop[name][layer] += np.asarray(gradient)
    close(gather(Scoring("snip", batch_size=4), CONFIG, PARAMS, ROWS).sums, {"layers": loop})


def test_different_kinds_do_not_merge():
    a, b = (gather(Scoring(kind), CONFIG, PARAMS, ROWS[:2]) for kind in ("wanda", "gram"))
    with pytest.raises(ValueError, match="'wanda' and 'gram' cannot be merged"):
        merge(a, b)


class Stop(Exception):
    pass


@dataclasses.dataclass(frozen=True)
class Model:
    """The tiny model under a name that stands for its fingerprint."""

    name: str = "model"
    config = CONFIG
    params = PARAMS
    mesh = None

    def fingerprint(self):
        return self.name


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_pass_goes_on_and_ends_alike(kind, tmp_path):
    scoring = Scoring(kind, batch_size=2)

    def once(done=lambda n: None, scoring=scoring):
        return sums_once(Store(tmp_path), scoring, Model(), ROWS, done, every=1)

    seen = []

    def interrupt(n):
        seen.append(n)
        if sum(seen) >= 4:
            raise Stop

    with pytest.raises(Stop):
        once(interrupt)
    assert [path.name.rsplit("-", 1)[0] for path in tmp_path.iterdir()] == [f"{kind}-unfinished"]
    heard = []
    resumed = once(heard.append)
    assert sum(heard) == len(ROWS) and heard[0] == 4
    whole = gather(scoring, CONFIG, PARAMS, ROWS)
    for a, b in zip(jax.tree.leaves(resumed.sums), jax.tree.leaves(whole.sums), strict=True):
        np.testing.assert_array_equal(a, b)
    # Finished sums are read, whatever the batches that they would be made in.
    for again in (scoring, Scoring(kind, batch_size=3)):
        heard.clear()
        kept = once(heard.append, again)
        assert heard == [len(ROWS)]
        close(kept.sums, whole.sums, 0)
        assert (kept.kind, kept.n) == (kind, len(ROWS))
    assert [path.name.rsplit("-", 1)[0] for path in tmp_path.iterdir()] == [kind]


def test_other_data_another_model_or_another_scoring_is_scored_anew(tmp_path):
    store, scoring = Store(tmp_path), Scoring("wanda")
    first = sums_once(store, scoring, Model(), ROWS)
    other = sums_once(store, scoring, Model(), ROWS[:5])
    assert other.n == 5
    assert not np.allclose(flatten(first.sums)["attn_in"], flatten(other.sums)["attn_in"])
    heard = []
    sums_once(store, scoring, Model("another model"), ROWS, heard.append)
    sums_once(store, Scoring("wanda", "all"), Model(), ROWS, heard.append)
    assert len(heard) == 4 and len(list(tmp_path.iterdir())) == 4
    # Only SNIP follows from a loss.
    sums_once(store, Scoring("wanda", loss="sum"), Model(), ROWS, heard.append)
    assert heard[4:] == [len(ROWS)]
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        sums_once(store, scoring, Model(), ROWS)


def test_scores_come_from_the_sums_that_score():
    found = gather(Scoring("wanda"), CONFIG, PARAMS, ROWS[:3])
    close(found.scores(CONFIG, PARAMS), wanda_scores(CONFIG, PARAMS, found.sums, 3), 0)
    with pytest.raises(ValueError, match="'gram' score no weights"):
        gather(Scoring("gram"), CONFIG, PARAMS, ROWS[:3]).scores(CONFIG, PARAMS)


def test_bad_rows_are_refused_in_one_line():
    with pytest.raises(ValueError, match="there are no rows to score"):
        gather(Scoring("wanda"), CONFIG, PARAMS, [])
    with pytest.raises(ValueError, match="row 1 has no answer"):
        gather(Scoring("wanda"), CONFIG, PARAMS, [ROWS[0], Row((5, 6, 7), 2)])
    with pytest.raises(ValueError, match="context is 160 tokens"):
        gather(Scoring("wanda"), CONFIG, PARAMS, random_rows([161], behind=[3]))
    with pytest.raises(ValueError, match="'fisher' are not known; use one of snip, wanda, gram"):
        nothing("fisher", CONFIG)
    for wrong, said in [
        ({"kind": "fisher"}, "'fisher' are not known; use one of snip, wanda, gram"),
        ({"positions": "answer"}, "positions 'answer' is not known; use one of response, prompt, all"),
        ({"loss": "median"}, "loss 'median' is not known; use one of mean, sum"),
        ({"batch_size": 0}, "batch_size 0 is not positive"),
    ]:
        with pytest.raises(ValueError, match=said):
            Scoring(**wrong)


@pytest.mark.parametrize("changes", [{}, {"window": 9, "qkv_bias": True, "o_bias": True, "mlp_bias": True}])
def test_block_after_block_is_the_whole_model(changes):
    config = dataclasses.replace(CONFIG, **changes)
    params, batch = tiny_params(config), pad_rows(ROWS[:3])
    whole = capture(config, params, batch.tokens, batch.valid, ("resid", "mlp_hidden"))
    x = embed(config, params, batch.tokens)
    for layer in range(config.layers):
        x, read = run_block(config, layer_of(params, layer), layer, x, batch.valid, ("mlp_hidden",))
        np.testing.assert_allclose(x[batch.valid], whole["resid"][layer][batch.valid], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            read["mlp_hidden"][batch.valid], whole["mlp_hidden"][layer][batch.valid], rtol=1e-5, atol=1e-5
        )


def prune(config, params, statistics):
    """Wanda's removal of the lowest tenth of every row."""
    scores = wanda_scores(config, params, statistics.sums, statistics.n)
    return apply_mask(params, bottom(config, scores, 0.1, per="row"))


def strip(config, params, statistics):
    """The removal of four ranks."""
    return remove_ranks(config, params, act_svd(config, params, statistics.sums), 4)


@pytest.mark.parametrize(("kind", "change"), [("wanda", prune), ("gram", strip)])
def test_each_block_is_scored_on_the_model_as_changed_below(kind, change):
    """Against a loop that scores the whole, already changed, model anew for every block."""
    scoring = Scoring(kind, batch_size=4)
    found = change_blocks(scoring, CONFIG, PARAMS, ROWS, change)
    params = PARAMS
    for layer in range(CONFIG.layers):
        changed = change(CONFIG, params, gather(scoring, CONFIG, params, ROWS))
        layers = jax.tree.map(lambda old, new, i=layer: old.at[i].set(new[i]), params["layers"], changed["layers"])
        params = {**params, "layers": layers}
    at_once = change(CONFIG, PARAMS, gather(scoring, CONFIG, PARAMS, ROWS))
    close(found, params, 1e-4)
    last = np.asarray(found["layers"]["down"][-1])
    assert not np.allclose(last, at_once["layers"]["down"][-1], atol=1e-4)


def test_snip_is_sequential_too():
    heard = []
    found = change_blocks(
        Scoring("snip"),
        CONFIG,
        PARAMS,
        ROWS[:4],
        lambda config, params, s: apply_mask(params, bottom(config, s.sums, 0.2)),
        done=heard.append,
    )
    assert heard == [1] * CONFIG.layers
    for path, value in flatten(found).items():
        zeros = (np.asarray(value) == 0).sum()
        expected = int(value[0].size * 0.2) * CONFIG.layers if "->" in _axes(path) else 0
        assert zeros == expected, path


def _axes(path):
    return weights(CONFIG)[path].axes if path.startswith("layers/") else ""
