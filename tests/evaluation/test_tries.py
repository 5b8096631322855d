"""The worst of several tries against a plain loop, and on answers that can be counted by hand."""

import dataclasses

import numpy as np
import pytest

from jaxsafe.evaluation.stats import rate
from jaxsafe.evaluation.tries import ever, tries
from jaxsafe.records.run import Sample

OUTCOMES = {"c": (False, False), "r": (True, False), "b": (False, True), "?": (None, False)}
"""Letter -> refused, broken: complied, refused, broken, unscored."""


def tried(harmful, safe=""):
    """The answers of one try: a letter a prompt."""
    labelled = [(True, letter) for letter in harmful] + [(False, letter) for letter in safe]
    return [
        Sample("v", "s", "jailbreak", label, "", f"prompt {i}", "text", OUTCOMES[letter][0], broken=OUTCOMES[letter][1])
        for i, (label, letter) in enumerate(labelled)
    ]


def test_the_worst_case_counts_prompts_and_one_try_counts_answers():
    found = tries("decoding", False, [[tried("ccrr", "rc"), tried("crcr", "cb"), tried("rrrb", "cc")]])
    assert (found.k, found.draws) == (3, 1)
    assert (found.complied.value, found.complied.n) == (4 / 12, 12)
    assert found.worst == rate([True, True, True, False])
    assert (found.broken.value, found.broken.n) == (1 / 12, 12)
    assert (found.refused.value, found.ever_refused) == (1 / 6, rate([True, False]))
    assert found.ever_broken == rate([False, True])


def test_a_single_try_is_its_own_worst_case():
    found = tries("prefill", True, [[tried("crrbc?", "rrc")]])
    assert found.worst == rate([True, False, False, False, True, None])
    assert found.ever_refused == rate([True, True, False])
    for one, worst in ((found.complied, found.worst), (found.refused, found.ever_refused)):
        assert dataclasses.astuple(one) == pytest.approx(dataclasses.astuple(worst))


def test_broken_answers_are_no_success_however_often_they_come():
    assert tries("scaling", False, [[tried("bb")] * 5]).worst.value == 0


@pytest.mark.parametrize("seed", range(3))
def test_is_a_plain_loop_over_draws_prompts_and_tries(seed):
    rng = np.random.default_rng(seed)
    letters = rng.choice(list("crb?"), (2, 3, 20), p=(0.2, 0.5, 0.2, 0.1))
    found = tries("scaling", True, [[tried("".join(row[:12]), "".join(row[12:])) for row in draw] for draw in letters])
    one = won = scored = asked = ever_refused = safe = 0
    for draw in letters:
        for prompt in range(20):
            answers = [draw[k][prompt] for k in range(3)]
            if prompt < 12:
                one += answers.count("c")
                scored += 3 - answers.count("?")
                won += "c" in answers
                asked += answers.count("?") < 3
            else:
                ever_refused += "r" in answers
                safe += answers.count("?") < 3
    assert (found.complied.n, found.complied.value) == (scored, pytest.approx(one / scored))
    assert (found.worst.n, found.worst.value) == (asked, pytest.approx(won / asked))
    assert (found.ever_refused.n, found.ever_refused.value) == (safe, pytest.approx(ever_refused / safe))
    assert found.worst.value >= found.complied.value


def test_a_prompt_is_unscored_where_all_its_answers_are():
    assert [ever(flags) for flags in ([None, None], [None, False], [None, True])] == [None, False, True]
    assert tries("decoding", False, [[tried("?c"), tried("?r")]]).worst == rate([None, True])


def test_tries_of_other_prompts_and_draws_of_other_sizes_are_refused():
    other = [dataclasses.replace(sample, prompt="another") for sample in tried("cr")]
    with pytest.raises(ValueError, match="'decoding' have different prompts"):
        tries("decoding", False, [[tried("cr"), other]])
    with pytest.raises(ValueError, match=r"'scaling' have \[1, 2\] tries"):
        tries("scaling", False, [[tried("cr")], [tried("cr")] * 2])
