"""Attempts that leave the weights alone, each against what it must come to exactly."""

import dataclasses

import numpy as np
import pytest
from exams import BAD, JUDGE, quick_exam
from tiny import tiny_chat_model

from jaxsafe.chat.model import KEEP
from jaxsafe.digest import digest
from jaxsafe.evaluation.settings import Setting
from jaxsafe.kernels.sampling import Decoding, Sampling
from jaxsafe.methods import jailbreaks
from jaxsafe.methods.jailbreak_findings import begun, tries_of
from jaxsafe.model.layers import LayerRange
from jaxsafe.model.weights import flatten, linear_maps
from jaxsafe.records.run import Sample
from jaxsafe.study.exam import Question


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("raw", [False, True])
def test_an_opening_is_asked_and_an_answer_follows_it(model, raw):
    opening, follows = "Sure, here", " is the tallest tree"
    plain = model.with_prompt(raw=raw)
    begun = plain.with_prompt(opening=opening)
    before, after = (tuple(model.tokenizer.plain_ids(text)) for text in (opening, follows))
    asked, read = begun.row("why?"), begun.row("why?", follows)
    assert asked.ids == plain.row("why?").ids + before and asked.instruction_end == len(asked.ids) - 1
    assert read.ids == asked.ids + after and read.instruction_end == asked.instruction_end
    assert begun.fingerprint() != plain.fingerprint() == begun.with_prompt(opening="").fingerprint()


def test_questions_ask_and_draw_as_their_setting_says(model):
    drawn = Setting("jailbreak", temperature=0.5, top_k=3, top_p=0.8, opening="Sure")
    question = Question(drawn, BAD)
    assert question.rows(model) == model.with_prompt(opening="Sure").rows(list(BAD.prompts))
    own = Decoding(5, Sampling(temperature=1.0, top_k=7, top_p=0.7))
    sampling = question.decoding(own).sampling
    assert [float(x) for x in (sampling.temperature, sampling.top_k, sampling.top_p)] == pytest.approx([0.5, 3, 0.7])
    cut = Question(dataclasses.replace(drawn, top_k=0), BAD).decoding(own).sampling
    assert int(cut.top_k) == 7  # that of the run, where the setting has none


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


def test_an_exam_is_another_one_for_each_way_of_asking_and_drawing(model):
    ways = [jailbreaks.asked(), *jailbreaks.bare(), *jailbreaks.personas(), *jailbreaks.decodings((0.5,), (0.5,), (1,))]
    ways += [*jailbreaks.prefills(model.tokenizer, ("Sure",)), *jailbreaks.suffixed(model.tokenizer, ("now",))]
    exam = quick_exam(model)
    identities = [digest(way.exam(exam).identity(model)) for way in ways]
    assert len(set(identities)) == len(ways) == 14


def test_ablated_directions_are_the_one_and_random_ones_of_unit_length(model):
    direction = np.eye(model.config.embed, dtype=np.float32)[3]
    first, *controls = jailbreaks.ablations(direction, 2, seed=3)
    vectors = [attempt.edit.args[0] for attempt in (first, *controls)]
    np.testing.assert_array_equal(vectors[0], direction)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    assert np.abs(vectors[1] @ vectors[2]) < 0.9
    assert len({str(a.variant.follows) for a in (first, *controls)}) == 3
    assert [c.variant.of for c in controls] == ["random direction ablated"] * 2 and [c.draw for c in controls] == [0, 1]


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
