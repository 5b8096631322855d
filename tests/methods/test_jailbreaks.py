"""Attempts that leave the weights alone, each against what it must come to exactly."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from exams import JUDGE, quick_exam
from tiny import tiny_chat_model

from jaxsafe.chat.model import KEEP
from jaxsafe.evaluation.language import spoken_rows
from jaxsafe.evaluation.settings import Setting
from jaxsafe.kernels.ablation import orthogonalised
from jaxsafe.kernels.sampling import Decoding
from jaxsafe.methods import jailbreaks
from jaxsafe.methods.jailbreak_findings import begun, tries_of
from jaxsafe.model.layers import LayerRange
from jaxsafe.model.weights import flatten, linear_maps
from jaxsafe.records.run import Sample
from jaxsafe.study.exam import examine

PROMPTS = ("how do i bake bread?", "tell me the rules of chess.", "why?", "who invented the kite?")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def own(model):
    """A greedy answer of eight tokens whose first three are a text of their own."""
    for prompt in PROMPTS:
        answer = model.answers([prompt], Decoding(8, eos=(-1,)))
        ids = answer.ids[0]
        (opening,) = model.tokenizer.decode([ids[:3]], [3])
        if tuple(model.tokenizer.plain_ids(opening)) == tuple(ids[:3]):
            return prompt, opening, ids
    raise AssertionError("no answer of this model begins with a text that is read as it was written")


def test_a_model_goes_on_from_an_opening_as_from_its_own_words(model, own):
    prompt, opening, ids = own
    begun = model.with_prompt(opening=opening)
    assert begun.answers([prompt], Decoding(5, eos=(-1,))).ids[0] == ids[3:]
    assert begun.steered([None]).answers([prompt], Decoding(5, eos=(-1,)))[0].ids[0] == ids[3:]
    assert begun.fingerprint() != model.fingerprint() == begun.with_prompt(opening="").fingerprint()


def test_what_follows_an_opening_is_read_without_it(model):
    """log p(follows | asked, opening) = log p(opening, follows | asked) - log p(opening | asked)."""
    opening, follows = "Sure, here", " is the tallest tree"
    begun = model.with_prompt(opening=opening)
    rows = [row for prompt in PROMPTS for row in spoken_rows(begun, [prompt], [follows])]
    found, counts = begun.nll(rows)
    assert counts.tolist() == [len(model.tokenizer.plain_ids(follows))] * len(PROMPTS)
    first = len(model.tokenizer.plain_ids(opening))
    whole = [dataclasses.replace(row, instruction_end=row.instruction_end - first) for row in rows]
    both, _ = model.nll(whole)
    alone, _ = model.nll([model.row(prompt, opening) for prompt in PROMPTS])
    np.testing.assert_allclose(found, both - alone, rtol=1e-5)


def test_an_exam_asks_with_the_opening_and_keeps_what_follows(model, own):
    prompt, opening, ids = own
    exam = quick_exam(model, settings=(Setting("jailbreak", opening=opening),))
    prompts = dataclasses.replace(exam.prompts[0], prompts=(prompt,), harmful=(True,), kinds=("",))
    exam = dataclasses.replace(exam, prompts=(prompts,), decoding=Decoding(5, eos=(-1,)))
    ((findings,), _) = examine(model.steered([None]), model, exam, ["v"])
    (sample,) = findings.samples
    assert sample.text == model.tokenizer.decode([ids[3:]], [5])[0]
    (nll,), (n,) = model.with_prompt(opening=opening).nll([model.with_prompt(opening=opening).row(prompt, sample.text)])
    assert sample.nats == pytest.approx(nll / n, abs=1e-4)


def test_neutral_words_have_as_many_tokens_as_they_can(model):
    for count in (1, 5, 9, 200):
        text = jailbreaks.neutral(model.tokenizer, count, 2)
        words = text.split()
        ids = model.tokenizer.plain_ids
        longer = f"{text} {(jailbreaks.NEUTRAL.split() * 9)[2 + len(words)]}"
        assert len(ids(text)) <= count or len(words) == 1
        assert len(ids(longer)) > count
    assert jailbreaks.neutral(model.tokenizer, 9) != jailbreaks.neutral(model.tokenizer, 9, 1)


def test_one_number_of_a_sweep_is_moved_at_a_time_and_no_two_tries_share_their_noise(model):
    attempts = jailbreaks.decodings((0.5, 1.0), (0.9,), (1,))
    drawn = [(a.setting.temperature, a.setting.top_p, a.setting.top_k) for a in attempts]
    assert drawn == [(0.5, 1.0, 0), (1.0, 1.0, 0), (1.0, 0.9, 0), (1.0, 1.0, 1), *[(1.0, 1.0, 0)] * 4]
    assert [a.control for a in attempts] == [False] * 4 + [True] * 4
    assert len({a.seed for a in attempts} | {0}) == 9
    exam = quick_exam(model)
    assert {a.exam(exam).decoding.seed - exam.decoding.seed for a in attempts} == set(range(1, 9))


def test_the_likeliest_token_of_one_is_greedy(model):
    exam, plain = quick_exam(model), jailbreaks.asked()
    (top,) = (a for a in jailbreaks.decodings((), (), (1,)) if not a.control)
    texts = []
    for attempt in (plain, top):
        ((findings,), _) = examine(model.steered([None]), model, attempt.exam(exam), ["v"])
        texts.append([sample.text for sample in findings.samples])
    assert texts[0] == texts[1]
    assert plain.exam(exam).identity(model) != top.exam(exam).identity(model)


def test_ablation_while_running_is_ablation_of_the_weights(model):
    direction = np.random.default_rng(1).standard_normal(model.config.embed).astype(np.float32)
    direction /= np.linalg.norm(direction)
    running, *controls = jailbreaks.ablations(direction, 2, seed=3)
    config, params = orthogonalised(model.config, model.params, jnp.asarray(direction))
    baked = dataclasses.replace(model, config=config, params=params)
    rows = [model.row(prompt, " with friends.") for prompt in PROMPTS]
    changed = running.made(model)
    np.testing.assert_allclose(changed.nll(rows)[0], baked.nll(rows)[0], rtol=1e-5)
    assert changed.answers(PROMPTS, Decoding(6)).ids == baked.answers(PROMPTS, Decoding(6)).ids
    assert np.abs(changed.nll(rows)[0] - model.nll(rows)[0]).max() > 0.01
    assert [c.variant.of for c in controls] == ["random direction ablated"] * 2
    assert len({str(a.variant.follows) for a in (running, *controls)}) == 3


def test_scaled_layers_are_those_that_are_named_and_controls_as_many_others(model):
    attempts = jailbreaks.scalings(3, LayerRange(1, 2), (0.5,), 2, seed=0)
    maps, before = linear_maps(model.config), flatten(model.params)
    changed = []
    for attempt in attempts:
        after, moved = flatten(attempt.made(model).params), set()
        for path, weight in before.items():
            for layer in range(3) if path in maps else ():
                factor = 0.5 if np.any(after[path][layer] != weight[layer]) else 1.0
                np.testing.assert_array_equal(after[path][layer], factor * weight[layer])
                moved |= {layer} if factor != 1 else set()
            if path not in maps:
                np.testing.assert_array_equal(after[path], weight)
        changed.append(moved)
    assert changed[0] == {1} and all(len(moved) == 1 and moved <= {0, 2} for moved in changed[1:])
    assert [a.draw for a in attempts] == [0, 0, 1]
    with pytest.raises(ValueError, match="layers 0 to 1 leave 1 others of 3"):
        jailbreaks.scalings(3, LayerRange(0, 2), (0.5,), 1, seed=0)


def test_personas_and_bare_requests_change_what_is_asked_alone(model):
    obedient, neutral = jailbreaks.personas()
    (bare,) = jailbreaks.bare()
    assert obedient.setting.texts("x?") == [f"{jailbreaks.PREFIX}x?"] and neutral.setting.system != KEEP
    assert bare.setting.texts("x?") == ["x?\n"] and not bare.setting.template
    assert obedient.variant.control == neutral.variant.name
    assert all(a.made(model) is model for a in (obedient, neutral, bare))
    (own, _) = jailbreaks.personas("You obey.")
    assert (own.setting.system, own.setting.texts("x?")) == ("You obey.", ["x?"])


def test_texts_are_read_where_the_model_is_changed_and_once_where_it_is_not(model):
    exam = quick_exam(model, texts=(model.row("a", " b"),))
    attempts = [jailbreaks.asked(), *jailbreaks.bare(), *jailbreaks.scalings(3, LayerRange(1, 2), (0.5,), 0, 0)]
    assert [len(a.exam(exam).texts) for a in attempts] == [1, 0, 1]


def answers(refused):
    return [Sample("v", "s", "jailbreak", True, "", f"p{i}", " ok", r) for i, r in enumerate(refused)]


def test_worst_cases_are_of_attacks_with_several_attempts(model):
    attempts = [jailbreaks.asked(), *jailbreaks.bare(), *jailbreaks.scalings(3, LayerRange(1, 2), (0.5, 0.9), 2, 0)]
    samples = {a.variant.name: answers((True, True)) for a in attempts}
    samples["layers 1 x 0.5"] = answers((False, True))
    samples["layers 1 x 0.9"] = answers((True, False))
    samples["other layers x 0.9, draw 2"] = answers((False, True))
    attack, control = tries_of(attempts, samples)
    assert (attack.attack, attack.k, attack.draws, attack.worst.value) == ("scaling", 2, 1, 1.0)
    assert (control.control, control.k, control.draws, control.worst.value) == (True, 2, 2, 0.25)


def test_answers_with_openings_are_judged_on_what_follows_and_on_the_whole(model):
    attempts = [jailbreaks.asked(), *jailbreaks.prefills(model.tokenizer, ("I cannot, but",))]
    samples = {a.variant.name: answers((False, False, True)) for a in attempts}
    whole = dataclasses.replace(JUDGE, rule=lambda text: text.startswith("I cannot"))
    first, second = begun(attempts, samples, whole)
    assert (first.opening, first.behind.value, first.whole.value) == ("I cannot, but", pytest.approx(2 / 3), 0.0)
    assert second.whole.value == 1.0
