"""Defences and their controls, rewinds against slow references, and numbers over seeds."""

import itertools

import jax
import numpy as np
import pytest
from tiny import random_rows, tiny_config, tiny_params

from jaxsafe.evaluation.attack_settings import setting
from jaxsafe.evaluation.metrics import rate
from jaxsafe.kernels.importance import snip_scores
from jaxsafe.kernels.lora import LoRA
from jaxsafe.kernels.lowrank import act_svd
from jaxsafe.methods.attack_grid import (
    NONE,
    Cell,
    Defence,
    Tuning,
    complied,
    defences,
    difference,
    frozen,
    leading,
    pooled,
    region,
    rewound,
    runs,
    summary,
)
from jaxsafe.methods.brittleness import Material, once
from jaxsafe.methods.fine_tuning import FineTuning, fine_tune_run
from jaxsafe.methods.finetuning_attacks import preset
from jaxsafe.methods.statistics import gather
from jaxsafe.model.weights import flatten, linear_maps

CONFIG = tiny_config()
PARAMS = tiny_params(CONFIG)
TUNED = tiny_params(CONFIG, seed=1)
SIDES = {
    "safety": random_rows([20, 31, 17, 25], behind=[5, 7, 3, 9]),
    "utility": random_rows([24, 30, 22, 41], behind=[14, 9, 12, 21], seed=1),
}
ROWS = random_rows([14, 16, 13, 15, 16, 14], behind=[4, 7, 3, 5, 2, 6])
OUTPUTS = {"q": 32, "k": 16, "v": 16, "o": 32, "gate": 48, "up": 48, "down": 32}
WEIGHTS, RANKS, LAYERS = Defence("weights", (0.3, 0.1)), Defence("ranks", (8,)), Defence("layers", (1, 2))
REGIONS = [Defence(d.part, d.values, random) for d in (WEIGHTS, RANKS, LAYERS) for random in (False, True)]


@pytest.fixture(scope="module")
def material():
    def score(side):
        found = gather("snip", CONFIG, PARAMS, SIDES[side])
        return snip_scores(CONFIG, PARAMS, found.sums, found.n)

    def bases(side):
        return act_svd(CONFIG, PARAMS, gather("gram", CONFIG, PARAMS, SIDES[side]).sums)

    makers = (once(lambda make=make, side=side: make(side)) for make in (score, bases) for side in SIDES)
    return Material(CONFIG, PARAMS, *makers, heads=lambda: [])


def bits(a):
    return np.asarray(a).view(np.uint32)


# The grid


def test_a_grid_of_defences_begins_with_none():
    grid = defences({"weights": ((0.1, 0.2),), "ranks": (4,), "layers": ((0, 2),)}, controls=True, rewinds=True)
    assert grid[0] == NONE and len(grid) == len({d.name for d in grid}) == 1 + 3 * 4
    assert [d.name for d in grid[:5]] == [
        "none",
        "freeze weights q=0.1 p=0.2",
        "freeze random weights q=0.1 p=0.2",
        "rewind weights q=0.1 p=0.2",
        "rewind random weights q=0.1 p=0.2",
    ]
    assert [d.name for d in defences({"ranks": (4,)}, controls=False, rewinds=False)] == ["none", "freeze ranks k=4"]
    for wrong, said in [
        (("heads", (1,)), "part 'heads'"),
        (("weights", (0.1,)), r"takes \('q', 'p'\); got \(0.1,\)"),
        (("nothing", (), True), "neither random nor a rewind"),
    ]:
        with pytest.raises(ValueError, match=said):
            Defence(*wrong)


def test_rewinds_belong_to_the_undefended_run():
    guards = defences({"weights": ((0.1, 0.2),), "ranks": (4,)}, controls=True, rewinds=True)
    tunings = [Tuning("full"), Tuning("lora", LoRA(2), 1e-3)]
    grid = runs([preset("identity_shift")], tunings, guards, (0, 1))
    assert len(grid) == 2 * 2 * 5
    cells = list(itertools.chain(*grid))
    assert len({c.name for c in cells}) == len(cells) == 2 * 2 * 9
    for group in grid:
        assert len({(c.tuning, c.seed) for c in group}) == 1 and not group[0].defence.rewind
        assert all(c.defence.rewind for c in group[1:])
        assert len(group) == (5 if group[0].defence == NONE else 1)
    no_rewinds = runs([preset("identity_shift")], tunings[:1], guards[:3], (0,))
    assert [[c.defence.name for c in group] for group in no_rewinds] == [[d.name] for d in guards[:3]]


# Regions


def test_a_control_keeps_as_much_elsewhere(material):
    for original, control in zip(REGIONS[::2], REGIONS[1::2], strict=True):
        ours, random, other = (region(material, d, s) for d, s in ((original, 0), (control, 0), (control, 5)))
        assert 0 < ours.share < 1 and random.share == pytest.approx(ours.share)
        for path in linear_maps(CONFIG):
            a, b, c = (
                np.asarray(flatten(r.mask if r.mask is not None else r.bases)[path]) for r in (ours, random, other)
            )
            assert a.shape == b.shape
            if original.part == "weights":
                np.testing.assert_array_equal(a.reshape(3, -1).sum(1), b.reshape(3, -1).sum(1))
                assert (a != b).any() and (b != c).any()
            elif original.part == "ranks":
                np.testing.assert_allclose(
                    np.swapaxes(b, 1, 2) @ b, np.broadcast_to(np.eye(b.shape[2]), (3, *[b.shape[2]] * 2)), atol=1e-4
                )
                assert np.abs(a - b).max() > 0.05 and np.abs(b - c).max() > 0.05
            else:
                kept = [np.flatnonzero(m.reshape(3, -1).all(1)) for m in (a, b)]
                assert len(kept[0]) == len(kept[1]) == 1 and kept[0] != kept[1]
    assert region(material, NONE, 0).share == 0
    with pytest.raises(ValueError, match="whole model"):
        region(material, Defence("layers", (0, 3), True), 0)


def test_ranks_are_the_first_of_each_basis(material):
    found = flatten(leading(CONFIG, material.safety_bases(), 8))
    for path, basis in flatten(material.safety_bases()).items():
        # Maps to 16 outputs have half of the ranks and give half of the directions.
        count = 4 if OUTPUTS[path.split("/")[1]] == 16 else 8
        np.testing.assert_array_equal(found[path], np.asarray(basis.vectors)[:, :, :count])
    for k in (0, 33):
        with pytest.raises(ValueError, match="ranks are not between 1 and the model's width, 32"):
            leading(CONFIG, material.safety_bases(), k)


@pytest.mark.parametrize("defence", REGIONS, ids=lambda d: d.name)
def test_rewinding_restores_the_region_and_nothing_else(material, defence):
    kept = region(material, defence, 3)
    ours = flatten(rewound(kept, TUNED, PARAMS))
    for path, after in flatten(TUNED).items():
        before = np.asarray(flatten(PARAMS)[path])
        if path not in linear_maps(CONFIG):
            np.testing.assert_array_equal(bits(ours[path]), bits(after))
        elif kept.mask is not None:
            mask = np.asarray(flatten(kept.mask)[path])
            np.testing.assert_array_equal(bits(ours[path]), np.where(mask, bits(before), bits(after)))
        else:
            U = np.asarray(flatten(kept.bases)[path], np.float64)
            change = (np.asarray(after, np.float64) - before).reshape(3, -1, U.shape[1])
            wanted = np.stack([d - d @ u @ u.T for d, u in zip(change, U, strict=True)])
            np.testing.assert_allclose(ours[path], before + wanted.reshape(before.shape), atol=2e-5)
    assert any((np.asarray(ours[path]) != np.asarray(w)).any() for path, w in flatten(PARAMS).items())
    nothing = rewound(region(material, NONE, 0), TUNED, PARAMS)
    assert all(a is b for a, b in zip(jax.tree.leaves(nothing), jax.tree.leaves(TUNED), strict=True))


@pytest.mark.parametrize("lora", [None, LoRA(4, 16.0)], ids=["full", "lora"])
def test_frozen_regions_stay_in_training(material, lora):
    settings = FineTuning(3, 4, learning_rate=3e-3, weight_decay=0.1, lora=lora, slots=(16, 8))
    for defence in (WEIGHTS, RANKS):
        kept = region(material, defence, 0)
        ours = flatten(fine_tune_run(CONFIG, PARAMS, ROWS, settings, frozen=frozen(kept)))
        for path in linear_maps(CONFIG):
            before = np.asarray(flatten(PARAMS)[path])
            if defence.part == "weights":
                mask = np.asarray(flatten(kept.mask)[path])
                np.testing.assert_array_equal(bits(ours[path])[mask], bits(before)[mask])
                assert (bits(ours[path])[~mask] != bits(before)[~mask]).mean() > 0.95
            else:
                U = np.asarray(flatten(kept.bases)[path], np.float64)
                change = (np.asarray(ours[path], np.float64) - before).reshape(3, -1, U.shape[1])
                assert np.abs(change).max() > 1e-3
                assert max(np.abs(d @ u).max() for d, u in zip(change, U, strict=True)) < 5e-6


# Numbers over seeds


def test_a_pooled_rate_of_one_seed_is_wilsons():
    flags = [[True, False, None, True, False, False]]
    wanted = rate(flags[0])
    found = pooled(flags)
    assert found["seeds"] == [0.4] and (found["n"], found["n_unscored"]) == (5, 1)
    np.testing.assert_allclose([found[k] for k in ("value", "ci_low", "ci_high")], [0.4, wanted.ci_low, wanted.ci_high])


def test_seeds_that_agree_add_nothing():
    one = [True] * 6 + [False] * 14
    alone, many = pooled([one]), pooled([one] * 5)
    np.testing.assert_allclose(many["ci_low"], alone["ci_low"], atol=0.02)
    rng = np.random.default_rng(0)
    apart = pooled([list(map(bool, rng.permutation(one))) for _ in range(5)])
    assert apart["ci_high"] - apart["ci_low"] < 0.7 * (many["ci_high"] - many["ci_low"])
    assert apart["seeds"] == [0.3] * 5


def newcombe(a, b):
    """Newcombe's paired interval (1998, method 10) of two lists of flags, without continuity correction."""
    (p, q), (pl, pu), (ql, qu) = ((np.mean(a), np.mean(b)), *((r.ci_low, r.ci_high) for r in (rate(a), rate(b))))
    x, y = np.array(a, float), np.array(b, float)
    spread = np.sqrt(p * (1 - p) * q * (1 - q))
    phi = max(0.0, np.mean((x - p) * (y - q)) / spread) if spread else 0.0
    low = np.sqrt((p - pl) ** 2 - 2 * phi * (p - pl) * (qu - q) + (qu - q) ** 2)
    high = np.sqrt((q - ql) ** 2 - 2 * phi * (pu - p) * (q - ql) + (pu - p) ** 2)
    return p - q, p - q - low, p - q + high


@pytest.mark.parametrize("seed", range(4))
def test_a_difference_of_one_seed_is_newcombes(seed):
    rng = np.random.default_rng(seed)
    a = [bool(f) for f in rng.random(30) < 0.8]
    b = [f and bool(rng.random() < 0.6) for f in a]
    found = difference([a], [b])
    np.testing.assert_allclose([found[k] for k in ("value", "ci_low", "ci_high")], newcombe(a, b), atol=1e-9)


def test_a_difference_covers_the_truth():
    rng, covered = np.random.default_rng(7), 0
    for _ in range(200):
        hard = rng.random(40)
        draw = [
            [[bool(u < p) for u, p in zip(rng.random(40), np.clip(hard * s, 0, 1), strict=True)] for _ in range(3)]
            for s in (1.4, 0.9)
        ]
        truth = np.mean(np.clip(np.linspace(0, 1, 20001) * 1.4, 0, 1)) - 0.45
        found = difference(*draw)
        covered += found["ci_low"] <= truth <= found["ci_high"]
    assert covered > 184


def test_a_difference_of_the_certain_is_not_certain():
    found = difference([[True] * 10], [[False] * 10])
    assert found["value"] == 1.0 and 0.5 < found["ci_low"] < 0.8 and found["ci_high"] == 1.0
    assert difference([[None]], [[True]])["value"] is None


def test_the_summary_sets_defences_against_none_and_control():
    attack, tuning = preset("identity_shift"), Tuning("full")
    guards = defences({"ranks": (4,)}, controls=True, rewinds=False)
    vanilla = setting("vanilla")

    def line(refused, steps=(5, 10)):
        samples = [{"setting": "vanilla", "harmful": True, "refused": r} for r in refused]
        samples += [{"setting": "vanilla", "harmful": False, "refused": r} for r in (True, False)]
        samples.append({"setting": "other", "harmful": True, "refused": True})
        rest = {"perplexity": 9.0, "fluency": {"answer_perplexity": None, "repetition": 0.5}}
        told = complied(samples, vanilla)
        return {
            "cell": {"share": 0.1, "curve": [{"step": s, "complied": told, **rest} for s in steps]},
            "samples": samples,
        }

    answers = {NONE: [False] * 4, guards[1]: [True, True, True, False], guards[2]: [True, False, None, False]}
    lines = {Cell(attack, tuning, g, s).name: line(answers[g]) for g in guards for s in (0, 1)}
    lines[attack.label] = line([True] * 4, steps=(0,))
    none, ours, control = summary(attack, [tuning], guards, (0, 1), lines)
    assert (none["asr"]["value"], ours["asr"]["value"], control["asr"]["value"]) == (1.0, 0.25, pytest.approx(2 / 3))
    assert "against_none" not in none and "against_control" not in control
    assert ours["against_none"]["value"] == 0.75 and control["against_none"]["value"] == pytest.approx(1 / 3)
    assert ours["against_control"]["control"] == control["defence"]
    assert ours["against_control"]["value"] == pytest.approx(2 / 3 - 0.25)
    assert [(p["step"], p["value"]) for p in ours["curve"]] == [(0, 0.0), (5, 0.25), (10, 0.25)]
    assert none["refusal"]["value"] == 0.5 and none["refusal"]["n"] == 4
    assert (none["perplexity"], none["answer_perplexity"], none["repetition"]) == (9.0, None, 0.5)
