"""The brittleness experiment: what a point removes, its random control, and what both are made from."""

import dataclasses
import json

import numpy as np
import pytest
from tiny import PROMPTS, random_rows, tiny_chat_model, tiny_config, tiny_params

from jaxsafe.evaluation.judges.keyword import judge
from jaxsafe.io.masks import load_scores, save_scores
from jaxsafe.io.store import Store
from jaxsafe.kernels.importance import snip_scores, wanda_scores
from jaxsafe.kernels.lowrank import act_svd, remove_orthogonal
from jaxsafe.kernels.selection import layer_shares, magnitude, sparsity
from jaxsafe.kernels.sums import Scoring, gather
from jaxsafe.methods.attribution_data import (
    OwnAnswers,
    draw,
    kept_count,
    own_answers,
    own_answers_once,
    pairs_from_file,
)
from jaxsafe.methods.brittleness import (
    DENSE,
    METHODS,
    Material,
    Point,
    Protocol,
    ScoreSettings,
    edited,
    family,
    mask_of,
    mean_ranks,
    noise,
    points,
    removed,
)
from jaxsafe.model.weights import flatten, linear_maps

CONFIG = tiny_config()
PARAMS = tiny_params(CONFIG)
SIDES = {
    "safety": random_rows([20, 31, 17, 25], behind=[5, 7, 3, 9]),
    "utility": random_rows([24, 30, 22, 41], behind=[14, 9, 12, 21], seed=1),
}


class Ranked(Material):
    """Material whose heads are ranked by hand."""

    def heads(self):
        return [(0, 1), (2, 3), (1, 0)]


def never(*_, **__):
    raise AssertionError("something was made again")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return dataclasses.replace(tiny_chat_model(tmp_path_factory.mktemp("model")), params=PARAMS)


@pytest.fixture(scope="module")
def material(model, tmp_path_factory):
    return Ranked(model, SIDES.get, Store(tmp_path_factory.mktemp("store")))


def test_a_grid_begins_dense_and_every_point_has_its_controls():
    grid = points({"top": (0.1,), "set_difference": ((0.1, 0.2), (0.3, 0.2))}, controls=2)
    assert grid[0] == DENSE
    assert [p.name for p in grid[1:4]] == [
        "top fraction=0.1",
        *(f"random for top fraction=0.1 seed {i}" for i in (0, 1)),
    ]
    assert len(grid) == 10 and len({p.name for p in grid}) == 10
    assert all(p.original in grid and p.original.control is None for p in grid[1:])
    both = points({"top": (0.1,)}, 2, Protocol(controls_by=("number", "norm")))
    assert [(p.control, p.by) for p in both[2:]] == [(0, "number"), (1, "number"), (0, "norm"), (1, "norm")]
    assert grid[4].parameters == {"q": 0.1, "p": 0.2}
    with pytest.raises(ValueError, match="method 'prune' is not known"):
        Point("prune", (1,))
    with pytest.raises(ValueError, match=r"set_difference takes \('q', 'p'\); got \(0.1,\)"):
        Point("set_difference", (0.1,))


@pytest.mark.parametrize(
    "point",
    [
        Point("set_difference", (0.05, 0.02)),
        Point("top", (0.03,)),
        Point("bottom", (0.5,)),
        Point("n_of_m", (2, 4)),
        Point("heads", (2,)),
    ],
)
def test_a_point_zeroes_its_mask_and_its_control_as_many_elsewhere(material, point):
    for each in (point, Point(point.method, point.values, control=3)):
        params, mask = edited(material, each)
        assert 0 < sparsity(mask) < 0.6
        for path, value in flatten(params).items():
            if path in linear_maps(CONFIG):
                where = np.asarray(flatten(mask)[path])
                assert (np.asarray(value)[where] == 0).all()
                np.testing.assert_array_equal(np.asarray(value)[~where], np.asarray(flatten(PARAMS)[path])[~where])
            else:
                assert value is flatten(PARAMS)[path]
    control = mask_of(material, Point(point.method, point.values, control=3))
    original = mask_of(material, point)
    for path, where in flatten(control).items():
        counts = [np.asarray(m).reshape(CONFIG.layers, -1).sum(1) for m in (where, flatten(original)[path])]
        np.testing.assert_array_equal(*counts)
    assert any(
        (np.asarray(where) != np.asarray(flatten(original)[path])).any() for path, where in flatten(control).items()
    )


@pytest.mark.parametrize(
    "point", [Point("bottom", (0.25,), per="row"), Point("top_ranks", (4,)), Point("orthogonal", (16, 8))]
)
def test_a_point_can_go_block_by_block(model, point, tmp_path):
    made = Material(model, SIDES.get, Store(tmp_path), ScoreSettings("wanda"))
    at_once, point = point, dataclasses.replace(point, sequential=True)
    assert made.follows(point) != made.follows(at_once) and point.name == f"{at_once.name} block by block"
    (new, mask), (plain, _) = (edited(made, each) for each in (point, at_once))
    assert (mask is None) == point.of_ranks
    if mask is not None:
        rows = np.asarray(mask["layers"]["down"]).sum(1)  # [layer, output]
        assert (rows == int(mask["layers"]["down"].shape[1] * 0.25)).all()
    down, other = (np.asarray(p["layers"]["down"]) for p in (new, plain))
    np.testing.assert_allclose(down[0], other[0], atol=1e-5)
    assert np.abs(down[-1] - other[-1]).max() > 1e-3, "the last block did not see what the others lost"
    assert new["embed"] is model.params["embed"]
    # What it removes is known without making it twice.
    found = removed(made, point)
    assert found == (None if mask is None else {"sparsity": sparsity(mask), "layers": found["layers"]})
    assert list(made.held) == ([] if mask is None else [point])
    again, _ = edited(made, point)
    np.testing.assert_array_equal(again["layers"]["down"], new["layers"]["down"])
    assert not made.held


def test_an_orthogonal_point_in_blocks_is_a_loop_over_the_changed_model(material):
    """Against a loop that decomposes the whole, already changed, model anew for every block, by both data sets."""
    point = Point("orthogonal", (16, 8), sequential=True)
    params, scoring = PARAMS, material.settings.scoring("gram")
    for layer in range(CONFIG.layers):
        bases = [act_svd(CONFIG, params, gather(scoring, CONFIG, params, rows).sums) for rows in SIDES.values()]
        changed = remove_orthogonal(CONFIG, params, *bases, 16, 8)
        layers = {name: old.at[layer].set(changed["layers"][name][layer]) for name, old in params["layers"].items()}
        params = {**params, "layers": layers}
    found, _ = edited(material, point)
    for path, wanted in flatten(params).items():
        np.testing.assert_allclose(flatten(found)[path], wanted, atol=2e-4, err_msg=path)
    assert np.abs(np.asarray(found["layers"]["up"] - PARAMS["layers"]["up"])).max() > 0.01


def test_one_sweep_holds_several_protocols(material):
    how = Protocol(by_row=("top",), sequential=("top", "orthogonal"))
    grid = points({"set_difference": ((0.1, 0.2),), "top": (0.1,), "orthogonal": ((16, 8),)}, 1, how)
    assert [p.name for p in grid if p.control is None] == [
        "dense",
        "set difference q=0.1 p=0.2",
        "top fraction=0.1 per row block by block",
        "orthogonal r_s=16 r_u=8 block by block",
    ]
    assert all(p.original in grid for p in grid)
    assert len({json.dumps(material.follows(p)) for p in grid}) == len(grid)
    by_row = np.asarray(mask_of(material, Point("top", (0.1,), per="row"))["layers"]["down"]).sum(1)
    by_matrix = np.asarray(mask_of(material, Point("top", (0.1,)))["layers"]["down"]).sum(1)
    assert len(set(by_row.ravel().tolist())) == 1 < len(set(by_matrix.ravel().tolist()))
    for wrong, said in [
        (("heads", (1,), None, "row"), "heads compares no weights per row"),
        (("top", (0.1,), None, "layer"), "per 'layer' is not known"),
        (("set_difference", (0.1, 0.1), None, None, True), "set_difference does not go block by block"),
    ]:
        with pytest.raises(ValueError, match=said):
            Point(*wrong)


@pytest.mark.parametrize("score", ["snip", "wanda"])
def test_scores_can_count_the_change_of_weights(model, material, tmp_path, score):
    (tmp_path / "base").mkdir()
    base = tiny_chat_model(tmp_path / "base", seed=1)
    settings = [ScoreSettings(score, change=change) for change in (False, True)]
    plain, changed = (Material(model, SIDES.get, material.store, how, base=base) for how in settings)
    point = Point("top", (0.1,))
    assert plain.follows(point) != changed.follows(point)
    sums = changed.statistics(score, "safety").sums
    for path, weight in linear_maps(CONFIG).items():
        W, old = (np.asarray(flatten(m.params)[path], np.float64) for m in (model, base))
        if score == "snip":
            importance = np.asarray(flatten(sums)[path], np.float64) / len(SIDES["safety"])
        else:
            inputs = W.reshape(CONFIG.layers, -1).shape[1] // np.prod(W.shape[-len(weight.outputs) :])
            norm = np.sqrt(np.asarray(sums[str(weight.tap)], np.float64) / len(SIDES["safety"]))
            assert norm.shape == (CONFIG.layers, inputs)
            importance = norm.reshape(CONFIG.layers, *W.shape[1 : 1 + len(weight.inputs)], *[1] * len(weight.outputs))
        np.testing.assert_allclose(
            flatten(changed.scores("safety"))[path], np.abs(W - old) * importance, rtol=1e-5, atol=1e-9
        )
    with pytest.raises(ValueError, match=f"score '{score}' of changes needs a base model"):
        Material(model, SIDES.get, material.store, settings[1])


@pytest.mark.parametrize("point", [Point("orthogonal", (16, 8)), Point("top_ranks", (4,)), Point("bottom_ranks", (8,))])
def test_rank_points_lower_the_rank_of_the_change_only(material, point):
    params, mask = edited(material, point)
    assert mask is None and mean_ranks(CONFIG, point) > 0
    control, _ = edited(material, Point(point.method, point.values, control=0))
    for tree in (params, control):
        change = np.asarray(tree["layers"]["gate"][1] - PARAMS["layers"]["gate"][1], np.float64)
        expected = {"orthogonal": 8, "top_ranks": 4, "bottom_ranks": 8}[point.method]
        assert np.linalg.matrix_rank(change, tol=1e-4) == expected
    assert not np.allclose(params["layers"]["gate"], control["layers"]["gate"], atol=1e-4)


@pytest.mark.parametrize(
    "point",
    [
        Point("set_difference", (0.05, 0.02)),
        Point("bottom", (0.25,), per="row", sequential=True),
        Point("top_ranks", (4,)),
        Point("orthogonal", (16, 8)),
    ],
    ids=lambda point: point.name,
)
def test_a_control_of_equal_norm_changes_every_matrix_by_as_much(material, model, tmp_path, point):
    made = Ranked(model, SIDES.get, Store(tmp_path), ScoreSettings("wanda")) if point.sequential else material
    control = dataclasses.replace(point, control=2, by="norm")
    assert control.name == f"random for {point.name}, equal norm seed 2" and control.original == point
    by_number = dataclasses.replace(control, by="number")
    assert made.follows(control) != made.follows(by_number)
    if point.sequential:  # which decides the norm
        assert made.follows(control) != made.follows(dataclasses.replace(control, sequential=False))
    trees = [edited(made, each) for each in (point, control)]
    assert family(control, "snip").endswith(", equal norm") and mean_ranks(CONFIG, control) is None
    for path in linear_maps(CONFIG):
        W = np.asarray(flatten(PARAMS)[path], np.float64).reshape(CONFIG.layers, -1)
        change = [np.asarray(flatten(tree)[path], np.float64).reshape(W.shape) - W for tree, _ in trees]
        ours, random = (np.square(each).sum(1) for each in change)
        if point.of_ranks:
            np.testing.assert_allclose(random, ours, rtol=1e-4, err_msg=path)
        else:
            assert (random <= ours * (1 + 1e-5)).all() and (ours - random < np.square(W).max(1)).all(), path
        assert (np.abs(change[0] - change[1]).max(1)[ours > 0] > 1e-3).all()
    assert (removed(made, control) is None) == point.of_ranks
    with pytest.raises(ValueError, match="a control by 'size' is not known; use one of number, norm"):
        dataclasses.replace(point, by="size")


def test_ranks_that_end_where_the_data_end_are_noise(material):
    """24 safety tokens fill 24 of the 32 directions of a map, and all 16 of keys and values."""
    assert noise(material, Point("top_ranks", (4,))) == noise(material, Point("orthogonal", (16, 8))) == 0
    assert noise(material, Point("orthogonal", (4, 8), sequential=True)) == pytest.approx(5 / 7)
    assert noise(material, Point("bottom_ranks", (4,))) == pytest.approx(5 / 7)
    assert noise(material, Point("orthogonal", (4, 8), 0)) == noise(material, Point("top", (0.1,))) == 0


def test_families_name_the_lines_of_the_plot():
    assert family(Point("set_difference", (0.1, 0.1)), "snip") == "set difference (snip)"
    assert family(Point("set_difference", (0.1, 0.1), 0), "snip") == "random weights"
    assert family(Point("orthogonal", (1, 1)), "snip") == "orthogonal"
    assert family(Point("orthogonal", (1, 1), 0), "snip") == "random ranks"
    assert family(DENSE, "snip") == "dense"


def test_scores_are_those_of_their_sums_and_are_kept(model, material, tmp_path, monkeypatch):
    found = gather(Scoring("snip"), CONFIG, PARAMS, SIDES["utility"])
    for path, wanted in flatten(snip_scores(CONFIG, PARAMS, found.sums, found.n)).items():
        np.testing.assert_array_equal(flatten(material.scores("utility"))[path], wanted)
    assert material.scores("utility") is material.scores("utility")
    wanda = Material(model, SIDES.get, Store(tmp_path), ScoreSettings("wanda", positions="all", batch_size=2))
    found = gather(Scoring("wanda", "all", batch_size=2), CONFIG, PARAMS, SIDES["safety"])
    wanted = flatten(wanda_scores(CONFIG, PARAMS, found.sums, found.n))
    np.testing.assert_array_equal(flatten(wanda.scores("safety"))["layers/q"], wanted["layers/q"])
    monkeypatch.setattr("jaxsafe.io.sums.gather_parts", never)
    Material(model, SIDES.get, material.store).scores("utility")
    with pytest.raises(AssertionError, match="made again"):
        Material(model, SIDES.get, material.store, ScoreSettings(loss="sum")).scores("utility")
    about = material.about_scores("utility")
    save_scores(tmp_path / "scores", CONFIG, material.scores("utility"), about)
    saved, metadata = load_scores(tmp_path / "scores", CONFIG, model.fingerprint())
    assert metadata == about and metadata["n"] == 4
    np.testing.assert_array_equal(saved["layers"]["q"], material.scores("utility")["layers"]["q"])
    by_size = Material(model, never, material.store, ScoreSettings("magnitude"))
    np.testing.assert_array_equal(by_size.scores("safety")["layers"]["q"], magnitude(PARAMS)["layers"]["q"])


def test_heads_are_ranked_once(model, tmp_path, monkeypatch):
    prompts = {"safety": PROMPTS[:3] * 2, "utility": PROMPTS[3:] * 2}
    first = Material(model, never, Store(tmp_path), prompts=prompts)
    assert sorted(first.heads()) == [(layer, head) for layer in range(3) for head in range(4)]
    monkeypatch.setattr("jaxsafe.methods.brittleness.head_accuracies", never)
    assert Material(model, never, Store(tmp_path), prompts=prompts).heads() == first.heads()
    with pytest.raises(AssertionError, match="made again"):
        Material(model, never, Store(tmp_path), ScoreSettings(seed=1), prompts).heads()
    with pytest.raises(ValueError, match="needs prompts for safety and for utility"):
        Material(model, never, Store(tmp_path)).heads()


def test_material_that_makes_no_sense_is_refused(model, tmp_path):
    for change, said in [
        ({"score": "snap"}, "score 'snap' is not known; use one of snip, wanda, magnitude"),
        ({"per": "layer"}, "per 'layer' is not known; use one of row, matrix, model"),
        ({"score": "random", "change": True}, "change goes with score 'snip' or 'wanda', not with 'random'"),
        ({"positions": "answer"}, "positions 'answer' is not known"),
    ]:
        with pytest.raises(ValueError, match=said):
            ScoreSettings(**change)
    with pytest.raises(ValueError, match="score 'weight_difference' needs a base model"):
        Material(model, never, Store(tmp_path), ScoreSettings("weight_difference"))
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="the base model 'tiny' has another architecture than tiny"):
        Material(model, never, Store(tmp_path), base=tiny_chat_model(tmp_path / "other", layers=2))
    in_blocks = Point("top", (0.1,), sequential=True)
    with pytest.raises(ValueError, match="give no base model"):
        edited(Material(model, never, Store(tmp_path), base=model), in_blocks)
    with pytest.raises(ValueError, match="goes with score snip or wanda, not with 'random'"):
        edited(Material(model, never, Store(tmp_path), ScoreSettings("random")), in_blocks)


def test_removed_weights_become_those_of_the_base_model(model, tmp_path):
    (tmp_path / "base").mkdir()
    base = tiny_chat_model(tmp_path / "base", seed=1)
    material = Material(model, never, Store(tmp_path), ScoreSettings("weight_difference"), base=base)
    params, mask = edited(material, Point("top", (0.1,)))
    where = np.asarray(flatten(mask)["layers/up"])
    np.testing.assert_array_equal(
        np.asarray(params["layers"]["up"])[where], np.asarray(base.params["layers"]["up"])[where]
    )
    assert material.follows(Point("top", (0.1,)))["base"] == base.fingerprint()


def test_points_are_variants(material):
    grid = points({"set_difference": ((0.1, 0.2),), "top_ranks": (4,)}, controls=2)
    dense, ours, control, other, ranks, *_ = (point.variant(material, 2) for point in grid)
    assert (dense.name, dense.follows, dense.baseline, dense.control) == ("dense", None, None, None)
    assert (ours.baseline, ours.control, control.control) == ("dense", control.name, None)
    # Its draws are one row of the table.
    assert (ours.group, control.group, other.group) == (ours.name, f"random for {ours.name}", control.group)
    assert dense.about["family"] == "dense" and ours.about["family"] == "set difference (snip)"
    assert ours.about["parameters"] == {"q": 0.1, "p": 0.2} and ours.about["ranks"] is None
    mask = mask_of(material, grid[1])
    assert ours.about["sparsity"] == control.about["sparsity"] == sparsity(mask)
    shares = layer_shares(mask)
    assert removed(material, grid[1])["layers"] == {name: list(share) for name, share in shares.items()}
    assert control.about["control"] and not ours.about["control"]
    assert ranks.about["sparsity"] is None and ranks.about["ranks"] == mean_ranks(CONFIG, grid[4])
    assert len({json.dumps(variant.follows) for variant in (dense, ours, control, other, ranks)}) == 5
    assert grid[1].variant(material, 0).control is None
    # Ranks follow from the safety data alone, and neither from a score nor from a loss.
    assert ranks.follows["data"].keys() == {"safety"} and not {"score", "loss", "per"} & ranks.follows.keys()


def test_own_answers_are_kept_by_the_verdict(tmp_path, monkeypatch):
    model = tiny_chat_model(tmp_path)
    complied = OwnAnswers(judge("wei2024_no_length"), refused=False, answer_tokens=5)
    answered = own_answers(model, PROMPTS, complied)
    assert answered and all(1 <= len(row.ids) - 1 - row.instruction_end <= 5 for row in answered)
    refused = OwnAnswers(judge("wei2024_no_length"), refused=True, answer_tokens=5)
    with pytest.raises(ValueError, match=r"none of the 6 prompts is refused by tiny, judged by wei2024_no_length"):
        own_answers(model, PROMPTS, refused)
    store = Store(tmp_path / "store")

    def stopped(n):
        if n:
            raise KeyboardInterrupt

    by_two = dataclasses.replace(complied, batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        own_answers_once(store, model, PROMPTS, by_two, stopped)
    heard = []
    assert own_answers_once(store, model, PROMPTS, by_two, heard.append) == answered
    assert heard[0] > 0 and sum(heard) == len(PROMPTS) and not list((tmp_path / "store").glob("*.jsonl"))
    monkeypatch.setattr("jaxsafe.methods.attribution_data.own_answers", never)
    assert own_answers_once(store, model, PROMPTS, complied) == answered
    with pytest.raises(AssertionError, match="made again"):
        own_answers_once(store, model, PROMPTS[:4], complied)


def test_an_answer_that_is_cut_is_no_refusal_for_its_few_words(tmp_path):
    prompts, long = ["a", "b", "c", "d"], "word " * 25
    answers = [("Mix flour and water", [9] * 8), ("Oak.", [9] * 3), ("I'm sorry, but", [9] * 8), (long, [9] * 8)]
    kept = OwnAnswers(judge("wei2024"), refused=False, answer_tokens=8)
    # The second ends before the limit, so that its length is the model's doing.
    assert kept.verdicts(prompts, answers) == [False, True, True, False]
    assert OwnAnswers(judge("scans"), False, 8).verdicts(prompts, answers) == [False, False, True, False]
    model, store = tiny_chat_model(tmp_path / "model"), Store(tmp_path / "store")
    by_words = OwnAnswers(judge("wei2024"), refused=False, answer_tokens=5)
    assert kept_count(store, model, PROMPTS, by_words) is None
    rows = own_answers_once(store, model, PROMPTS, by_words)
    # None of the answers has 20 words; all but few are cut.
    assert len(rows) > len(PROMPTS) / 2
    assert kept_count(store, model, PROMPTS, by_words) == len(rows)
    assert kept_count(store, model, PROMPTS[:3], by_words) is None


def test_pairs_come_from_a_file_and_draws_follow_numpy(tmp_path):
    model = tiny_chat_model(tmp_path / "model")
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "response": " no."}) + "\n" for p in PROMPTS))
    rows = pairs_from_file(model, path)
    assert rows == model.tokenizer.rows(PROMPTS, responses=[" no."] * len(PROMPTS))
    raw = pairs_from_file(model, path, raw=True)
    assert raw[0] == model.tokenizer.raw_row(PROMPTS[0], " no.")
    order = np.random.default_rng(3).permutation(len(rows))[:4]
    assert draw(rows, 4, seed=3) == [rows[i] for i in order]
    asked = [{"prompt": [{"role": "user", "content": p}], "response": [" no."]} for p in PROMPTS]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in asked))
    assert pairs_from_file(model, path) == rows
    path.write_text('{"prompt": "why?", "response": [1, 2]}\n')
    with pytest.raises(ValueError, match=r"pairs.jsonl, row 1: 'response' holds a list of 2"):
        pairs_from_file(model, path)
    path.write_text('{"prompt": "why?", "response": ""}\n')
    with pytest.raises(ValueError, match=r"row 1: no response; pairs need the columns prompt and response"):
        pairs_from_file(model, path)


def test_methods_take_the_numbers_they_name():
    assert METHODS["orthogonal"] == ("r_s", "r_u") and METHODS["set_difference"] == ("q", "p")
