"""What is finished is read instead of made, and what is left is made alone."""

import dataclasses
import json

import exams
import numpy as np
import pytest
from exams import MIXED, SETTINGS
from tiny import tiny_chat_model, tiny_params

import jaxsafe.chat.model
import jaxsafe.chat.steered
from jaxsafe.io.store import Store
from jaxsafe.prompts.sets import PromptSet
from jaxsafe.records.run import Variant
from jaxsafe.study.study import Study

PLAIN = Variant("plain", "as it is")


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def asked(monkeypatch):
    """How many rows each call of a generating program answers, padding left out."""
    rows = []

    def counting(generate, place):
        def counted(*given):
            rows.append(int(np.asarray(given[place].valid).any(axis=1).sum()))
            return generate(*given)

        return counted

    for module, name, place in (
        (jaxsafe.chat.model, "generate", 2),
        (jaxsafe.chat.steered, "prefill_and_read", 2),
    ):
        monkeypatch.setattr(module, name, counting(getattr(module, name), place))
    return rows


def killing(asked, after):
    """A watch whose progress ends the run once `after` batches are answered, as `asked` counts them."""

    class Watch:
        def __call__(self, stage, total):
            return self

        def __enter__(self):
            return self.done

        def __exit__(self, *error):
            return False

        def done(self, n):
            if len(asked) == after:
                raise Killed

    return Watch()


def never():
    raise AssertionError("made again")


def test_a_stored_result_is_not_made_again(model, tmp_path, asked):
    exam = exams.quick_exam(model)
    study = Study(tmp_path, model, exam)
    assert not study.has(PLAIN) and not study.finished(PLAIN)
    result = study.examine(PLAIN, model)
    assert sum(asked) == exam.size and len(study.tokens) == 1
    assert study.has(PLAIN) and result.variant == PLAIN and result.key == study.key(PLAIN)
    assert study.examine(PLAIN, never) == result
    again = Study(tmp_path, model, exam)
    assert again.examine(PLAIN, never) == result
    assert again.examined == study.examined and again.tokens == []
    assert sum(asked) == exam.size
    assert not list(tmp_path.glob("store/answers-*")), "answers are kept twice"


def test_make_is_called_where_there_is_something_to_make(model, tmp_path):
    study = Study(tmp_path, model, exams.quick_exam(model))
    with pytest.raises(AssertionError, match="made again"):
        study.examine(PLAIN, never)
    assert not study.examined
    first = study.examine(PLAIN, lambda: model)
    other = Variant("other", "other weights", baseline="plain")
    second = study.examine(other, lambda: model.with_params(tiny_params(model.config, seed=1)))
    assert list(study.examined) == ["plain", "other"] and first.key != second.key
    texts = [[s.text for s in examined.samples] for examined in study.examined.values()]
    assert texts[0] != texts[1]
    assert [{s.variant for s in examined.samples} for examined in study.examined.values()] == [{"plain"}, {"other"}]


@pytest.mark.parametrize("after", [1, 3, -1], ids=["first batch", "third batch", "last batch"])
def test_a_killed_exam_makes_only_what_is_left(model, tmp_path, asked, after):
    exam = exams.quick_exam(model, settings=SETTINGS[:2], batch_size=2)
    whole = Study(tmp_path / "whole", model, exam)
    whole.examine(PLAIN, model)
    batches = list(asked)
    assert sum(batches) == exam.size and max(batches) == 2
    asked.clear()
    after = after % (len(batches) + 1)
    with pytest.raises(Killed):
        Study(tmp_path / "out", model, exam, killing(asked, after)).examine(PLAIN, model)
    assert asked == batches[:after]
    asked.clear()
    study = Study(tmp_path / "out", model, exam)
    assert not study.has(PLAIN)
    result = study.examine(PLAIN, model)
    assert sum(asked) == exam.size - sum(batches[:after])
    assert study.examined["plain"].samples == whole.examined["plain"].samples
    assert result == whole.examined["plain"].result
    assert not list(tmp_path.glob("*/store/answers-*"))


def test_a_killed_exam_draws_the_samples_of_a_question_again(model, tmp_path, asked):
    exam = exams.quick_exam(model, settings=(SETTINGS[0], SETTINGS[2]), batch_size=8)
    whole = Study(tmp_path / "whole", model, exam)
    whole.examine(PLAIN, model)
    greedy = np.cumsum(asked).tolist().index(6) + 1
    asked.clear()
    # In the midst of the samples of the first set: those are drawn together.
    with pytest.raises(Killed):
        Study(tmp_path / "out", model, exam, killing(asked, greedy + 1)).examine(PLAIN, model)
    assert 6 < sum(asked) < 6 + 15
    asked.clear()
    study = Study(tmp_path / "out", model, exam)
    study.examine(PLAIN, model)
    assert sum(asked) == exam.size - 6
    assert study.examined["plain"].samples == whole.examined["plain"].samples


def test_equal_prompts_are_drawn_as_in_a_run_that_was_not_killed(model, tmp_path, asked):
    warm = dataclasses.replace(SETTINGS[0], temperature=1.0)
    twice = PromptSet("twice", ("why?",) * 4, (True,) * 4, ("",) * 4)
    exam = exams.quick_exam(model, settings=(warm,), prompts=(twice,), batch_size=2)
    whole, study = (Study(tmp_path / name, model, exam) for name in ("whole", "out"))
    whole.examine(PLAIN, model)
    texts = [s.text for s in whole.examined["plain"].samples]
    assert len(set(texts)) == 4
    asked.clear()
    with pytest.raises(Killed):
        Study(tmp_path / "out", model, exam, killing(asked, 1)).examine(PLAIN, model)
    study.examine(PLAIN, model)
    assert [s.text for s in study.examined["plain"].samples] == texts


def test_a_torn_log_of_answers_loses_its_last_line_alone(model, tmp_path, asked):
    exam = exams.quick_exam(model, batch_size=2)
    whole = Study(tmp_path / "whole", model, exam)
    whole.examine(PLAIN, model)
    asked.clear()
    with pytest.raises(Killed):
        Study(tmp_path / "out", model, exam, killing(asked, 2)).examine(PLAIN, model)
    (log,) = (tmp_path / "out/store").glob("answers-*.jsonl")
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines)[:-7])
    asked.clear()
    study = Study(tmp_path / "out", model, exam)
    study.examine(PLAIN, model)
    assert sum(asked) == exam.size - len(lines) + 1
    assert study.examined["plain"].samples == whole.examined["plain"].samples


def test_another_exam_does_not_take_the_answers_of_a_killed_one(model, tmp_path, asked):
    with pytest.raises(Killed):
        Study(tmp_path, model, exams.quick_exam(model), killing(asked, 1)).examine(PLAIN, model)
    asked.clear()
    other = exams.quick_exam(model, decoding=dataclasses.replace(exams.quick_exam(model).decoding, max_new_tokens=4))
    Study(tmp_path, model, other).examine(PLAIN, model)
    assert sum(asked) == other.size


@pytest.mark.parametrize("change", ["seed", "judge", "set"])
def test_another_exam_makes_its_own_results(model, tmp_path, change):
    exam = exams.quick_exam(model)
    Study(tmp_path, model, exam).examine(PLAIN, model)
    changes = {
        "seed": {"decoding": dataclasses.replace(exam.decoding, seed=9)},
        "judge": {"judge": dataclasses.replace(exam.judge, version="2")},
        "set": {"prompts": (exams.BAD, dataclasses.replace(MIXED, name="renamed"))},
    }
    study = Study(tmp_path, model, dataclasses.replace(exam, **changes[change]))
    assert not study.has(PLAIN)
    result = study.examine(PLAIN, model)
    assert ("refusal_toy/renamed/test/safe" in result.rates) == (change == "set")
    renamed = "renamed/test" if change == "set" else "mixed/test"
    assert {s.set for s in study.examined["plain"].samples} == {"bad", renamed}
    # The first exam's are there, too.
    assert Study(tmp_path, model, exam).has(PLAIN)


def test_another_model_makes_its_own_results(model, tmp_path):
    exam = exams.quick_exam(model)
    Study(tmp_path, model, exam).examine(PLAIN, model)
    other = model.with_params(tiny_params(model.config, seed=1))
    assert not Study(tmp_path, other, exam).has(PLAIN)
    assert not Study(tmp_path, model.with_prompt("Be kind."), exam).has(PLAIN)


def test_two_variants_of_one_name_are_refused(model, tmp_path):
    study = Study(tmp_path, model, exams.quick_exam(model))
    study.examine(PLAIN, model)
    for other in (
        Variant("plain", "otherwise"),
        dataclasses.replace(PLAIN, baseline="x"),
        dataclasses.replace(PLAIN, about={"strength": 1}),
    ):
        with pytest.raises(ValueError, match="two variants are named 'plain'; give each a name of its own"):
            study.examine(other, never)
    together = [Variant("on", 1), Variant("on", 2)]
    with pytest.raises(ValueError, match="two variants are named 'on'; give each a name of its own"):
        study.examine_together(together, never)
    assert list(study.examined) == ["plain"]


def test_a_variant_of_another_name_takes_the_result_that_it_follows_from(model, tmp_path):
    exam = exams.quick_exam(model)
    first = Study(tmp_path, model, exam)
    result = first.examine(PLAIN, model)
    renamed = Variant("renamed", PLAIN.follows, "base", "control", "group", {"strength": 2})
    study = Study(tmp_path, model, exam)
    assert study.examine(renamed, never) == dataclasses.replace(result, variant=renamed)
    samples = study.examined["renamed"].samples
    assert {s.variant for s in samples} == {"renamed"}
    assert [dataclasses.replace(s, variant="plain") for s in samples] == list(first.examined["plain"].samples)
    # Both names in one study, too.
    assert study.examine(PLAIN, never) == result


def test_a_finished_variant_takes_its_place(model, tmp_path):
    exam = exams.quick_exam(model)
    Study(tmp_path, model, exam).examine(PLAIN, model)
    study = Study(tmp_path, model, exam)
    assert study.has(PLAIN) and not study.examined
    assert study.finished(PLAIN) and list(study.examined) == ["plain"]


def test_several_steerings_answer_as_each_alone(model, tmp_path, asked):
    exam = exams.quick_exam(model, texts=tuple(exams.small_exam(model).texts))
    rules = {"off": None, "weak": exams.steering(model, 0.5), "strong": exams.steering(model, 4.0)}
    variants = [Variant(name, ["steered", name]) for name in rules]
    together = Study(tmp_path / "together", model, exam)
    results = together.examine_together(variants, lambda: model.steered(list(rules.values())))
    assert [result.variant for result in results] == variants and list(together.examined) == list(rules)
    assert sum(asked) >= exam.size and not [n for n in asked if n > exam.batch_size]
    texts = {name: [s.text for s in found.samples] for name, found in together.examined.items()}
    assert len(set(map(tuple, texts.values()))) == 3
    for variant, rule, result in zip(variants, rules.values(), results, strict=True):
        alone = Study(tmp_path / variant.name, model, exam)
        (own,) = alone.examine_together([variant], lambda rule=rule: model.steered([rule]))
        samples = alone.examined[variant.name].samples
        assert [s.text for s in samples] == texts[variant.name]
        assert own.rates == result.rates and own.key == result.key
        assert own.perplexity == pytest.approx(result.perplexity, rel=1e-5)
        found = together.examined[variant.name].samples
        assert [s.steered_as_harmful for s in samples] == [s.steered_as_harmful for s in found]
        if rule is not None:
            np.testing.assert_allclose([s.score for s in samples], [s.score for s in found], atol=1e-6)


def test_steerings_go_on_together_after_a_kill(model, tmp_path, asked):
    exam = exams.quick_exam(model, batch_size=2)
    variants, rules = [Variant("off", 0), Variant("on", 1)], [None, exams.steering(model, 4.0)]
    whole = Study(tmp_path / "whole", model, exam)
    whole.examine_together(variants, lambda: model.steered(rules))
    asked.clear()
    with pytest.raises(Killed):
        study = Study(tmp_path / "out", model, exam, killing(asked, 1))
        study.examine_together(variants, lambda: model.steered(rules))
    assert 0 < sum(asked) < exam.size
    study = Study(tmp_path / "out", model, exam)
    study.examine_together(variants, lambda: model.steered(rules))
    assert sum(asked) == exam.size
    assert study.examined == whole.examined
    again = Study(tmp_path / "out", model, exam)
    again.examine_together(variants, never)
    assert again.examined == whole.examined
    # One of several that are together finished is read alone.
    assert Study(tmp_path / "out", model, exam).examine(variants[1], never) == whole.examined["on"].result


def test_studies_of_other_exams_fill_one_table(model, tmp_path):
    study = Study(tmp_path, model, exams.quick_exam(model))
    other = study.under(exams.quick_exam(model, prompts=(exams.BAD,)))
    study.examine(PLAIN, model)
    other.examine(Variant("elsewhere", "as it is"), model)
    assert list(study.examined) == list(other.examined) == ["plain", "elsewhere"]
    assert [len(found.samples) for found in study.examined.values()] == [6, 3]
    assert [found.exam for found in study.examined.values()] == [study.exam, other.exam]
    assert len(study.tokens) == 2 and study.store == Store(tmp_path / "store") == other.store


def test_what_is_stored_is_json_of_today(model, tmp_path):
    study = Study(tmp_path, model, exams.quick_exam(model))
    study.examine(PLAIN, model)
    path = study.store.path("result", [study.identity, PLAIN.follows], ".json")
    content = json.loads(path.read_text())
    assert len(content["samples"]) == 6 and content["result"]["key"] == study.key(PLAIN)
    content["result"]["rates"] = 3
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="are no Kept: Expected `object`, got `int` - at"):
        Study(tmp_path, model, study.exam).examine(PLAIN, never)
