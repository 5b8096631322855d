"""Numbers that the two papers' published functions gave once (`golden/published/make.py`), without their code."""

import functools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafe.evaluation.judges.keyword import judge
from jaxsafe.io.hub import load_hf
from jaxsafe.kernels.lowrank import act_svd, remove_orthogonal, remove_ranks
from jaxsafe.kernels.selection import apply_mask, bottom, set_difference, top
from jaxsafe.kernels.steering import anchor_states, layer_cosines, mean_cosine, unit
from jaxsafe.kernels.sums import Scoring, gather
from jaxsafe.methods.sequential import change_blocks
from jaxsafe.model.weights import hf_view, linear_maps
from jaxsafe.rows import Row, pad_rows

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "published"
ABOUT = json.loads((GOLDEN / "about.json").read_text())
USED = ABOUT["settings"]
ROWS = {side: [Row(tuple(row["tokens"]), row["prompt"] - 1) for row in rows] for side, rows in ABOUT["rows"].items()}
SCORES = ("wanda", "snip")
MODELS = [pytest.param("mha", marks=pytest.mark.slow), "gqa"]


@functools.cache
def model(name):
    return load_hf(GOLDEN / name, dtype="float32")


@functools.cache
def scores(name, kind, side="safety"):
    config, params = model(name)
    return gather(Scoring(kind, batch_size=4), config, params, ROWS[side]).scores(config, params)


def arrays(file, wanted):
    """{"layer.map": array} of what a golden file holds under a name."""
    with np.load(GOLDEN / f"{file}.npz") as held:
        names = [name for name in held.files if name.startswith(f"{wanted}/")]
        assert names
        return {name.partition("/")[2]: held[name] for name in names}


def matrices(config, tree):
    """{"layer.map": [out, in]} of a tree of the linear maps, named as the golden files name them."""
    maps = {"layers": {path.split("/")[1]: tree["layers"][path.split("/")[1]] for path in linear_maps(config)}}
    short = {name: name.removeprefix("model.layers.").removesuffix(".weight") for name in hf_view(config, maps)}
    return {short[name]: np.asarray(array) for name, array in hf_view(config, maps).items()}


def close(got, want, tolerance):
    assert got.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_allclose(got[name], array, rtol=0, atol=tolerance * np.abs(array).max(), err_msg=name)


def same(got, want):
    """The same weights are removed, to the last one."""
    assert got.keys() == want.keys()
    for name, bits in want.items():
        np.testing.assert_array_equal(np.packbits(got[name]), bits, err_msg=name)


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("name", MODELS)
def test_scores(name, kind):
    config, _ = model(name)
    # Their SNIP score is a sum over samples, ours their mean.
    samples = len(ROWS["safety"]) if kind == "snip" else 1
    ours = {key: samples * score for key, score in matrices(config, scores(name, kind)).items()}
    close(ours, arrays(f"{name}_weights", kind), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["bottom", "top"])
@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("name", ["mha", "gqa"])
def test_one_sided_removal_block_by_block(name, kind, direction):
    config, params = model(name)
    choose, share = (bottom, USED["low"]) if direction == "bottom" else (top, USED["high"])

    def prune(config, params, found):
        return apply_mask(params, choose(config, found.scores(config, params), share, per="row"))

    pruned = change_blocks(Scoring(kind, batch_size=4), config, params, ROWS["safety"], prune)
    zeros = {key: weight == 0 for key, weight in matrices(config, pruned).items()}
    same(zeros, arrays(f"{name}_weights", f"{kind}_{direction}"))
    # Scores of the whole model at once choose others: the order is part of what is compared.
    dense = matrices(config, choose(config, scores(name, kind), share, per="row"))
    assert any((dense[key] != mask).any() for key, mask in zeros.items())
    assert all((dense[key] == mask).all() for key, mask in zeros.items() if key.startswith("0."))


@pytest.mark.parametrize("name", MODELS)
def test_set_difference(name):
    config, _ = model(name)
    utility, safety = scores(name, "snip", "utility"), scores(name, "snip")
    mask = set_difference(config, safety=safety, utility=utility, q=USED["q"], p=USED["p"])
    same(matrices(config, mask), arrays(f"{name}_weights", "set_difference"))


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["top_ranks", "bottom_ranks"])
def test_ranks_block_by_block(wanted):
    config, params = model("mha")

    def strip(config, params, found):
        return remove_ranks(config, params, act_svd(config, params, found.sums), USED["rank"], wanted == "top_ranks")

    ours = change_blocks(Scoring("gram", batch_size=4), config, params, ROWS["safety"], strip)
    close(matrices(config, ours), arrays("mha_weights", wanted), 2e-5)


@pytest.mark.slow
def test_orthogonal_ranks_block_by_block():
    config, params = model("mha")
    for layer in range(config.layers):
        grams = {s: gather(Scoring("gram", batch_size=4), config, params, rows).sums for s, rows in ROWS.items()}
        safety, utility = (act_svd(config, params, grams[side]) for side in ("safety", "utility"))
        whole = remove_orthogonal(config, params, safety, utility, USED["rank_neg"], USED["rank_pos"])
        stacks = {name: stack.at[layer].set(whole["layers"][name][layer]) for name, stack in params["layers"].items()}
        params = {**params, "layers": stacks}
    close(matrices(config, params), arrays("mha_weights", "orthogonal"), 2e-5)


def steering_rows(held, name):
    """The prompts of a set, each ending in its instruction's end."""
    ids = [held[f"{name}_{i}"] for i in range(sum(key.startswith(f"{name}_") for key in held))]
    return pad_rows([Row(tuple(row.tolist()), len(row) - 1) for row in ids], length=16)


@pytest.mark.parametrize("name", MODELS)
def test_directions_reference_scores_and_verdicts(name):
    config, params = model(name)
    with np.load(GOLDEN / f"{name}_scans.npz") as file:
        held = dict(file)
    sure = jnp.array([5])
    at_end, changes = zip(
        *(anchor_states(config, params, steering_rows(held, each), sure) for each in ("harmful", "harmless")),
        strict=True,
    )
    directions = unit(at_end[0].mean(0) - at_end[1].mean(0))
    first, stop = ABOUT["scans_settings"]["layer_start"], ABOUT["scans_settings"]["layer_end"]
    read = slice(first, stop)
    np.testing.assert_allclose(directions[read], held["directions"][read], atol=1e-5)
    reference = changes[0].mean(0)
    np.testing.assert_allclose(reference[read], held["reference"][read], atol=2e-5)
    _, tested = anchor_states(config, params, steering_rows(held, "tested"), sure)
    scored = ((np.arange(config.layers) >= first) & (np.arange(config.layers) < stop)).astype(np.float32)
    ours = mean_cosine(layer_cosines(tested.swapaxes(0, 1), reference), jnp.asarray(scored))
    np.testing.assert_allclose(ours, held["scores"], atol=1e-5)
    safe = np.asarray(ours) < ABOUT["scans_settings"]["threshold"]
    np.testing.assert_array_equal(safe, held["taken_for_safe"])
    assert 0 < safe.sum() < len(safe)


@pytest.mark.parametrize("name", ["scans", "wei2024", "wei2024_no_length"])
def test_verdicts_on_answers(name):
    told = [bool(judge(name).rule(answer)) for answer in ABOUT["verdicts"]["answers"]]
    assert told == ABOUT["verdicts"][name]
    assert 0 < sum(told) < len(told)
