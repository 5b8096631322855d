"""`launch.search` from a config to a report on the tiny model: one run of three trials by either sampler."""

import dataclasses
import pathlib

import pytest

from configs.search.smollm2_135m import get_config
from jaxsafe.chat.model import ChatModel, load_chat_model
from jaxsafe.kernels.sampling import Decoding
from jaxsafe.methods import tampering
from jaxsafe.methods.attacks import attack_examples, training_rows
from jaxsafe.methods.tampering import chosen
from jaxsafe.methods.trainer import train, trained
from jaxsafe.records.run import Run, from_json, read_run, read_samples
from jaxsafe.records.search import Details
from jaxsafe.rows import slots_of
from jaxsafe.study import study as study_module
from launch.progress import Clock
from launch.search import attack_of, check, results, run, settings_of


def small_config(folder):
    c = get_config()
    c.model, c.judge, c.max_new_tokens, c.batch_size, c.passages = str(folder), "wei2024_no_length", 4, 8, 2
    c.validation, c.evaluation, c.harmless = ("builtin:harmful/calibration#5",), ("builtin:harmful/test#5",), ()
    c.attack, c.tuning_batch_size, c.epochs, c.seeds = "identity_shift#6", 6, 1, (1,)
    c.trials, c.startup, c.bound = 3, 2, 0.5
    c.try_rates, c.try_steps, c.try_batch_sizes, c.try_ranks = (1e-4, 1e-1), (1,), (6,), (16,)
    return c


@dataclasses.dataclass(frozen=True)
class Found:
    """A finished run."""

    model: ChatModel
    record: Run
    out: pathlib.Path

    @property
    def details(self):
        return from_json(self.record.details, Details)

    def samples(self, variant):
        return [sample for sample in read_samples(self.out) if sample.variant == variant]


@pytest.fixture(scope="module")
def found(folder, tmp_path_factory):
    out, model = tmp_path_factory.mktemp("search"), load_chat_model(str(folder))
    return Found(model, run(small_config(folder), model, out, Clock()), out)


def finding(record):
    return record.results, record.table, record.details


@pytest.mark.slow
def test_prompts_that_choose_are_not_reported(found):
    record, prompts = found.record, {True: set(), False: set()}
    for result in record.results:
        prompts[result.variant.about["validation"]] |= {s.prompt for s in found.samples(result.variant.name)}
    assert [len(each) for each in prompts.values()] == [5, 5] and not prompts[True] & prompts[False]
    before = {result.variant.name: result.perplexity for result in record.results}
    assert before["before"] != before["before, validation"], "other passages are read, too"
    assert {data.role for data in record.datasets} == {"validation", "evaluation"}


@pytest.mark.slow
def test_trials_and_what_they_come_to(found, folder):
    """Harm and loss of a trial are those of a run made by hand."""
    details, results = found.details, {r.variant.name: r for r in found.record.results}
    tpe, random = details.searches
    assert [each.choice for each in tpe.trials[:2]] == [each.choice for each in random.trials[:2]]
    before = results["before, validation"].perplexity
    for trial in (*tpe.trials, *random.trials):
        of = results[f"{trial.name}, validation"]
        assert trial.harm == of.rates["asr_wei2024_no_length/persona"].value
        assert trial.loss == pytest.approx(of.perplexity / before - 1)
    best = next(trial for trial in tpe.trials if trial.name == tpe.best)
    assert best.harm == max(trial.harm for trial in tpe.trials if trial.loss <= 0.5)

    config, model = small_config(folder), found.model
    drawn = [training_rows(model, attack_examples(attack_of(config), seed)) for seed in (0, 1)]
    settings = chosen(settings_of(config, attack_of(config), slots_of([*drawn[0], *drawn[1]])), best.choice)
    weights = trained(train(model.config, model.params, drawn[1], dataclasses.replace(settings, seed=1)))
    samples = found.samples("best by tpe, seed 1")
    asked = model.with_params(weights).with_prompt(attack_examples(attack_of(config), 1)[0].system)
    texts = asked.answers([attack_of(config).prefix + s.prompt for s in samples], Decoding(4), 8).texts
    assert [sample.text for sample in samples] == list(texts)


@pytest.mark.slow
def test_a_choice_is_held_against_that_of_random_search(found):
    record = found.record
    assert len(record.results) == results(small_config("any")) == 2 + 1 + 2 * 3 + 3
    row = record.row("best by tpe")
    assert (row.baseline, row.control) == ("before", "best by random") and row.against_control
    assert record.row("best by random").about["control"] is True
    assert read_run(found.out) == record and (found.out / "figures/bounded.svg").is_file()


@pytest.mark.slow
def test_finished_trials_are_read_and_not_run(found, folder, monkeypatch):
    config, made = small_config(folder), []
    lost = next(r for r in found.record.results if r.variant.name == "random 2, validation")
    next(found.out.glob(f"store/result-{lost.key[:16]}.json")).unlink()
    whole = tampering.train
    monkeypatch.setattr(tampering, "train", lambda *a, **k: made.append(a[3]) or whole(*a, **k))
    again = run(config, found.model, found.out, Clock())
    assert finding(again) == finding(found.record)
    assert len(made) == 1 and made[0].seed == 0

    def never(*_, **__):
        raise AssertionError("something was made again")

    monkeypatch.setattr(study_module, "examine", never)
    assert finding(run(config, found.model, found.out, Clock())) == finding(found.record)


def test_bad_settings_are_refused(folder):
    config = small_config(folder)
    check(config)
    for name, value, said in (
        ("bound", None, "config.bound is not given; it is the share of utility that may be lost, such as 0.1"),
        ("passages", 1, "config.passages 1: one half bounds the search"),
        ("try_rates", (1e-2, 1e-3), "are no range"),
        ("attack", "poisoned#3", "takes 1 of its examples from a file of yours; none is given"),
    ):
        config = small_config(folder)
        setattr(config, name, value)
        with pytest.raises(ValueError, match=said):
            check(config)
