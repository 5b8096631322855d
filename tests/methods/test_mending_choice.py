"""The choice of rules to mend by against plain loops."""

import itertools

import numpy as np
import pytest

from jaxsafe.methods.mending_choice import best_chain, choose
from jaxsafe.records.overrefusal import Tried


def slow_best(complied, nats):
    """`best_chain` by loops."""
    C, n = complied.shape
    chains = {}
    for first, second in itertools.product(range(C), repeat=2):
        mended, total = [], 0.0
        for i in range(n):
            for number in (first, second):
                if complied[number][i]:
                    mended.append(i)
                    total += nats[number][i]
                    break
        chains[first, second] = set(mended), total / max(1, len(mended))
    best = max(chains.values(), key=lambda chain: len(chain[0]))[0]
    alike = {}
    for pair, (mended, mean) in chains.items():
        behind = np.array([(i in best) - (i in mended) for i in range(n)], float)
        if mended and behind.mean() <= behind.std() / np.sqrt(n) + 1e-12:
            alike[pair] = (round(mean, 6), pair[0] != pair[1], pair)
    return min(alike, key=alike.get)


@pytest.mark.parametrize("seed", range(6))
def test_the_chain_is_the_most_probable_of_those_that_mend_as_often(seed):
    generator = np.random.default_rng(seed)
    complied = generator.random((4, 25)) < generator.random((4, 1))
    nats = generator.random((4, 25)) + generator.random((4, 1))
    assert best_chain(complied, np.where(complied, nats, 0)) == slow_best(complied, nats)


def tried(name, complied, nats):
    return Tried(name, tuple(map(bool, complied)), tuple(nats), 0)


def test_a_gentle_rule_goes_first_and_a_strong_one_mends_the_rest():
    gentle = tried("gentle", [1] * 15 + [0] * 15, [0.5] * 30)
    strong = tried("strong", [1] * 30, [2.0] * 30)
    assert choose([strong, gentle]) == ((1, 0), 1.0)


def test_one_rule_is_enough_where_another_adds_nothing():
    assert choose([tried("a", [1, 1, 1, 0], [0.5] * 4), tried("b", [1, 0, 0, 0], [0.9] * 4)])[0] == (0,)


def test_how_often_resamples_choose_the_same_is_said():
    generator = np.random.default_rng(0)
    rules = [tried(str(i), generator.random(12) < 0.5, generator.random(12)) for i in range(5)]
    chosen, stability = choose(rules, seed=3)
    assert 0 < stability < 1 and choose(rules, seed=3) == (chosen, stability)


def test_nothing_mended_is_an_error():
    with pytest.raises(ValueError, match="no rule makes the model answer"):
        choose([tried("a", [0, 0], [None, 0.3])])
