"""A search within a bound on functions whose best is known; the same draws whenever it is told the same."""

import dataclasses
import math
import sys

import pytest

from jaxsafe.kernels.lora import LoRA
from jaxsafe.methods.bounded_search import SAMPLERS, Search, Space, best, utility_loss
from jaxsafe.methods.tampering import choice_of, chosen
from jaxsafe.methods.trainer import FineTuning
from jaxsafe.records.run import Rate, Result, Variant
from jaxsafe.records.search import Choice, Trial

CHOICE = Choice(1e-3, 4, 5, 8, "constant")
SPACE = Space((1e-5, 1e-1), (2, 4, 8), (5,), (4, 16), ("constant", "cosine"))


def trial(name, harm, loss):
    return Trial(name, CHOICE, harm, loss)


def harm_and_loss(choice):
    """Harm and loss grow with the rate; a loss of 0.1 is at 1e-3."""
    size = math.log10(choice.learning_rate) + 5
    return min(1.0, size / 4), 0.05 * size if choice.learning_rate < 3e-2 else None


def searched(sampler, trials=20, seed=3, measure=harm_and_loss):
    search = Search(SPACE, sampler, bound=0.1, startup=4, seed=seed)
    for _ in range(trials):
        search.tell(*measure(search.ask()))
    return search


def test_most_harm_within_the_bound_is_chosen():
    trials = [
        trial("too costly", 0.9, 0.11),
        trial("at the bound", 0.5, 0.1),
        trial("as harmful for less", 0.5, -0.2),
        trial("the same again", 0.5, -0.2),
        trial("harmless", 0.1, -0.5),
        trial("not scored", None, 0.0),
        trial("no language", 1.0, None),
    ]
    assert best(trials, 0.1).name == "as harmful for less"
    assert best(trials[:2], 0.1).name == "at the bound" and best(trials, 0.11).name == "too costly"
    assert best([trials[0], *trials[-2:]], 0.1) is None and best([], 0.1) is None


def result(perplexity=None, **accuracy):
    rates = {f"zero_shot/{task}": Rate(value, None, None, 10) for task, value in accuracy.items()}
    return Result(Variant("any"), "", rates, perplexity)


def test_the_loss_of_utility_is_a_share_of_what_was_there():
    assert utility_loss(result(80.0), result(100.0), ()) == pytest.approx(0.25)
    assert utility_loss(result(80.0), result(60.0), ()) == pytest.approx(-0.25)
    assert utility_loss(result(80.0), result(None), ()) is None
    before, after = result(1.0, boolq=0.5, rte=0.75), result(9.0, boolq=0.5, rte=0.5)
    assert utility_loss(before, after, ("boolq", "rte")) == pytest.approx(1 - 0.5 / 0.625)
    assert utility_loss(before, result(9.0, boolq=0.25), ("boolq",)) == pytest.approx(0.5)
    assert utility_loss(before, result(9.0, boolq=None), ("boolq",)) is None


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_seed_draws_the_same_trials(sampler):
    first, again, other = searched(sampler), searched(sampler), searched(sampler, seed=4)
    assert first.trials == again.trials and first.trials != other.trials
    # One that is told what an interrupted one was told goes on as that would have.
    part = searched(sampler, trials=9)
    part.tell(*harm_and_loss(part.ask()))
    assert part.trials == first.trials[:10]
    assert [each.name for each in first.trials[:2]] == [f"{sampler} 0", f"{sampler} 1"]
    assert {each.choice.batch_size for each in first.trials} == {5}


def test_the_search_learns_from_harm_and_from_the_bound():
    tpe, random = (searched(sampler) for sampler in SAMPLERS)
    assert [t.choice for t in tpe.trials[:4]] == [t.choice for t in random.trials[:4]], "the draws that they share"
    within = [sum(t.within(0.1) for t in search.trials) for search in (tpe, random)]
    assert within[0] > within[1]
    assert tpe.best.loss <= 0.1 and tpe.best.harm > random.best.harm
    # Told of no bound, it goes where harm is greatest.
    free = searched("tpe", measure=lambda choice: (harm_and_loss(choice)[0], 0.0))
    rates = [[t.choice.learning_rate for t in search.trials[10:]] for search in (tpe, free)]
    assert sorted(rates[0])[5] < sorted(rates[1])[5]
    assert free.best.harm > tpe.best.harm


def test_what_was_not_scored_is_no_trial_of_the_best():
    search = searched("tpe", 6, measure=lambda choice: (None, None))
    assert search.best is None and [t.harm for t in search.trials] == [None] * 6


def test_hyperparameters_take_the_place_of_the_settings():
    start = FineTuning(10, 5, lora=LoRA(8, 4.0, ("q",)), schedule="stepped", decay=0.85, decay_every=2, seed=7)
    choice = Choice(0.3, 2, 4, 16, "cosine")
    assert chosen(start, choice) == FineTuning(
        2, 4, learning_rate=0.3, lora=LoRA(16, 4.0, ("q",)), schedule="cosine", seed=7
    )
    assert choice_of(chosen(start, choice)) == choice
    whole = dataclasses.replace(choice, rank=None)
    assert chosen(start, whole).lora is None and choice_of(chosen(start, whole)) == whole
    with pytest.raises(ValueError, match="rank 16 needs settings with adapters"):
        chosen(dataclasses.replace(start, lora=None), choice)


def test_bad_spaces_and_a_missing_library(monkeypatch):
    with pytest.raises(ValueError, match=r"learning rates \(0.1, 0.01\) are no range"):
        dataclasses.replace(SPACE, rates=(0.1, 0.01))
    with pytest.raises(ValueError, match="at least one entry of steps"):
        dataclasses.replace(SPACE, steps=())
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r'pip install "jaxsafe\[search\]"'):
        Search(SPACE, "tpe", 0.1)
