"""The brittleness experiment: what a point removes, its random control, and a run from pairs to report and export."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from tiny import PROMPTS, random_rows, tiny_chat_model, tiny_config, tiny_params

from configs.brittleness.smollm2_135m import get_config
from jaxsafe.evaluation.attack_settings import setting
from jaxsafe.evaluation.fluency import text_rows
from jaxsafe.evaluation.judges import judge
from jaxsafe.io.chat_model import load_chat_model
from jaxsafe.io.masks import load_mask
from jaxsafe.kernels.importance import snip_scores, wanda_scores
from jaxsafe.kernels.lowrank import act_svd
from jaxsafe.kernels.selection import sparsity
from jaxsafe.methods.attribution_data import draw, own_answers, pairs_from_file
from jaxsafe.methods.brittleness import (
    DENSE,
    METHODS,
    Material,
    Point,
    edited,
    family,
    mask_of,
    mean_ranks,
    once,
    points,
)
from jaxsafe.methods.brittleness_evaluation import Examination, against, examine, refusals
from jaxsafe.methods.sequential import change_blocks
from jaxsafe.methods.statistics import gather
from jaxsafe.model.weights import flatten, linear_maps
from jaxsafe.text.datasets import load_prompts
from launch.brittleness import compared, run
from launch.progress import Clock

CONFIG = tiny_config()
PARAMS = tiny_params(CONFIG)
SIDES = {
    "safety": random_rows([20, 31, 17, 25], behind=[5, 7, 3, 9]),
    "utility": random_rows([24, 30, 22, 41], behind=[14, 9, 12, 21], seed=1),
}


@pytest.fixture(scope="module")
def material():
    def score(side):
        found = gather("snip", CONFIG, PARAMS, SIDES[side])
        return snip_scores(CONFIG, PARAMS, found.sums, found.n)

    def bases(side):
        return act_svd(CONFIG, PARAMS, gather("gram", CONFIG, PARAMS, SIDES[side]).sums)

    return Material(
        CONFIG,
        PARAMS,
        *(once(lambda make=make, side=side: make(side)) for make in (score, bases) for side in SIDES),
        heads=lambda: [(0, 1), (2, 3), (1, 0)],
    )


def test_a_grid_begins_dense_and_every_point_has_its_controls():
    grid = points({"top": (0.1,), "set_difference": ((0.1, 0.2), (0.3, 0.2))}, controls=2)
    assert grid[0] == DENSE
    assert [p.name for p in grid[1:4]] == [
        "top fraction=0.1",
        *(f"random for top fraction=0.1 seed {i}" for i in (0, 1)),
    ]
    assert len(grid) == 10 and len({p.name for p in grid}) == 10
    assert all(p.original in grid and p.original.control is None for p in grid[1:])
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


@pytest.mark.parametrize("point", [Point("bottom", (0.25,)), Point("top_ranks", (4,))])
def test_one_sided_points_can_go_block_by_block(material, point):
    found = gather("wanda", CONFIG, PARAMS, SIDES["safety"])
    at_once = dataclasses.replace(material, safety=lambda: wanda_scores(CONFIG, PARAMS, found.sums, found.n))
    in_turn = dataclasses.replace(
        at_once,
        sequential=lambda kind, change: change_blocks(kind, CONFIG, PARAMS, SIDES["safety"], change),
        score="wanda",
    )
    (new, mask), (plain, _) = (edited(m, point) for m in (in_turn, at_once))
    assert (mask is None) == point.of_ranks
    if mask is not None:
        np.testing.assert_allclose(sparsity(mask), 0.25, atol=0.01)
    down, other = (np.asarray(p["layers"]["down"]) for p in (new, plain))
    np.testing.assert_allclose(down[0], other[0], atol=1e-5)
    assert np.abs(down[-1] - other[-1]).max() > 1e-3, "the last block did not see what the others lost"
    assert new["embed"] is PARAMS["embed"]


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


def test_families_name_the_lines_of_the_plot():
    assert family(Point("set_difference", (0.1, 0.1)), "snip") == "set difference (snip)"
    assert family(Point("set_difference", (0.1, 0.1), 0), "snip") == "random weights"
    assert family(Point("orthogonal", (1, 1)), "snip") == "orthogonal"
    assert family(Point("orthogonal", (1, 1), 0), "snip") == "random ranks"
    assert family(DENSE, "snip") == "dense"


def test_own_answers_are_kept_by_the_verdict(tmp_path):
    model = tiny_chat_model(tmp_path)
    answered = own_answers(model, PROMPTS, judge("wei2024_no_length"), refused=False, answer_tokens=5)
    assert answered and all(1 <= len(row.ids) - 1 - row.instruction_end <= 5 for row in answered)
    with pytest.raises(ValueError, match=r"none of the 6 prompts is refused by tiny, judged by wei2024_no_length"):
        own_answers(model, PROMPTS, judge("wei2024_no_length"), refused=True, answer_tokens=5)


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
    path.write_text('{"prompt": "why?", "response": ""}\n')
    with pytest.raises(ValueError, match=r"row 1: no response; pairs need the columns prompt and response"):
        pairs_from_file(model, path)


def test_examination_counts_every_answer(tmp_path):
    model = tiny_chat_model(tmp_path, context=600)
    harmful = load_prompts("builtin:harmful", split="test").take(5, 0)
    plain = load_prompts("builtin:plain", split="test").take(3, 0)
    texts = text_rows(model, ["a long walk by the river " * 4])
    settings = (setting("vanilla"), setting("decoding"))
    exam = Examination([harmful], [plain], settings, judge("wei2024_no_length"), texts, 6, batch_size=8)
    heard = []
    result, samples = examine(model, model, exam, heard.append)
    assert sum(heard) == exam.size == len(samples) == 5 + 25 + 3
    names = {"asr_wei2024_no_length/vanilla", "refusal_wei2024_no_length/plain"}
    assert names <= result["metrics"].keys() and len(result["metrics"]) == 4
    told = refusals(samples, settings[0])
    assert len(told) == 5
    value = result["metrics"]["asr_wei2024_no_length/vanilla"]["value"]
    assert value == sum(r is False for r in told) / 5
    assert result["perplexity"] > 1 and result["fluency"]["answer_perplexity"] > 1


def test_against_counts_both_directions():
    found = against([True, True, False, None], [False, True, True, True])
    assert (found["stopped_refusing"], found["started_refusing"], found["n"], found["n_unscored"]) == (1, 1, 3, 1)


@pytest.fixture
def config(folder, tmp_path):
    c = get_config()
    pairs = tmp_path / "pairs.csv"
    with pairs.open("w", newline="") as file:
        lines = csv.DictWriter(file, ("prompt", "response"))
        lines.writeheader()
        lines.writerows({"prompt": p, "response": " i will not, friend."} for p in PROMPTS)
    c.model, c.safety_pairs, c.utility_pairs = str(folder), str(pairs), str(pairs)
    c.batch_size, c.max_new_tokens, c.passages = 8, 4, 2
    c.evaluation, c.harmless, c.judge = ("builtin:harmful/test#5",), ("builtin:plain/test#4",), "wei2024"
    c.set_difference, c.orthogonal, c.top, c.similarity_rank = ((0.05, 0.01),), ((16, 16),), (0.1,), 4
    c.data = ""
    return c


@pytest.mark.slow
def test_a_run_leaves_everything_it_names_and_a_second_makes_nothing_again(config, tmp_path, monkeypatch):
    model = load_chat_model(config.model)
    out = tmp_path / "out"
    config.export = "set difference q=0.05 p=0.01"
    record = run(config, model, out, Clock())
    ids = [p["id"] for p in record["points"]]
    assert ids[0] == "dense" and len(ids) == 7
    assert record["points"][1]["against_control"]["control"] == ids[2]
    stored = json.loads((out / "run.json").read_text())
    assert stored["points"] == record["points"]
    assert len((out / "points.jsonl").read_text().splitlines()) == 7
    assert len((out / "samples.jsonl").read_text().splitlines()) == 7 * 9
    for name in ("report.html", "mask.safetensors", "export/model.safetensors"):
        assert (out / name).is_file()
    mask, meta = load_mask(out / "mask.safetensors", model.config)
    assert meta["point"] == config.export
    exported = load_chat_model(out / "export")
    for path, where in flatten(mask).items():
        assert (np.asarray(flatten(exported.params)[path])[np.asarray(where)] == 0).all()
    assert set(stored["overlap"]) == {"jaccard", "similarity"} and stored["energy"]["ranks"][-1] == 32

    def never(*_, **__):
        raise AssertionError("a point was made again")

    monkeypatch.setattr("launch.brittleness.examine", never)
    config.export = ""
    again = run(config, model, out, Clock())
    assert again["points"] == record["points"]
    with (out / "points.jsonl").open("a") as file:
        file.write('{"key": "cut sh')
    assert run(config, model, out, Clock())["points"] == record["points"]
    config.seed = 1
    with pytest.raises(AssertionError, match="made again"):
        run(config, model, out, Clock())


def test_bad_settings_are_refused_before_anything_is_made(config, tmp_path):
    model = load_chat_model(config.model)
    cases = {
        "export": ("no such", "is no point"),
        "score": ("snap", "config.score 'snap' is not known"),
        "settings": (("decoding",), "must begin with one that gives one answer"),
        "evaluation": ((), "config.evaluation is empty"),
        "judge": ("me", "unknown judge"),
    }
    for name, (value, said) in cases.items():
        changed = config.copy_and_resolve_references()
        setattr(changed, name, value)
        with pytest.raises(ValueError, match=said):
            run(changed, model, tmp_path / "out", Clock())
    assert not (tmp_path / "out").exists()
    overlapping = config.copy_and_resolve_references()
    overlapping.safety, overlapping.safety_pairs = ("builtin:harmful/test",), ""
    with pytest.raises(ValueError, match=r"overlap|left to draw"):
        run(overlapping, model, tmp_path / "out", Clock())


def test_comparisons_are_with_dense_and_with_the_control():
    grid = points({"top": (0.1,)}, 1)
    first = setting("vanilla")

    def entry(flags):
        samples = [{"setting": "vanilla", "harmful": True, "refused": f} for f in flags]
        return {"point": {"id": "x"}, "samples": samples}

    flags = {"dense": [True] * 6, grid[1].name: [False] * 6, grid[2].name: [True] * 5 + [False]}
    out = compared(grid, {name: entry(f) for name, f in flags.items()}, first)
    assert out[1]["against_dense"]["stopped_refusing"] == 6
    assert out[1]["against_control"]["stopped_refusing"] == 5
    assert "against_dense" not in out[0] and "against_control" not in out[2]


def test_methods_take_the_numbers_they_name():
    assert METHODS["orthogonal"] == ("r_s", "r_u") and METHODS["set_difference"] == ("q", "p")
