"""What a new method costs: one short file, for which a table, a report, resuming, comparisons and CSV are there."""

import csv
import inspect

import pytest
import scaled_mlp
from tiny import tiny_chat_model

from jaxsafe.chat.model import ChatModel
from jaxsafe.evaluation.judges.keyword import judge
from jaxsafe.evaluation.language import text_rows
from jaxsafe.evaluation.settings import setting
from jaxsafe.kernels.sampling import Decoding
from jaxsafe.model.layers import LayerRange
from jaxsafe.prompts.sets import PromptSet
from jaxsafe.records.run import read_run, read_samples
from jaxsafe.study.exam import Exam

LAYERS = LayerRange(1, 3)


@pytest.fixture(scope="module")
def exam(tmp_path_factory):
    model = tiny_chat_model(tmp_path_factory.mktemp("tokenizer"))
    harmful = PromptSet("asked", ("how do i bake bread?", "who invented the kite?"), (True, True), ("", ""))
    safe = PromptSet("safe", ("tell me the rules of a quiet game.",), (False,), ("",))
    texts = text_rows(model, ["the river and the boat are older than the lantern by the window"], "whole")
    return Exam((harmful, safe), (setting("vanilla"),), judge("scans"), Decoding(4), tuple(texts), batch_size=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("tokenizer"))


def test_its_file_is_short():
    assert len(inspect.getsource(scaled_mlp).splitlines()) <= 40


def test_it_gets_everything_else(model, exam, tmp_path):
    run = scaled_mlp.run(model, exam, LAYERS, tmp_path)
    assert read_run(tmp_path) == run
    assert [row.group for row in run.table][:3] == [
        "as it is",
        "MLP of 1 to 2 times 0",
        "random: MLP of 1 to 2 times 0",
    ]
    row = run.row("MLP of 1 to 2 times 0.5")
    assert row.baseline == "as it is" and row.control == "random: MLP of 1 to 2 times 0.5"
    compared = {(c.first, c.second, c.label) for c in (*row.against_baseline, *row.against_control)}
    assert {("as it is", row.group, "asked (harmful)"), (row.control, row.group, "safe (safe)")} <= compared
    assert all(c.p_value is not None for c in row.against_baseline)
    assert len(read_samples(tmp_path)) == 7 * 3
    page = (tmp_path / "report.html").read_text()
    assert all(row.group in page for row in run.table)
    with (tmp_path / "tables/results.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) == 1 + 7
    assert (tmp_path / "tables/comparisons.csv").is_file()


def test_it_resumes(model, exam, tmp_path, monkeypatch):
    first = scaled_mlp.run(model, exam, LAYERS, tmp_path)
    made = []
    monkeypatch.setattr(scaled_mlp, "scaled", lambda *how: made.append(how))
    monkeypatch.setattr(ChatModel, "steered", lambda *_: made.append("asked"))
    assert scaled_mlp.run(model, exam, LAYERS, tmp_path).results == first.results
    assert not made
