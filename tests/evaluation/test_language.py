"""Repetition against counting by hand, perplexity against one pass a row."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from tiny import PROMPTS, tiny_chat_model, tiny_params, tiny_tokenizer

from jaxsafe.evaluation.language import (
    answer_rows,
    builtin_prose,
    distinct,
    load_passages,
    passages,
    perplexity,
    repetition,
    text_rows,
)
from jaxsafe.kernels.likelihood import answer_nll
from jaxsafe.model.transformer import forward
from jaxsafe.parallel import parse_mesh
from jaxsafe.rows import Row

SLOTS = 96
TEXTS = (
    "list three uses of a wooden spoon in the evening",
    "who invented the broken window?",
    "bread",
    "the sky turns red over boats and lanterns, and the rivers of the forest turn red as well",
)
ANSWERS = ("a quiet game of rules", "rivers", "", "the tallest tree in the forest. " * 3)
whole = jax.jit(forward, static_argnames=("config", "last"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("model"))


def slow_perplexity(model, pairs):
    """Perplexity of the answers of `pairs` (ids asked, ids answered), one token after the other."""
    total, n = 0.0, 0
    for asked, answered in pairs:
        ids = [*asked, *answered]
        tokens, valid = np.zeros((1, SLOTS), np.int32), np.zeros((1, SLOTS), bool)
        tokens[0, : len(ids)], valid[0, : len(ids)] = ids, True
        logits = np.asarray(whole(model.config, model.params, tokens, valid), np.float64)[0]
        for slot in range(len(asked), len(ids)):
            line = logits[slot - 1]
            total += np.log(np.exp(line).sum()) - line[ids[slot]]
            n += 1
    return math.exp(total / n), n


def measured(model, rows, batch_size=16, *done):
    """Perplexity of the answers of `rows`, and their tokens."""
    return perplexity(*model.nll(rows, batch_size, *done))


def ids(model, text):
    return model.tokenizer.hf(text, add_special_tokens=False)["input_ids"]


def pairs_of(model, prompts, answers):
    return [
        (ids(model, f"<|user|>{p}<|end|><|assistant|>"), ids(model, a)) for p, a in zip(prompts, answers, strict=True)
    ]


def test_repetition_counts_what_occurred_before():
    # a b, b a, a b, b a: two of four are new. Three distinct ones of three. Too short.
    assert repetition(["a b a b a", "a b c d", "a", ""], n=2) == (0.5 + 0) / 2
    assert repetition(["go on " * 50], n=4) == pytest.approx(1 - 2 / 97)
    assert repetition(["one two three four"]) == 0
    assert repetition(["one two three"]) is None
    assert repetition([]) is None


def test_repetition_and_distinct_are_counts():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["a", "b", "c"], rng.integers(0, 12))) for _ in range(30)]
    shares, everything = [], []
    for text in texts:
        words, seen, again = text.split(), [], 0
        for i in range(len(words) - 2):
            gram = " ".join(words[i : i + 3])
            again += gram in seen
            seen.append(gram)
        shares += [again / len(seen)] if seen else []
        everything += seen
    assert repetition(texts, n=3) == pytest.approx(sum(shares) / len(shares))
    assert distinct(texts, n=3) == len(set(everything)) / len(everything)
    assert sum(shares) > 0


def test_equal_answers_are_not_distinct():
    assert distinct(["a b c"] * 4) == 0.25
    assert repetition(["a b c"] * 4, n=2) == 0
    assert distinct(["a", ""]) is None
    for of in (distinct, repetition):
        with pytest.raises(ValueError, match="n-grams of 0 words"):
            of(["a b"], n=0)


def test_answer_perplexity_is_that_of_one_pass_a_row(model):
    heard = []
    rows = answer_rows(model, PROMPTS[:4], ANSWERS)
    got = measured(model, rows, 2, heard.append)
    wanted = slow_perplexity(model, pairs_of(model, PROMPTS[:4], ANSWERS))
    assert got == (pytest.approx(wanted[0], rel=1e-4), wanted[1])
    assert sum(heard) == 4
    mesh = dataclasses.replace(model, mesh=parse_mesh("data:-1"))
    assert measured(mesh, rows, 8) == (pytest.approx(wanted[0], rel=1e-4), wanted[1])


def test_rows_of_answers_are_put_as_the_model_is_asked(model):
    loud = dataclasses.replace(model, system="Be loud.")
    (row,) = answer_rows(loud, ["Why?"], ["bread"])
    asked = ids(model, "<|system|>Be loud.<|end|><|user|>Why?<|end|><|assistant|>")
    assert row == Row((*asked, *ids(model, "bread")), len(asked) - 1)
    (row,) = answer_rows(dataclasses.replace(model, raw=True), ["Why?\n"], ["bread"])
    assert row == Row((*ids(model, "Why?\n"), *ids(model, "bread")), len(ids(model, "Why?\n")) - 1)


def test_an_answer_is_cut_at_the_context_and_a_prompt_is_not(model):
    small = dataclasses.replace(model, config=dataclasses.replace(model.config, context=24))
    (row,) = answer_rows(small, ["Why?"], ["bread " * 40])
    (uncut,) = answer_rows(model, ["Why?"], ["bread " * 40])
    assert row == Row(uncut.ids[:24], uncut.instruction_end)
    with pytest.raises(ValueError, match=r"prompt 0 needs .* the model's context is 24 tokens"):
        measured(small, answer_rows(small, ["Why? " * 20], ["bread"]))


def test_perplexity_without_an_answer_is_no_number(model):
    assert measured(model, answer_rows(model, PROMPTS[:2], ["", ""])) == (None, 0)


def test_perplexity_of_a_wreck_is_beyond_numbers(model):
    loud = model.with_params(model.params | {"norm": 1e5 * model.params["norm"]})
    value, n = measured(loud, answer_rows(model, PROMPTS[:4], ANSWERS))
    assert value is None and n > 0


def test_perplexity_is_exp_of_the_mean_over_tokens():
    value, n = perplexity(np.array([3.0, 1.0], np.float32), np.array([3, 1]))
    assert (value, n) == (pytest.approx(math.e), 4)
    # Summed in float64: a float32 sum would lose the small ones.
    value, n = perplexity(np.array([2.0**24] + [1.0] * 1000, np.float32), np.array([2**22] + [0] * 1000))
    assert value == pytest.approx(math.exp((2**24 + 1000) / 2**22), rel=1e-9) and n == 2**22
    assert perplexity(np.array([np.nan], np.float32), np.array([2])) == (None, 2)


def test_a_whole_text_counts_every_token_but_the_first(model):
    pairs = [(ids(model, text)[:1], ids(model, text)[1:]) for text in TEXTS]
    wanted = slow_perplexity(model, pairs)
    assert measured(model, text_rows(model, TEXTS), 2) == (pytest.approx(wanted[0], rel=1e-4), wanted[1])
    assert wanted[1] == sum(len(ids(model, text)) - 1 for text in TEXTS)


def test_bos_is_the_first_token_where_there_is_one(model, tmp_path):
    with_bos = dataclasses.replace(model, tokenizer=tiny_tokenizer(tmp_path, around="<s> $A"))
    pairs = [([with_bos.tokenizer.hf.bos_token_id], ids(model, text)) for text in TEXTS]
    wanted = slow_perplexity(model, pairs)
    assert measured(with_bos, text_rows(with_bos, TEXTS), 2) == (pytest.approx(wanted[0], rel=1e-4), wanted[1])


def test_the_second_half_answers_the_first(model):
    halved = [(" ".join(t.split()[: len(t.split()) // 2]), " ".join(t.split()[len(t.split()) // 2 :])) for t in TEXTS]
    halved = [pair for pair in halved if pair[0]]
    texts = [text for text in TEXTS if text != "bread"]
    wanted = slow_perplexity(model, pairs_of(model, *zip(*halved, strict=True)))
    assert measured(model, text_rows(model, texts, "halves"), 2) == (pytest.approx(wanted[0], rel=1e-4), wanted[1])


def test_an_unknown_reading_is_refused(model):
    with pytest.raises(ValueError, match="unknown reading 'thirds' of a text; need 'halves' or 'whole'"):
        text_rows(model, TEXTS, "thirds")


def test_a_sweep_over_parameters_compiles_once(model):
    rows = text_rows(model, TEXTS)
    first = measured(model, rows, 2)
    programs = answer_nll._cache_size()
    for seed in (1, 2):
        edited = dataclasses.replace(model, params=tiny_params(model.config, seed))
        value, n = measured(edited, rows, 2)
        assert n == first[1] and abs(value - first[0]) > 1e-3 * first[0]
    assert answer_nll._cache_size() == programs


def test_answers_of_like_length_share_a_program(model):
    rng = np.random.default_rng(0)
    rows = [Row(tuple(rng.integers(8, 300, 48).tolist()), 48 - 1 - n) for n in range(17, 25)]
    fresh = dataclasses.replace(model, config=dataclasses.replace(model.config, norm_eps=2e-5))
    before = answer_nll._cache_size()
    measured(fresh, rows, 2)
    assert answer_nll._cache_size() == before + 1


LONG = " ".join(["word"] * 40)


def test_passages_are_long_paragraphs(tmp_path):
    assert passages(f"{LONG}\n\nshort\n\n{LONG[:-5]}\nmore words\n") == [LONG, f"{LONG[:-5]} more words"]
    # Without a blank line each line is one.
    assert passages(f"{LONG} a\nshort\n{LONG} b") == [f"{LONG} a", f"{LONG} b"]
    file = tmp_path / "prose.txt"
    file.write_text(f"{LONG}\n\n{LONG} more\n")
    assert load_passages(file) == [LONG, f"{LONG} more"]
    assert load_passages(file, 1) == [LONG]
    file.write_text("short")
    with pytest.raises(ValueError, match="has no paragraph of at least 40 words"):
        load_passages(file)
    with pytest.raises(FileNotFoundError, match="no text file at"):
        load_passages(tmp_path / "none.txt")


def test_the_prose_that_comes_along_is_distinct_passages():
    prose = builtin_prose()
    assert len(set(prose)) == len(prose) >= 8
    assert all(len(text.split()) >= 40 for text in prose)
