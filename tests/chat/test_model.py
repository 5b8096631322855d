"""How a chat model is asked, against the kernels that it asks and against prompts one by one."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import decoding, tiny_chat_model, tiny_params

from jaxsafe.chat.answers import Answers, collected
from jaxsafe.chat.model import KEEP
from jaxsafe.chat.template import Renderer
from jaxsafe.kernels.generate import generate, prefill_and_decode
from jaxsafe.kernels.likelihood import answer_nll
from jaxsafe.kernels.sampling import Decoding, drawing, row_seeds
from jaxsafe.kernels.steering import (
    PromptStates,
    Rule,
    Steering,
    decide,
    prefill_and_read,
    steered_answers,
    steered_nll,
    unit,
)
from jaxsafe.model.taps import edit
from jaxsafe.parallel import put_rows
from jaxsafe.rows import pad_rows

PROMPTS = (
    "How do I bake bread?",
    "Tell me the rules of chess.",
    "What is the tallest tree?",
    "Why?",
    "Write a poem on rivers, boats and lanterns in the evening, please.",
)
ANSWERS = ("With friends.", "", "red", "Because it is.", "a quiet game")
NEW = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("model"))


def added(model, seed=0, size=2.0):
    vectors = np.random.default_rng(seed).standard_normal((model.config.layers, model.config.embed))
    return {"attn_out": edit(add=jnp.asarray(size * vectors, jnp.float32))}


def steering_for(model, seed=0, **changes):
    """A steering whose threshold parts the prompts, half way between two scores: none is as close as rounding."""
    rng = np.random.default_rng(seed)
    directions, reference = rng.standard_normal((2, model.config.layers, model.config.embed)).astype(np.float32)
    rule = Steering(
        unit(jnp.asarray(directions)),
        jnp.asarray(reference),
        jnp.array([0.0, 1, 1]),
        jnp.float32(0),
        jnp.array([0.0, 3, 4]),
        jnp.asarray(model.tokenizer.plain_ids("Sure"), jnp.int32),
    )
    batch = pad_rows(model.rows(PROMPTS))
    states = prefill_and_read(model.config, model.params, batch, rule.affirmative, 8).states
    middle = len(PROMPTS) // 2
    threshold = jnp.sort(rule.score(states))[middle : middle + 2].mean()
    return rule.replace(threshold=threshold, **changes)


@flax.struct.dataclass
class Ablation(Rule):
    """Takes a direction out of the stream of every prompt, and reads none."""

    direction: jax.Array

    def score(self, states: PromptStates):
        return jnp.zeros(states.at_end.shape[1])

    def gate(self, states: PromptStates):
        return jnp.ones(states.at_end.shape[1])

    def edits(self, gate, start):
        return {"resid": edit(ablate=self.direction, gate=gate, start=start)}


def test_a_prompt_is_a_row_of_the_template_or_raw(model):
    tokenizer = model.tokenizer
    kind = dataclasses.replace(model, system="Be kind.")
    assert model.row("Why?") == tokenizer.chat_row("Why?")
    assert kind.row("Why?", " So.") == tokenizer.chat_row("Why?", "Be kind.", " So.")
    assert kind.row("Why?", system=None) == tokenizer.chat_row("Why?")
    assert kind.row("Why?", system=KEEP) == kind.row("Why?") != kind.row("Why?", system="Be short.")
    raw = kind.with_prompt(raw=True)
    assert raw.system == "Be kind." and raw.row("Why?", " So.") == tokenizer.raw_row("Why?", " So.")
    assert kind.with_prompt(None).row("Why?") == model.row("Why?")
    assert raw.with_prompt("x", raw=False) == dataclasses.replace(model, system="x")
    assert kind.rows(PROMPTS) == [kind.row(prompt) for prompt in PROMPTS]


def test_the_template_is_rendered_once_a_row(model, monkeypatch):
    rendered, whole = [], Renderer.render
    monkeypatch.setattr(Renderer, "render", lambda *a, **k: rendered.append(1) or whole(*a, **k))
    model.rows(PROMPTS)
    assert len(rendered) == len(PROMPTS)


def test_answers_are_those_of_prompts_one_by_one(model):
    done = []
    answers = model.answers(PROMPTS, Decoding(NEW), 2, done.append)
    assert sum(done) == len(PROMPTS) and len(done) > 1
    for i, prompt in enumerate(PROMPTS):
        row = model.row(prompt)
        alone = generate(model.config, model.params, pad_rows([row]), decoding(NEW, eos=model.tokenizer.eos_ids))
        np.testing.assert_array_equal(answers.tokens[i], alone.tokens[0])
        assert answers.lengths[i] == alone.lengths[0]
        assert answers.texts[i] == model.tokenizer.decode(alone.tokens, alone.lengths)[0]
    assert answers.read == sum(len(row.ids) for row in model.rows(PROMPTS))
    assert answers.written == answers.lengths.sum() and answers.scores is None
    of_rows = model.answers(model.rows(PROMPTS), Decoding(NEW), 8)
    np.testing.assert_array_equal(of_rows.tokens, answers.tokens)


def test_batches_of_answers_say_which_prompts_they_answer(model):
    drawn = decoding(NEW, samples=3, seed=2, temperature=1.4)
    whole = model.answers(PROMPTS, drawn, 8)
    assert len(whole.texts) == 15
    pieces = list(model.answer_batches(PROMPTS, drawn, 4))
    assert len(pieces) > 3
    for indices, answers in pieces:
        assert answers.texts == tuple(whole.texts[i] for i in indices)
        assert answers.read == sum(len(model.row(PROMPTS[i // 3]).ids) for i in indices)
    assert sorted(i for indices, _ in pieces for i in indices) == list(range(15))
    np.testing.assert_array_equal(collected(pieces).tokens, whole.tokens)


def test_collected_answers_are_in_the_order_of_their_indices():
    def part(*names):
        n = len(names)
        return Answers(names, np.arange(2 * n).reshape(n, 2), np.arange(n), np.full(n, len(names[0])), None, read=n)

    whole = collected([(np.array([2, 0]), part("bb", "aa")), (np.array([1]), part("c"))])
    assert whole.texts == ("aa", "c", "bb") and whole.read == 3 and whole.gates is None
    assert whole.tokens.tolist() == [[2, 3], [0, 1], [0, 1]] and whole.scores.tolist() == [2, 1, 2]


def test_the_likelihood_is_that_of_the_answers(model):
    rows = [model.row(prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    nll, counts = model.nll(rows, 2)
    for i, row in enumerate(rows):
        wanted, n = answer_nll(model.config, model.params, pad_rows([row]))
        np.testing.assert_allclose(nll[i], wanted[0], rtol=1e-5, atol=1e-5)
        assert counts[i] == n[0] == len(row.ids) - 1 - row.instruction_end
    assert counts[1] == nll[1] == 0


@pytest.mark.slow
def test_edits_of_a_model_reach_all_that_it_does(model):
    edits = added(model)
    edited = model.with_edits(edits)
    eos = model.tokenizer.eos_ids
    rows = model.rows(PROMPTS)
    wanted = generate(model.config, model.params, pad_rows(rows), decoding(NEW, eos=eos), edits)
    np.testing.assert_array_equal(edited.answers(PROMPTS, Decoding(NEW), 8).tokens, wanted.tokens)
    assert (wanted.tokens != model.answers(PROMPTS, Decoding(NEW), 8).tokens).any()
    pairs = [model.row(prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    given = answer_nll(model.config, model.params, pad_rows(pairs), edits)[0]
    np.testing.assert_allclose(edited.nll(pairs, 8)[0], given, rtol=1e-5, atol=1e-5)
    assert edited.fingerprint() != model.fingerprint() == edited.with_edits(None).fingerprint()
    # A rule acts on what the edited model reads; the model without a rule is the edited one.
    plain, _ = edited.steered([None, steering_for(model)]).answers(PROMPTS, Decoding(NEW), 8)
    np.testing.assert_array_equal(plain.tokens, wanted.tokens)
    both = model.with_edits({"resid": edits["attn_out"]}).steered([steering_for(model)])
    with pytest.raises(ValueError, match="tap 'resid' is edited by the model and by a rule"):
        both.answers(PROMPTS, Decoding(NEW), 8)


def test_a_fingerprint_follows_weights_and_prompt(model):
    others = [
        model.with_params(tiny_params(model.config, 1)),
        model.with_prompt("Be kind."),
        model.with_prompt(raw=True),
        dataclasses.replace(model, config=dataclasses.replace(model.config, norm_eps=2e-5)),
    ]
    assert len({m.fingerprint() for m in (model, *others)}) == 5
    assert dataclasses.replace(model, name="other").fingerprint() == model.fingerprint()


def test_without_a_rule_a_steered_model_is_the_model_itself(model):
    answers = model.steered([None, None]).answers(PROMPTS, Decoding(NEW), 8)
    own = model.answers(PROMPTS, Decoding(NEW), 8)
    assert [a.texts for a in answers] == [own.texts] * 2 and [a.read for a in answers] == [own.read, 0]
    pairs = [model.row(prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    for nll, counts in model.steered([None, None]).nll(pairs, 8):
        np.testing.assert_array_equal(nll, model.nll(pairs, 8)[0])
        np.testing.assert_array_equal(counts, model.nll(pairs, 8)[1])


def test_each_rule_answers_as_it_does_alone_and_none_as_the_model(model):
    one, two = steering_for(model), steering_for(model, seed=1)
    together = model.steered([one, None, two]).answers(PROMPTS, Decoding(NEW), 4)
    own = model.answers(PROMPTS, Decoding(NEW), 4)
    np.testing.assert_array_equal(together[1].tokens, own.tokens)
    assert [a.read for a in together] == [own.read, 0, 0]
    for rule, answers in ((one, together[0]), (two, together[2])):
        (alone,) = model.steered([rule]).answers(PROMPTS, Decoding(NEW), 8)
        np.testing.assert_array_equal(answers.tokens, alone.tokens)
        np.testing.assert_allclose(answers.scores, alone.scores, atol=1e-5)
        np.testing.assert_array_equal(answers.gates, np.where(answers.scores >= float(rule.threshold), 1, -1))
    assert (together[0].tokens != together[2].tokens).any() and (together[0].tokens != own.tokens).any()


def test_likelihood_and_divergence_without_a_rule_are_those_of_the_model(model):
    rule = steering_for(model)
    pairs = [model.row(prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    (plain, counts), (steered, _) = model.steered([None, rule]).nll(pairs, 4)
    np.testing.assert_allclose(plain, model.nll(pairs, 4)[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(counts, model.nll(pairs, 4)[1])
    assert np.abs(steered - plain).max() > 0.1
    own = model.answers(PROMPTS, Decoding(NEW), 8)
    none, some = model.steered([None, rule]).divergences(model.rows(PROMPTS), own, 4)
    np.testing.assert_array_equal(none, 0)
    assert some.shape == (5,) and (some >= 0).all() and some.max() > 0.1


def test_a_rule_that_reads_no_affirmative_runs_none(model):
    rng = np.random.default_rng(3)
    rule = Ablation(unit(jnp.asarray(rng.standard_normal((3, 32)), jnp.float32)))
    (answers,) = model.steered([rule]).answers(PROMPTS, Decoding(NEW), 8)
    rows = model.rows(PROMPTS)
    start = jnp.array([row.instruction_end for row in rows])
    wanted = generate(
        model.config,
        model.params,
        pad_rows(rows),
        decoding(NEW, eos=model.tokenizer.eos_ids),
        {"resid": edit(ablate=rule.direction, start=start)},
    )
    np.testing.assert_array_equal(answers.tokens, wanted.tokens)
    np.testing.assert_array_equal(answers.gates, 1)
    # It shares a prefill with rules that read one.
    both = model.steered([rule, steering_for(model)]).answers(PROMPTS, Decoding(NEW), 8)
    np.testing.assert_array_equal(both[0].tokens, wanted.tokens)


def test_rules_that_cannot_share_a_prefill_are_refused(model):
    rule = steering_for(model)
    other = rule.replace(affirmative=jnp.array([9, 8], jnp.int32))
    with pytest.raises(ValueError, match=r"need one affirmative; these have the token ids \(9, 8\) and "):
        model.steered([rule, None, other])
    with pytest.raises(ValueError, match="no rules to steer by"):
        model.steered([])


def test_no_rule_prompt_or_number_recompiles(model):
    rule = steering_for(model)
    programs = (prefill_and_read, decide, steered_answers)
    model.steered([rule]).answers(PROMPTS[:4], Decoding(NEW), 4)
    sizes = [program._cache_size() for program in programs]
    others = [None, rule.replace(strength=0 * rule.strength), steering_for(model, 5)]
    model.steered(others).answers(PROMPTS[:4], decoding(NEW, seed=3, eos=[2], temperature=0.7), 4)
    model.with_params(tiny_params(model.config, 1)).steered([None, rule]).answers(PROMPTS[:4], Decoding(NEW), 4)
    assert [program._cache_size() for program in programs] == sizes


def test_steered_models_are_asked_in_another_way(model):
    rule = steering_for(model)
    raw = model.steered([None, rule]).with_prompt(None, True)
    assert raw.model == model.with_prompt(None, True) and raw.rules == (None, rule)


def test_programs_run_on_device_arrays_alone(model):
    """Nothing is sent to the devices or fetched from them but by name."""
    rule = jax.device_put(steering_for(model))
    rows = [model.row(prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    batch = put_rows(pad_rows(rows), None)
    draw, share = jax.device_put((drawing(decoding(NEW), row_seeds(rows)), jnp.float32(1)))
    start = (model.config, model.params, batch)

    def run():
        plain = prefill_and_decode(*start, draw)
        prefilled = prefill_and_read(*start, rule.affirmative, NEW)
        edits = decide(rule, prefilled.states, batch, share).edits
        steered = steered_answers(*start, prefilled.cache, edits, draw, 8)
        return plain, steered, steered_nll(*start, prefilled.cache, edits, 8), answer_nll(*start)

    wanted = jax.device_get(run())
    with jax.transfer_guard("disallow"):
        found = run()
        jax.block_until_ready(found)
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            prefill_and_decode(model.config, model.params, pad_rows(rows), draw)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), wanted)
