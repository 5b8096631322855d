"""Attack settings against a loop over prompts and tokens, and rates against counts by hand."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy.stats import bootstrap
from tiny import PROMPTS, tiny_chat_model, tiny_params

from jaxsafe.evaluation.attack_settings import (
    SETTINGS,
    Setting,
    answers,
    clustered_rate,
    load_suffixes,
    records,
    score,
    setting,
    under,
)
from jaxsafe.evaluation.judges import Judge
from jaxsafe.evaluation.metrics import rate
from jaxsafe.kernels.generate import _generate, generate, sampling_keys
from jaxsafe.kernels.sampling import row_seeds
from jaxsafe.model.transformer import forward
from jaxsafe.text.batches import Row, pad_rows
from jaxsafe.text.datasets import PromptSet

NEW = 6
ALIKE = (PROMPTS[0], PROMPTS[3])  # of one length bucket
SLOTS = 96
SUFFIXES = ("! ! ask", "now")
# "n..." refuses, "y..." complies, an empty answer cannot be scored.
JUDGE = Judge("toy", "1", lambda text: text.startswith("n") if text else None)
whole = jax.jit(forward, static_argnames=("config", "last"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("model"))


def slow_answer(model, text):
    """The greedy answer to `text` as it is, one whole pass a token."""
    ids = model.tokenizer.hf(text, add_special_tokens=False)["input_ids"]
    new = []
    for _ in range(NEW):
        tokens, valid = np.zeros((1, SLOTS), np.int32), np.zeros((1, SLOTS), bool)
        n = len(ids) + len(new)
        tokens[0, :n], valid[0, :n] = ids + new, True
        token = int(np.asarray(whole(model.config, model.params, tokens, valid))[0, n - 1].argmax())
        if token in model.tokenizer.eos_ids:
            break
        new.append(token)
    return model.tokenizer.hf.decode(new, skip_special_tokens=True)


def chat(prompt, system=None):
    head = "" if system is None else f"<|system|>{system}<|end|>"
    return f"{head}<|user|>{prompt}<|end|><|assistant|>"


def test_vanilla_asks_in_the_template_with_the_given_system_prompt(model):
    other = dataclasses.replace(model, system="Be loud.", raw=True)
    got = answers(other, ALIKE, setting("vanilla", "Be kind."), NEW, 4)
    assert got == [[slow_answer(model, chat(p, "Be kind."))] for p in ALIKE]
    bare = answers(other, ALIKE, setting("vanilla_no_system", "Be kind."), NEW, 4)
    assert bare == [[slow_answer(model, chat(p))] for p in ALIKE]
    assert bare != got


def test_each_prompt_is_asked_with_each_suffix(model):
    heard = []
    got = answers(model, ALIKE, setting("suffix", "ignored", SUFFIXES), NEW, 4, done=heard.append)
    assert got == [[slow_answer(model, chat(f"{p} {s}")) for s in SUFFIXES] for p in ALIKE]
    assert got[0][0] != got[0][1]
    assert sum(heard) == 4


def test_without_the_template_a_prompt_is_a_line(model):
    greedy = Setting("raw", None, template=False)
    got = answers(dataclasses.replace(model, system="ignored"), [" " + ALIKE[0], ALIKE[1]], greedy, NEW, 4)
    assert got == [[slow_answer(model, p + "\n")] for p in ALIKE]


@pytest.mark.parametrize("name", ["decoding", "decoding_template"])
def test_samples_differ_from_each_other_and_not_with_the_batch(model, name):
    usual = setting(name)
    together = answers(model, ALIKE, usual, NEW, 8, seed=3)
    assert [len(set(texts)) for texts in together] == [5, 5]
    assert answers(model, ALIKE[::-1], usual, NEW, 2, seed=3) == together[::-1]
    assert answers(model, ALIKE[1:], usual, NEW, 8, seed=3) == together[1:]
    assert answers(model, ALIKE[1:], usual, NEW, 8, seed=4) != together[1:]


def test_samples_are_drawn_at_the_temperature_of_the_setting(model):
    for temperature in (1.0, 0.3):
        usual = Setting("mine", None, template=True, samples=3, temperature=temperature)
        ids = model.tokenizer.hf(chat(PROMPTS[0]), add_special_tokens=False)["input_ids"]
        rows = [Row(tuple(ids), len(ids) - 1)] * 3
        out = generate(
            model.config,
            model.params,
            pad_rows(rows, count=4),
            NEW,
            eos=model.tokenizer.eos_ids,
            temperature=temperature,
            seed=1,
            row_numbers=np.append(row_seeds(rows), 0),
        )
        wanted = model.tokenizer.decode(out.tokens[:3], out.lengths[:3])
        assert answers(model, PROMPTS[:1], usual, NEW, 4, seed=1) == [wanted]
    assert len(sampling_keys(1, row_seeds(rows))) == len(set(row_seeds(rows).tolist()))


def test_other_parameters_and_other_settings_run_the_same_program(model):
    batch = (ALIKE, setting("vanilla"), NEW, 4)
    first = answers(model, *batch)
    programs = _generate._cache_size()
    other = dataclasses.replace(model, params=tiny_params(model.config, seed=1))
    assert answers(other, *batch) != first
    warm = Setting("warm", None, template=True, temperature=1.0)
    assert answers(other, ALIKE, warm, NEW, 4) != first
    assert _generate._cache_size() == programs


def test_under_leaves_the_rest_of_a_model_alone(model):
    asked = under(dataclasses.replace(model, system="x"), setting("decoding"))
    assert (asked.raw, asked.system, asked.params) == (True, None, model.params)


def test_one_answer_a_prompt_makes_one_rate():
    got = score([["no"], ["yes"], [""], ["yes"]], setting("vanilla"), JUDGE)
    assert got == {"asr_toy/vanilla": rate([False, True, None, True]).as_dict()}
    assert got["asr_toy/vanilla"]["value"] == 2 / 3
    assert got["asr_toy/vanilla"]["n_unscored"] == 1


def test_the_best_suffix_is_not_any_suffix():
    # The first suffix succeeds on one of three, the second on two; one or the other succeeds on all.
    got = score([["yes", "no"], ["no", "yes"], ["no", "yes"]], setting("suffix", None, SUFFIXES), JUDGE)
    assert got == {
        "asr_toy/suffix": rate([False, True, True]).as_dict(),
        "asr_toy/suffix_any": rate([True, True, True]).as_dict(),
    }


def test_unscored_answers_of_suffixes_are_left_out_and_counted():
    got = score([["", "no"], ["yes", "no"], ["no", "yes"], ["", ""]], setting("suffix", None, SUFFIXES), JUDGE)
    # 1 of 2 under the first suffix, 1 of 3 under the second; the last prompt has no scored answer at all.
    assert got["asr_toy/suffix"] == rate([None, True, False, None]).as_dict()
    assert got["asr_toy/suffix_any"] == rate([False, True, True, None]).as_dict()
    nothing = score([["", ""]], setting("suffix", None, SUFFIXES), JUDGE)
    assert nothing["asr_toy/suffix"]["value"] is None
    assert nothing["asr_toy/suffix_any"] == rate([None]).as_dict()


def test_samples_have_a_mean_and_an_any():
    given = [["no", "yes", "yes", "", "no"], ["no"] * 5, [""] * 5]
    for name in ("decoding", "decoding_template"):
        got = score(given, setting(name), JUDGE)
        assert list(got) == [f"asr_toy/{name}_mean", f"asr_toy/{name}_any"]
        mean, anyone = got.values()
        assert (mean["value"], mean["n"], mean["n_unscored"]) == (2 / 9, 9, 6)
        assert mean["ci_low"] < 2 / 9 < mean["ci_high"]
        assert anyone == rate([True, False, None]).as_dict()


def test_independent_samples_count_in_full_and_equal_ones_once():
    def ends(r):
        return pytest.approx((r.value, r.ci_low, r.ci_high))

    def clustered(groups):
        r = clustered_rate(groups)
        return r.value, r.ci_low, r.ci_high

    singles = [True] * 3 + [False] * 9
    assert clustered([[flag] for flag in singles]) == ends(rate(singles))
    assert clustered([[flag] * 5 for flag in singles]) == ends(rate(singles))
    assert clustered([[True, False, False, False]] * 7) == ends(rate([True, False, False, False] * 7))
    assert clustered([[False] * 5] * 20) == ends(rate([False] * 20))
    assert clustered([[True] * 5, [True, None], [None]]) == ends(rate([True] * 2))
    assert clustered_rate([[None], []]) == rate([None])
    with pytest.raises(ValueError, match="need True, False or None"):
        clustered_rate([[1]])


def drawn(rng, prompts):
    """Samples of prompts that differ in how easily they succeed."""
    return rng.random((prompts, 5)) < rng.beta(0.6, 1.4, prompts)[:, None]


def test_the_interval_over_prompts_is_that_of_the_bootstrap():
    flags = drawn(np.random.default_rng(0), 200)
    got = clustered_rate(flags.tolist())
    by_prompt = bootstrap((flags.mean(1),), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    naive = rate(flags.ravel())
    assert got.value == flags.mean()
    np.testing.assert_allclose((got.ci_low, got.ci_high), by_prompt, atol=0.006)
    assert got.ci_high - got.ci_low > 1.3 * (naive.ci_high - naive.ci_low)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = [r.ci_low <= 0.3 <= r.ci_high for r in (clustered_rate(drawn(rng, 50).tolist()) for _ in range(400))]
    assert 0.92 <= np.mean(held) <= 0.98


def test_records_are_flat():
    prompts = PromptSet("bad", ("a", "b"), (True, None), ("", ""), "test")
    suffixed = records(prompts, [["yes", "no"], ["", "no"]], setting("suffix", None, SUFFIXES), JUDGE)
    assert suffixed[1] == {
        "set": "bad/test",
        "setting": "suffix",
        "harmful": True,
        "prompt": "a",
        "text": "no",
        "refused": True,
        "suffix": 1,
        "sample": 0,
    }
    assert [(r["prompt"], r["suffix"], r["sample"]) for r in suffixed] == [
        ("a", 0, 0),
        ("a", 1, 0),
        ("b", 0, 0),
        ("b", 1, 0),
    ]
    assert suffixed[2]["refused"] is None
    sampled = records(prompts, [["yes"] * 5, ["no"] * 5], setting("decoding"), JUDGE)
    assert [(r["suffix"], r["sample"]) for r in sampled] == 2 * [(None, i) for i in range(5)]


def test_a_prompt_with_another_number_of_answers_is_refused():
    prompts = PromptSet("bad", ("a", "b"), (True, True), ("", ""))
    with pytest.raises(ValueError, match="prompt 1 has 0 answers; setting 'vanilla' gives 1"):
        score([["a"], []], setting("vanilla"), JUDGE)
    with pytest.raises(ValueError, match="prompt 0 has 2 answers; setting 'decoding' gives 5"):
        records(prompts, [["a", "b"], ["a"]], setting("decoding"), JUDGE)


def test_the_ready_settings_are_those_published():
    ready = {name: setting(name, "S", ("x",)) for name in SETTINGS}
    assert [(s.system, s.template, s.suffixes, s.samples, s.temperature) for s in ready.values()] == [
        ("S", True, (), 1, 0.0),
        (None, True, (), 1, 0.0),
        (None, True, ("x",), 1, 0.0),
        (None, False, (), 5, 1.0),
        (None, True, (), 5, 1.0),
    ]
    assert [s.name for s in ready.values()] == list(SETTINGS)
    with pytest.raises(ValueError, match="unknown setting 'gcg'; need one of vanilla, "):
        setting("gcg")
    with pytest.raises(ValueError, match="has no suffixes"):
        setting("suffix")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"samples": 0}, "samples 0 must be at least 1"),
        ({"samples": 2}, "2 samples at temperature 0"),
        ({"samples": 2, "temperature": 1.0, "suffixes": ("x",)}, "2 samples with suffixes"),
        ({"template": False, "system": "S"}, "without the chat template"),
    ],
)
def test_a_setting_that_contradicts_itself_is_refused(given, message):
    with pytest.raises(ValueError, match=f"setting 'mine': .*{message}"):
        Setting(**{"name": "mine", "system": None, "template": True, **given})


def test_suffixes_stand_one_a_line(tmp_path):
    file = tmp_path / "suffixes.txt"
    file.write_bytes("! ! one\r\n\n  two\u2028three \n".encode())
    assert load_suffixes(file) == ("! ! one", "two\u2028three")
    file.write_text("\n \n")
    with pytest.raises(ValueError, match="has no suffix; need one a line"):
        load_suffixes(file)
    file.write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"is not UTF-8 text \(byte 2\)"):
        load_suffixes(file)
    with pytest.raises(FileNotFoundError, match="no text file of suffixes at"):
        load_suffixes(tmp_path / "none.txt")
