"""What a model makes of labelled prompts, against single passes."""

import jax
import numpy as np
import pytest
from evidences import random_evidence
from tiny import tiny_chat_model

from jaxsafe.evaluation.judges.keyword import judge
from jaxsafe.io.store import Store
from jaxsafe.kernels.forward import capture
from jaxsafe.kernels.sampling import Decoding
from jaxsafe.methods.evidence import evidence_once
from jaxsafe.methods.scans import affirmative_ids
from jaxsafe.prompts.sets import load_prompts
from jaxsafe.rows import Row, pad_rows

SETS = [load_prompts(f"builtin:{name}", split="anchor").take(4, seed=0) for name in ("harmful", "plain")]
JUDGE = judge("wei2024_no_length")
captured = jax.jit(capture, static_argnames=("config", "taps"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("model"), context=300)


def test_states_are_those_of_single_passes(model, tmp_path):
    e = evidence_once(Store(tmp_path), model, SETS, JUDGE, (Decoding(3), 3))
    answers = model.answers(e.prompts, Decoding(3))
    affirmative = affirmative_ids(model).tolist()
    for i, prompt in enumerate(e.prompts):
        ids = model.row(prompt).ids
        both = pad_rows([Row((*ids, *affirmative), len(ids) - 1)], length=300)
        resid = np.asarray(captured(model.config, model.params, both.tokens, both.valid)["resid"][:, 0])
        resid, n = resid[:, both.valid[0]], len(ids)
        np.testing.assert_allclose(e.at_end[i], resid[:, n - 1], atol=1e-4)
        np.testing.assert_allclose(e.change[i], resid[:, n - 1] - resid[:, -1], atol=1e-4)
        np.testing.assert_allclose(e.mean[i], resid[:, :n].mean(1), atol=1e-4)
        assert e.tokens[i, : e.lengths[i]].tolist() == answers.ids[i]
    assert e.harmful.tolist() == [True] * 4 + [False] * 4
    assert e.source == ("harmful",) * 4 + ("plain",) * 4
    assert e.refused.tolist() == [bool(r) for r in JUDGE.refused(e.prompts, answers.texts)]


def test_what_is_kept_is_not_made_again(model, tmp_path, monkeypatch):
    first = evidence_once(Store(tmp_path), model, SETS, JUDGE, (Decoding(3), 3))
    monkeypatch.setattr(type(model), "batches", None)
    again = evidence_once(Store(tmp_path), model, SETS, JUDGE, (Decoding(3), 8))
    assert first.sha256 == again.sha256 and (first.tokens == again.tokens).all()
    assert not list(tmp_path.glob("*.jsonl"))


def test_states_of_prompts_that_an_earlier_run_answered_are_read_again(model, tmp_path):
    whole = evidence_once(Store(tmp_path / "whole"), model, SETS, JUDGE, (Decoding(3), 3))
    heard: list[int] = []

    def stop(n: int) -> None:
        heard.append(n)
        if n:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evidence_once(Store(tmp_path / "torn"), model, SETS, JUDGE, (Decoding(3), 3), stop)
    assert len(list((tmp_path / "torn").glob("evidence*.jsonl"))) == 1
    again = evidence_once(Store(tmp_path / "torn"), model, SETS, JUDGE, (Decoding(3), 3), heard.append)
    assert 0 < heard[1] < 8 and sum(heard) == heard[1] + 8
    assert (again.tokens == whole.tokens).all() and (again.refused == whole.refused).all()
    for name in ("at_end", "change", "mean"):
        np.testing.assert_allclose(getattr(again, name), getattr(whole, name), atol=1e-6)


def test_kinds_of_states_are_told_by_label_and_outcome():
    e = random_evidence()
    assert len(e.states(True, True)) + len(e.states(True, False)) == len(e.states(True)) == e.harmful.sum()
    direction = np.float64(e.states(True, True)).mean(0) - np.float64(e.states(False, False)).mean(0)
    np.testing.assert_allclose(e.direction, direction / np.linalg.norm(direction, axis=-1, keepdims=True), atol=1e-5)
    e.refused[:] = False
    with pytest.raises(ValueError, match="no harmful prompts that the model refuses"):
        e.states(True, True)


def test_prompts_of_one_kind_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="one kind only"):
        evidence_once(Store(tmp_path), model, SETS[:1], JUDGE, (Decoding(3), 3))
