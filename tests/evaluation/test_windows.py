"""Perplexity of windows against a loop over one pass a window, and against transformers where there is torch."""

import dataclasses
import math
import types

import jax
import numpy as np
import pytest
from exams import steering
from tiny import CORPUS, tiny_chat_model, tiny_tokenizer

from jaxsafe.evaluation.language import perplexity
from jaxsafe.evaluation.windows import load_text, read_by_rule, windows
from jaxsafe.io.hf import save_hf
from jaxsafe.model.transformer import forward

LENGTH = 48
whole = jax.jit(forward, static_argnames=("config", "last"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Its tokenizer puts BOS in front, as Llama's does."""
    folder = tmp_path_factory.mktemp("model")
    return dataclasses.replace(tiny_chat_model(folder), tokenizer=tiny_tokenizer(folder, around="<s> $A"))


def expected_windows(model, protocol):
    """The tokens of each window by the published rule, from the tokenizer alone."""
    encode = model.tokenizer.hf
    if protocol == "wei2024":
        ids = encode(CORPUS)["input_ids"]
        return [ids[i * LENGTH : (i + 1) * LENGTH] for i in range(len(ids) // LENGTH)]
    start, end = {"scans": ("<s>[INST] ", " [/INST] "), "scans_vicuna": ("<s>USER: ", " \nASSISTANT: ")}[protocol]
    start, end = (encode.convert_tokens_to_ids(encode.tokenize(mark)) for mark in (start, end))
    ids, room = encode(CORPUS)["input_ids"][1:], LENGTH - len(start) - len(end)
    pieces = [ids[i * room : (i + 1) * room] for i in range(len(ids) // room)]
    return [[*start, *piece[: room // 2], *end, *piece[-room // 2 :]] for piece in pieces]


def slow_perplexity(model, pieces):
    """exp of the mean over windows of the mean over their tokens but the first."""
    means = []
    for ids in pieces:
        logits = np.asarray(
            whole(model.config, model.params, np.array([ids]), np.ones((1, len(ids)), bool)), np.float64
        )
        logprobs = logits[0, :-1] - np.log(np.exp(logits[0, :-1]).sum(-1, keepdims=True))
        means.append(-np.mean([line[token] for line, token in zip(logprobs, ids[1:], strict=True)]))
    return math.exp(np.mean(means))


@pytest.mark.parametrize("protocol", ["wei2024", "scans", "scans_vicuna"])
def test_perplexity_is_that_of_a_loop_over_windows(model, protocol):
    pieces = expected_windows(model, protocol)
    assert len(pieces) > 3
    found = windows(model, CORPUS, protocol, length=LENGTH)
    assert [list(row.ids) for row in found.rows] == pieces
    ((nll, counts),) = read_by_rule(model.steered([None]), found)
    value, n = perplexity(nll, counts)
    assert value == pytest.approx(slow_perplexity(model, pieces), rel=1e-5)
    assert n == len(pieces) * (LENGTH - 1)
    assert windows(model, CORPUS, protocol, 2, LENGTH).rows == found.rows[:2]


def test_steering_acts_from_the_end_of_the_request_on(model):
    found = windows(model, CORPUS, "scans", 4, LENGTH)
    row = found.rows[0]
    assert model.tokenizer.hf.decode(row.ids[: row.instruction_end + 1]).endswith("[/INST]")
    assert not model.tokenizer.hf.decode(row.ids[: row.instruction_end]).endswith("[/INST]")
    rules = [None, steering(model, 0.0), steering(model, 20.0)]
    read = read_by_rule(model.steered(rules), found)
    plain, nothing, steered = (nll for nll, _ in read)
    np.testing.assert_allclose(nothing, plain, rtol=1e-5)
    n = len(found.before)
    np.testing.assert_array_equal(steered[:n], plain[:n])
    assert (abs(steered[n:] / plain[n:] - 1) > 1e-3).all()
    assert {int(counts.sum()) for _, counts in read} == {n * (LENGTH - 1)}
    everywhere = types.SimpleNamespace(
        rules=[types.SimpleNamespace(reaches_prompt=True)], nll=model.steered([None]).nll
    )
    with pytest.raises(ValueError, match="a rule edits requests"):
        read_by_rule(everywhere, found)


def test_windows_are_the_context_or_as_published(model):
    assert len(windows(model, CORPUS, "wei2024").rows[0].ids) == model.config.context
    assert len(windows(model, CORPUS, "scans").rows[0].ids) == model.config.context // 2  # below 2048


def test_what_gives_no_window(model):
    with pytest.raises(ValueError, match="unknown protocol 'thirds' of perplexity; need one of wei2024, scans"):
        windows(model, CORPUS, "thirds")
    with pytest.raises(ValueError, match="a text of 2 tokens fills no window, which takes 160"):
        windows(model, "b", "wei2024")
    with pytest.raises(ValueError, match=r"windows leave -?\d+ tokens of text each; need at least 2"):
        windows(model, CORPUS, "scans", length=8)


def test_lines_are_joined_as_the_papers_join_them(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(" \n = A title = \n \nWords of it.\n")
    assert load_text(file) == "\n\n".join(["", " = A title = \n", "", "Words of it.\n"])
    file.write_text(" \n\n")
    with pytest.raises(ValueError, match="has no text"):
        load_text(file)
    with pytest.raises(FileNotFoundError, match="no text file at"):
        load_text(tmp_path / "none.txt")


@pytest.mark.parametrize("protocol", ["wei2024", "scans"])
def test_perplexity_is_that_of_transformers(model, tmp_path, protocol):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    save_hf(tmp_path, model.config, model.params)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        ids = [torch.tensor([piece]) for piece in expected_windows(model, protocol)]
        losses = [theirs(each, labels=each).loss.item() for each in ids]
    found = windows(model, CORPUS, protocol, length=LENGTH)
    nll, counts = (np.concatenate(pair) for pair in zip(*(model.nll(rows) for rows in found if rows), strict=True))
    assert perplexity(nll, counts)[0] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
