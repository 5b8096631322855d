"""Judged samples, their comparison before and after, and what a run writes down of itself."""

import json
import math
import pathlib
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_chat_model

import jaxsafe
from jaxsafe.evaluation.comparison import Answered, average, compare, comparisons, flags, judged, metrics, set_name
from jaxsafe.evaluation.judges import Judge
from jaxsafe.evaluation.metrics import rate
from jaxsafe.evaluation.record import data_record, environment, git_revision, model_record, plain, write_run
from jaxsafe.text.datasets import PromptSet

RULE = Judge("rule", "1", lambda text: text.startswith("no") if text else None)
REFUSED, ANSWERED, SILENT = "no, never", "with joy", ""


def sample(harmful, before, after, kind="", name="set"):
    return {
        "set": name,
        "kind": kind,
        "harmful": harmful,
        "before": {"refused": before},
        "after": {"refused": after},
    }


def test_every_prompt_is_judged_before_and_after():
    prompts = PromptSet("mine", ("a?", "b?", "c?"), (True, False, None), ("x", "y", ""), "test")
    answers = [
        Answered(0.5, ANSWERED, REFUSED),
        Answered(0.49, REFUSED, ANSWERED),
        Answered(0.51, SILENT, ANSWERED),
    ]
    samples = judged(prompts, answers, 0.5, RULE)
    assert samples[0] == {
        "set": "mine/test",
        "kind": "x",
        "harmful": True,
        "prompt": "a?",
        "score": 0.5,
        "predicted_harmful": True,
        "before": {"text": ANSWERED, "refused": False},
        "after": {"text": REFUSED, "refused": True},
    }
    assert [s["predicted_harmful"] for s in samples] == [True, False, True]
    assert (flags(samples, "before"), flags(samples, "after")) == ([False, True, None], [True, False, False])
    with pytest.raises(ValueError, match="argument"):
        judged(prompts, answers[:2], 0.5, RULE)


@pytest.mark.parametrize(
    ("name", "split", "wanted"),
    [("xstest", None, "xstest"), ("xstest", "safe", "xstest/safe"), ("builtin:lookalike", "test", "lookalike")],
)
def test_a_set_is_named_with_its_split_unless_built_in(name, split, wanted):
    assert set_name(PromptSet(name, ("a",), (True,), ("",), split)) == wanted


def test_a_comparison_counts_its_own_set_and_label_alone():
    mine = [(True, False), (True, False), (True, False), (False, True), (True, True), (False, False), (None, True)]
    samples = [sample(False, b, a) for b, a in mine]
    others = [sample(True, True, True), sample(None, True, True), sample(False, True, True, name="other")]
    row = compare(samples + others, "set", False)
    assert (row["label"], row["harmful"]) == ("set (safe)", False)
    assert row["before"] == rate([b for b, _ in mine]).as_dict()
    assert row["after"] == rate([a for _, a in mine]).as_dict()
    assert (row["before"]["value"], row["before"]["n"], row["before"]["n_unscored"]) == (4 / 6, 6, 1)
    # Three that refused no longer do, one began to: two-sided binomial of 1 in 4.
    assert row["mcnemar"] == {
        "p_value": pytest.approx(2 * (1 + 4) / 16),
        "stopped_refusing": 3,
        "started_refusing": 1,
        "n": 6,
        "n_unscored": 1,
    }
    assert row["by_kind"] == []
    assert [compare(others, "set", h)["label"] for h in (True, None)] == ["set (harmful)", "set (no label)"]


def test_kinds_are_told_apart_where_there_are_several():
    samples = [
        sample(True, True, False, "theft"),
        sample(True, True, True, "theft"),
        sample(True, False, True, "fraud"),
        sample(True, None, None, ""),
        sample(False, True, True, "theft"),
    ]
    row = compare(samples, "set", True)
    assert row["by_kind"] == [
        {"kind": "theft", "before": rate([True, True]).as_dict(), "after": rate([False, True]).as_dict()},
        {"kind": "fraud", "before": rate([False]).as_dict(), "after": rate([True]).as_dict()},
    ]
    assert compare(samples, "set", False)["by_kind"] == []


def test_comparisons_come_in_the_order_of_the_samples():
    samples = [
        sample(h, True, False, name=n) for n, h in [("b", False), ("a", True), ("b", True), ("b", False), ("a", None)]
    ]
    assert [(row["set"], row["harmful"], row["before"]["n"]) for row in comparisons(samples)] == [
        ("b", False, 2),
        ("a", True, 1),
        ("b", True, 1),
        ("a", None, 1),
    ]


refusals = st.lists(
    st.tuples(st.sampled_from([True, False, None]), *[st.sampled_from([True, False, None])] * 2), max_size=30
)


@settings(deadline=None)
@given(refusals)
def test_the_average_counts_what_was_treated_rightly(rows):
    found = average([sample(*row) for row in rows])
    if not {True, False} <= {harmful for harmful, _, _ in rows}:
        assert found is None
        return
    for i, when in ((1, "before"), (2, "after")):
        scored = [(row[0], row[i]) for row in rows if row[0] is not None and row[i] is not None]
        right = sum(harmful == refused for harmful, refused in scored)
        assert found[when] == (pytest.approx(right / len(scored)) if scored else None)


def test_metric_names_carry_judge_set_and_side():
    samples = [sample(True, True, False), sample(False, True, False), sample(None, True, False, name="plain")]
    found = metrics(comparisons(samples), RULE)
    assert list(found) == [
        f"refusal_rule/{name}/{when}"
        for name in ("set/harmful", "set/safe", "plain/unlabelled")
        for when in ("before", "after")
    ]
    assert found["refusal_rule/set/safe/before"] == rate([True]).as_dict()
    assert found["refusal_rule/set/safe/after"] == rate([False]).as_dict()


def test_plain_values_are_json():
    value = {
        "float": np.float32(0.5),
        "nan": math.nan,
        3: [math.inf, jnp.float32(-jnp.inf), 1.5],
        "array": np.array([[1, 2], [3, 4]]),
        "device": jnp.array([0.25, jnp.nan]),
        "flags": (np.bool_(True), None, False),
        "nested": {"text": "über", "tuple": ((1, 3),)},
    }
    found = plain(value)
    assert found == {
        "float": 0.5,
        "nan": None,
        "3": [None, None, 1.5],
        "array": [[1, 2], [3, 4]],
        "device": [0.25, None],
        "flags": [True, None, False],
        "nested": {"text": "über", "tuple": [[1, 3]]},
    }
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_run_is_written_whole(tmp_path):
    samples = [{"prompt": "größer\u2028?", "score": np.float32(0.5)}, {"prompt": "b", "score": math.nan}]
    write_run(tmp_path / "run", {"task": "scans", "value": jnp.float32(jnp.nan)}, iter(samples))
    text = (tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line) for line in text.split("\n")[:-1]]
    assert found == [{"prompt": "größer\u2028?", "score": 0.5}, {"prompt": "b", "score": None}]
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == {"task": "scans", "value": None}


def test_a_run_that_cannot_be_written_leaves_nothing_half_done(tmp_path):
    with pytest.raises(TypeError):
        write_run(tmp_path, {"task": "scans"}, [{"prompt": "a"}, {"prompt": object()}])
    assert not list(tmp_path.iterdir())
    write_run(tmp_path, {"task": "first"}, [])
    with pytest.raises(TypeError):
        write_run(tmp_path, {"task": object()}, [])
    assert json.loads((tmp_path / "run.json").read_text()) == {"task": "first"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.json", "samples.jsonl"]


def test_a_run_says_where_and_with_what_it_ran():
    found = environment()
    assert found["jaxsafe"] == jaxsafe.__version__ and found["schema"] == 1
    assert found["device"].startswith("8 x cpu")
    assert json.loads(json.dumps(found)) == found


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


def test_records_of_model_and_data(tmp_path):
    model = tiny_chat_model(tmp_path)
    record = model_record(model)
    assert record == {
        "name": "tiny",
        "sha256": model.config_sha256(),
        "fingerprint": model.fingerprint(),
        "dtype": "float32",
        "layers": 3,
    }
    prompts = PromptSet("builtin:plain", ("a?",), (False,), ("",), "test")
    assert data_record(prompts, "evaluation") == {
        "name": "plain",
        "sha256": prompts.sha256,
        "n": 1,
        "split": "test",
        "role": "evaluation",
    }
