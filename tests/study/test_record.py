"""The record of a study against its samples, and its files."""

import dataclasses
import json
import pathlib
import shutil
import subprocess

import exams
import numpy as np
import pytest
from exams import BAD, MIXED, SETTINGS
from tiny import tiny_chat_model

import jaxsafe
from jaxsafe.chat.tokenizer import Tokenizer
from jaxsafe.evaluation.settings import attack_success
from jaxsafe.evaluation.stats import difference, mcnemar, pooled, rate
from jaxsafe.prompts.sets import PromptSet
from jaxsafe.records.run import Data, Difference, Rate, Result, Sample, Variant, read_run, read_samples
from jaxsafe.study.record import data_records, environment, git_revision, model_record, record, table, timed, write_run
from jaxsafe.study.study import Examined, Study

MORE = PromptSet("more", ("how?", "when?"), (True, True), ("time", "time"))
EXAM_SETS = (BAD, MIXED, MORE)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("model"))


def samples_of(name, verdicts, asked="vanilla"):
    """A sample a prompt of the exam, judged by `verdicts`."""
    prompts = [(s.name, *each) for s in EXAM_SETS for each in zip(s.prompts, s.harmful, s.kinds, strict=True)]
    return tuple(
        Sample(name, where, asked, label, kind, prompt, "text", refused)
        for (where, prompt, label, kind), refused in zip(prompts, verdicts, strict=True)
    )


def put(study, variant, verdicts, **numbers):
    """Puts the answers of a variant into a study."""
    samples = samples_of(variant.name, verdicts)
    harmful = [[None if s.refused is None else not s.refused] for s in samples if s.harmful]
    task = Rate(0.75 if variant.name.endswith("1") else 0.5, 0.4, 0.8, 9)
    named = attack_success([harmful], SETTINGS[0], "asr_toy") | {"zero_shot/boolq": task}
    result = Result(variant, "key of " + variant.name, named, **numbers)
    study.examined[variant.name] = Examined(result, samples, study.exam)


DRAWS = {
    name: np.random.default_rng(i).choice([True, False, None], 8, p=[0.5, 0.4, 0.1]).tolist()
    for i, name in enumerate(["plain", "one", "edited 0", "edited 1", "random 0", "random 1"])
}


@pytest.fixture
def study(model, tmp_path):
    """A model as it is, one edit of it, and an edit and its control under two seeds."""
    study = Study(tmp_path, model, exams.quick_exam(model, prompts=EXAM_SETS))
    numbers = {"perplexity": 10.0, "perplexity_tokens": 7, "answer_perplexity": 3.0, "repetition": 0.25}
    put(study, Variant("plain"), DRAWS["plain"], **numbers)
    about = {"share": 0.1, "seed": 4}
    put(study, Variant("one", 1, "plain", about=about), DRAWS["one"], perplexity=None, repetition=0.5)
    for seed in (0, 1):
        more = {"about": {"share": 0.2, "seed": seed}}
        edited = Variant(f"edited {seed}", [2, seed], "plain", f"random {seed}", "edited", **more)
        put(study, edited, DRAWS[edited.name], perplexity=12.0 + 4 * seed, answer_perplexity=[5.0, None][seed])
        random = Variant(f"random {seed}", [3, seed], "plain", None, "random", **more)
        put(study, random, DRAWS[random.name], perplexity=None)
    return study


def flags(names, member):
    """[seed][prompt] of the drawn verdicts of the prompts that are members."""
    which = [member(s) for s in samples_of("", [None] * 8)]
    return [[flag for flag, counts in zip(DRAWS[name], which, strict=True) if counts] for name in names]


SEEDS = {"edited": ["edited 0", "edited 1"], "random": ["random 0", "random 1"], "plain": ["plain"], "one": ["one"]}
MEMBERS = {
    "bad (harmful)": lambda s: s.set == "bad",
    "mixed (safe)": lambda s: s.set == "mixed" and s.harmful is False,
    "mixed (harmful)": lambda s: s.set == "mixed" and s.harmful is True,
    "mixed (no label)": lambda s: s.set == "mixed" and s.harmful is None,
    "more (harmful)": lambda s: s.set == "more",
    "all harmful": lambda s: s.harmful is True,
}


def test_a_row_a_group_in_the_order_of_examination(study):
    rows = table(study)
    assert [(row.group, row.variants) for row in rows] == [
        ("plain", ("plain",)),
        ("one", ("one",)),
        ("edited", ("edited 0", "edited 1")),
        ("random", ("random 0", "random 1")),
    ]
    # The seed is a column where there is one alone.
    assert [row.about for row in rows] == [{}, {"share": 0.1, "seed": 4}, {"share": 0.2}, {"share": 0.2}]
    assert [(row.baseline, row.control) for row in rows] == [
        (None, None),
        ("plain", None),
        ("plain", "random"),
        ("plain", None),
    ]


def test_numbers_that_are_no_rates_are_averaged_over_seeds(study):
    plain, one, edited, random = table(study)
    assert (plain.perplexity, plain.answer_perplexity, plain.repetition) == (10.0, 3.0, 0.25)
    assert (one.perplexity, one.answer_perplexity, one.repetition) == (None, None, 0.5)
    assert (edited.perplexity, edited.answer_perplexity, edited.repetition) == (14.0, 5.0, None)
    assert random.perplexity is None
    # Tasks have no answers to pool: a mean without an interval.
    assert edited.rates["zero_shot/boolq"] == Rate(0.625, None, None, 9)
    assert edited.seeds["zero_shot/boolq"] == (0.5, 0.75)
    assert one.rates["zero_shot/boolq"] == Rate(0.5, 0.4, 0.8, 9)


def test_rates_are_pooled_over_seeds_and_prompts(study):
    for row in table(study):
        names = SEEDS[row.group]
        harmful = flags(names, MEMBERS["all harmful"])
        complied = [[None if f is None else not f for f in seed] for seed in harmful]
        assert row.rates["asr_toy/vanilla"] == pooled(complied)
        assert row.seeds["asr_toy/vanilla"] == tuple(rate(seed).value for seed in complied)
        if len(names) > 1:
            assert row.rates["refusal_toy/bad/harmful"] == pooled(flags(names, MEMBERS["bad (harmful)"]))
            assert row.rates["refusal_toy/mixed/safe"] == pooled(flags(names, MEMBERS["mixed (safe)"]))


def test_every_group_is_held_against_its_baseline_and_control(study):
    rows = {row.group: row for row in table(study)}
    assert not rows["plain"].against_baseline and not rows["plain"].against_control
    assert not rows["random"].against_control and not rows["one"].against_control
    held = [(g, "plain", rows[g].against_baseline) for g in ("one", "edited", "random")]
    held += [("edited", "random", rows["edited"].against_control)]
    for group, other, comparisons in held:
        assert [(c.first, c.second) for c in comparisons] == [(other, group)] * len(MEMBERS)
        assert [c.label for c in comparisons] == list(MEMBERS)
        for c in comparisons:
            a, b = (flags(SEEDS[name], MEMBERS[c.label]) for name in (other, group))
            assert (c.first_rate, c.second_rate, c.difference) == (pooled(a), pooled(b), difference(a, b))
            assert (c.set is None) == (c.label == "all harmful")


def test_mcnemars_test_is_made_where_both_sides_have_one_seed(study):
    rows = {row.group: row for row in table(study)}
    for c in rows["one"].against_baseline:
        wanted = mcnemar(*(flags([name], MEMBERS[c.label])[0] for name in ("plain", "one")))
        assert (c.p_value, c.stopped_refusing, c.started_refusing) == (wanted.p_value, wanted.fixed, wanted.broken)
        assert (c.n, c.n_unscored) == (wanted.n, wanted.n_unscored)
    assert {c.p_value for c in (*rows["edited"].against_baseline, *rows["edited"].against_control)} == {None}
    both = rows["edited"].against_control[-1]
    pairs = [
        pair
        for first, second in (("random 0", "edited 0"), ("random 1", "edited 1"))
        for pair in zip(*(flags([name], MEMBERS["all harmful"])[0] for name in (first, second)), strict=True)
    ]
    assert (both.stopped_refusing, both.started_refusing) == (pairs.count((True, False)), pairs.count((False, True)))
    assert both.n + both.n_unscored == len(pairs) == 12


def test_kinds_are_told_apart_by_group(study):
    edited = {row.group: row for row in table(study)}["edited"]
    by_label = {c.label: c.by_kind for c in edited.against_baseline}
    # "bad" has prompts of one kind and of none; of the sets together there are two kinds.
    assert [kind.kind for kind in by_label["bad (harmful)"]] == ["food"]
    assert [kind.kind for kind in by_label["all harmful"]] == ["food", "time"]
    assert by_label["more (harmful)"] == ()
    food, time = by_label["all harmful"]
    for kind, member in ((food, lambda s: s.kind == "food"), (time, lambda s: s.kind == "time")):
        assert kind.first == pooled(flags(["plain"], member))
        assert kind.second == pooled(flags(SEEDS["edited"], member))


def test_one_set_of_harmful_prompts_is_not_compared_twice(model, tmp_path):
    study = Study(tmp_path, model, exams.quick_exam(model))
    study.examine(Variant("plain", 0), model)
    study.examine(Variant("again", 1, "plain"), model)
    (safe_set,) = (dataclasses.replace(MIXED, harmful=(False, False, None)),)
    labels = [c.label for c in table(study)[1].against_baseline]
    assert labels[-1] == "all harmful"
    other = Study(tmp_path, model, exams.quick_exam(model, prompts=(BAD, safe_set)))
    other.examine(Variant("plain", 0), model)
    other.examine(Variant("again", 1, "plain"), model)
    row = table(other)[1]
    assert [c.label for c in row.against_baseline] == ["bad (harmful)", "mixed/test (safe)", "mixed/test (no label)"]
    assert all(c.difference.value == 0 for c in row.against_baseline if c.first_rate.n)
    assert all(c.p_value == 1 for c in row.against_baseline)


def test_a_baseline_that_was_not_examined_is_none(model, tmp_path):
    study = Study(tmp_path, model, exams.quick_exam(model, prompts=EXAM_SETS))
    put(study, Variant("one", 1, "plain", "random"), DRAWS["one"])
    (row,) = table(study)
    assert (row.baseline, row.control, row.against_baseline, row.against_control) == (None, None, (), ())


def test_verdicts_that_are_all_missing_have_no_numbers(model, tmp_path):
    study = Study(tmp_path, model, exams.quick_exam(model, prompts=EXAM_SETS))
    put(study, Variant("plain"), [None] * 8)
    put(study, Variant("one", 1, "plain"), DRAWS["one"])
    for c in table(study)[1].against_baseline:
        assert c.first_rate.value is None and c.difference == Difference(None, None, None)
        assert (c.p_value, c.n) == (1.0, 0)


def test_a_run_is_written_and_read(study, model, tmp_path):
    config = {"share": np.float32(0.5), "sets": ("a", "b"), "text": "größer\u2028 \ud800"}
    run = record(study, "new task", config, data_records({"evaluation": EXAM_SETS}), Difference(0.5, None, 1.0))
    run = timed(run, {"run_s": np.float64(1.5), "exam_s": {"seconds": 2}}, {"samples": "samples.jsonl"})
    assert (run.task, run.seed, run.judge.name, run.judge.version) == ("new task", 3, "toy", "1")
    assert run.config == {"share": 0.5, "sets": ["a", "b"], "text": "größer\u2028 \ufffd"}
    assert run.details == {"value": 0.5, "ci_low": None, "ci_high": 1.0}
    assert run.timings == {"run_s": 1.5, "exam_s": {"seconds": 2}} and run.files == {"samples": "samples.jsonl"}
    assert [result.variant.name for result in run.results] == list(study.examined)
    assert run.model == model_record(model) and run.table == table(study)
    write_run(tmp_path / "run", run, study)
    assert read_run(tmp_path / "run") == run
    assert read_samples(tmp_path / "run") == [s for found in study.examined.values() for s in found.samples]
    assert "edited" in (tmp_path / "run/report.html").read_text()
    assert json.loads((tmp_path / "run/run.json").read_text())["schema"] == 3


def test_answers_that_utf8_cannot_hold_are_written(model, tmp_path):
    study = Study(tmp_path, model, exams.quick_exam(model, prompts=EXAM_SETS))
    put(study, Variant("plain"), DRAWS["plain"])
    found = study.examined["plain"]
    odd = tuple(dataclasses.replace(s, text="half \ud83d of it", prompt="\udc00 why?") for s in found.samples)
    study.examined["plain"] = dataclasses.replace(found, samples=odd)
    write_run(tmp_path / "run", record(study, "task", {}, ()), study)
    samples = read_samples(tmp_path / "run")
    assert {(s.text, s.prompt) for s in samples} == {("half \ufffd of it", "\ufffd why?")} and len(samples) == 8


def test_a_run_that_cannot_be_written_leaves_the_one_before(study, tmp_path):
    with pytest.raises(TypeError, match="object is no value of JSON"):
        record(study, "task", {"x": object()}, ())
    run = record(study, "first", {}, ())
    write_run(tmp_path / "run", run, study)
    with pytest.raises(TypeError):
        write_run(tmp_path / "run", dataclasses.replace(run, config={"x": object()}), study)
    assert read_run(tmp_path / "run") == run
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


def test_a_run_says_where_and_with_what_it_ran():
    found = environment()
    assert found.jaxsafe == jaxsafe.__version__
    assert found.device.startswith("8 x cpu")


def test_the_revision_is_that_of_the_repository(monkeypatch, tmp_path):
    root = pathlib.Path(jaxsafe.__file__).parents[1]
    if (root / ".git").exists():
        wanted = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
        assert wanted.startswith(git_revision().removesuffix("+"))
    # A copy that no repository knows has no revision.
    package = tmp_path / "jaxsafe"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.setattr(jaxsafe, "__file__", str(package / "__init__.py"))
    assert git_revision() is None
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert git_revision() is None


def test_records_of_model_and_data(model):
    assert dataclasses.asdict(model_record(model)) == {
        "name": "tiny",
        "sha256": model.config_sha256(),
        "fingerprint": model.fingerprint(),
        "dtype": "float32",
        "layers": 3,
        "template_sha256": model.tokenizer.template_sha256,
        "revision": None,
        "adapter_sha256": None,
    }
    assert model_record(model.with_prompt(None, raw=True)).template_sha256 is None
    prompts = PromptSet("builtin:plain", ("a?",), (False,), ("",), "test")
    assert data_records({"evaluation": [prompts, BAD], "calibration": [MIXED]}) == [
        Data("plain", prompts.sha256, 1, "test", "evaluation"),
        Data("bad", BAD.sha256, 3, None, "evaluation"),
        Data("mixed/test", MIXED.sha256, 3, "test", "calibration"),
    ]


def test_the_commit_of_a_model_of_the_hub_is_recorded(model, tmp_path):
    assert model_record(model).revision is None
    snapshot = tmp_path / "snapshots" / ("a" * 40)
    shutil.copytree(model.tokenizer.path, snapshot)
    cached = dataclasses.replace(model, tokenizer=Tokenizer(snapshot))
    assert model_record(cached).revision == "a" * 40
