"""The choice of SCANS's threshold, layers and strength, against brute force and plain passes."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scans_case import FIRST, LABELS, NEW, PROMPTS, SECOND, slow_auroc
from tiny import decoding, tiny_chat_model, tiny_params

from jaxsafe.chat.answers import Answers
from jaxsafe.evaluation.judges.broken import BrokenJudge
from jaxsafe.evaluation.judges.keyword import KeywordJudge
from jaxsafe.evaluation.language import answer_rows
from jaxsafe.evaluation.stats import best_threshold
from jaxsafe.io.store import Store
from jaxsafe.kernels.generate import generate
from jaxsafe.kernels.sampling import Decoding, Sampling
from jaxsafe.methods import scans_calibration
from jaxsafe.methods.scans import find_directions, read_prompts, steering_of, vocabulary
from jaxsafe.methods.scans_calibration import (
    Calibration,
    InHand,
    OpenChoice,
    Trial,
    best_outcome,
    calibrate,
    choose_classifier,
    choose_once,
    choose_strength,
    layer_candidates,
    outcomes,
    shares,
    try_strengths,
)
from jaxsafe.model.layers import LayerRange
from jaxsafe.model.taps import edit
from jaxsafe.model.transformer import forward
from jaxsafe.records.run import outcome
from jaxsafe.records.scans import Candidate, Choice, Segment, Token, Vocabulary
from jaxsafe.rows import Row, pad_rows

# Refused where the answer has an even number of vowels: a rule that a random model obeys now and then.
RULE = KeywordJudge(
    "vowels", "1", lambda text: sum(c in "aeiou" for c in text.lower()) % 2 == 0 if text.strip() else None
)
WHOLE, LAST = LayerRange(0, 3), LayerRange(1, 3)
SETTINGS = [(LayerRange(1, 2), 0.3), (LAST, 0.6)]
# An untrained model finds every answer about as improbable as chance, ln 512 = 6.2 nats a token.
WHOLE_ANSWERS, SOME_BROKEN = BrokenJudge(1e9, 2.0, 1e9), BrokenJudge(6.3, 2.0, 1e9)
CALIBRATION = Calibration(PROMPTS, tuple(LABELS), RULE, Decoding(NEW), 8, 1e9, 0.2, WHOLE_ANSWERS)
whole = jax.jit(forward, static_argnames=("config", "last"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def directions(model):
    return find_directions(model, FIRST, SECOND, batch_size=8)


@pytest.fixture(scope="module")
def reading(model, directions):
    return read_prompts(model, directions, PROMPTS, 8)


@pytest.fixture(scope="module")
def scores(reading):
    return reading.cosines.mean(1)


# The classifier


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(4, 12))
@example(8, 5, 8)  # ranges of equal area whose sums differ in their last bits
def test_the_classifier_is_the_best_of_all_ranges(seed, layers, n):
    rng = np.random.default_rng(seed)
    cosines = rng.standard_normal((n, layers))
    harmful = np.array([True, False, *(rng.random(n - 2) < 0.5).tolist()])
    chosen, threshold = choose_classifier(cosines, harmful.tolist(), shortest=1)
    first, end = chosen.first, chosen.stop
    merits = {
        (a, b): slow_auroc(cosines[:, a:b].mean(1), harmful) for a in range(layers) for b in range(a + 1, layers + 1)
    }
    best = [r for r in merits if merits[r] > max(merits.values()) - 1e-12]
    assert (first, end) in best and end - first == max(b - a for a, b in best)
    scores = cosines[:, first:end].mean(1)

    def balanced(at):
        return ((scores >= at)[harmful].mean() + (scores < at)[~harmful].mean()) / 2

    levels = np.sort(scores)
    assert balanced(threshold) == pytest.approx(max(map(balanced, [levels[0] - 1, *(levels[1:] + levels[:-1]) / 2])))


def test_the_classifier_averages_a_quarter_of_the_layers_at_least():
    cosines = np.random.default_rng(0).standard_normal((20, 8)) * 0.01
    cosines[10:, 3] += 1
    cosines[10:, 4] -= 1
    harmful = [False] * 10 + [True] * 10
    assert choose_classifier(cosines, harmful, shortest=1)[0] != LayerRange(3, 4)
    layers, _ = choose_classifier(cosines, harmful)
    assert len(layers) >= 2 and layers.first <= 3 < layers.stop <= 4


# Layers to try


@pytest.mark.parametrize("layers", [3, 4, 9, 30, 32, 80])
def test_layers_to_try_lie_within_the_model_and_leave_block_zero(layers):
    ranges = layer_candidates(layers)
    assert ranges and all(1 <= r.first < r.within(layers).stop for r in ranges)
    assert len(set(ranges)) == len(ranges)


def test_the_segment_that_names_refusal_is_tried_first():
    def table(counts):
        tokens = [tuple(Token("", 0.0, i < n) for i in range(5)) for n in counts]
        return Vocabulary(tuple(Segment("", LayerRange(0, 1), 1.0, part) for part in tokens), ())

    assert layer_candidates(30, table([0, 1, 4]))[0] == LayerRange(20, 30)
    assert layer_candidates(30, table([3, 1, 2]))[0] == LayerRange(1, 10)
    assert layer_candidates(30, table([0, 4, 1])) == layer_candidates(30) == layer_candidates(30, table([0, 0, 0]))


# Trials


@pytest.fixture(scope="module")
def trial(model, directions):
    heard = []
    found = try_strengths(model, directions, SETTINGS, CALIBRATION, InHand(done=heard.append))
    assert heard[:6] == [0] + [8] * 5  # unsteered, and either way under two settings
    assert sum(heard) == 2 * 5 * 8 and max(heard[7:]) <= 8  # then read, but for those that are equal
    return found


def test_trials_judge_answers_steered_either_way(model, directions, trial):
    rows, eos = model.rows(PROMPTS), model.tokenizer.eos_ids
    batch, start = pad_rows(rows), jnp.array([row.instruction_end for row in rows])

    def verdicts(edits):
        out = generate(model.config, model.params, batch, decoding(NEW, eos=eos), edits)
        texts = model.tokenizer.decode(out.tokens, out.lengths)
        return [
            outcome(*each) for each in zip(RULE.refused(PROMPTS, texts), (not t.strip() for t in texts), strict=True)
        ]

    assert trial.before == verdicts(None)
    own = generate(model.config, model.params, batch, decoding(NEW, eos=eos))
    np.testing.assert_array_equal(trial.answers.tokens, own.tokens)
    np.testing.assert_array_equal(trial.answers.lengths, own.lengths)
    for layers, alpha_rel in SETTINGS:
        inside = (np.arange(3) >= layers.first) & (np.arange(3) < layers.stop)
        strength = np.where(inside, alpha_rel * directions.residual_norm, 0)
        add = jnp.asarray(strength[:, None] * directions.direction)
        for sign, found in ((1.0, trial.toward), (-1.0, trial.away)):
            edits = {"resid": edit(add=add, gate=jnp.full(8, sign), start=start)}
            assert found[layers, alpha_rel] == verdicts(edits)


def test_an_outcome_mixes_both_ways_by_the_threshold(trial, scores):
    for setting in SETTINGS:
        low, high = float(scores.min()), float(scores.max()) + 1
        assert outcomes(trial, setting, scores, low) == trial.toward[setting]
        assert outcomes(trial, setting, scores, high) == trial.away[setting]
        at = float(np.sort(scores)[5])
        mixed = outcomes(trial, setting, scores, at)
        for i in range(8):
            assert mixed[i] == (trial.toward if scores[i] >= at else trial.away)[setting][i]


def test_shares_leave_out_what_was_not_scored_and_broken_answers_are_no_success():
    found = shares(["refused", None, "broken", "refused", None, "broken", "complied", "complied"], LABELS)
    assert found == (0, 2 / 3, 2 / 3, 2 / 6) and found.accuracy == 2 / 3
    assert shares(["broken"] * 8, LABELS) == (0, 0, 0, 1) and shares(["broken"] * 8, LABELS).accuracy == 0
    assert shares([None] * 8, LABELS) == (0, 0, 0, 0)


def test_broken_answers_are_those_that_the_model_itself_finds_improbable(model, directions, trial):
    calibration = dataclasses.replace(CALIBRATION, broken=SOME_BROKEN)
    found = try_strengths(model, directions, SETTINGS, calibration)
    texts = model.answers(PROMPTS, Decoding(NEW), 8).texts
    nll, counts = model.nll(answer_rows(model, PROMPTS, texts), 8)
    broken = [not text.strip() or sums / n >= 6.3 for text, sums, n in zip(texts, nll, counts, strict=True)]
    assert found.before == ["broken" if b else o for b, o in zip(broken, trial.before, strict=True)]
    for whole, own in zip(
        (*trial.toward.values(), *trial.away.values()), (*found.toward.values(), *found.away.values()), strict=True
    ):
        assert all(o in (w, "broken") for w, o in zip(whole, own, strict=True))
    every = [o for own in (*found.toward.values(), *found.away.values()) for o in own]
    assert 0 < every.count("broken") < len(every)


def test_a_broken_answer_is_no_success_of_a_strength():
    """Of two strengths after which no safe prompt is refused, that is chosen which leaves whole answers."""
    weak, strong = SETTINGS
    firm, harmful = ["refused"] * 4, [True] * 4 + [False] * 4
    scores = np.array([1.0] * 4 + [0.0] * 4)
    answered = firm + ["complied"] * 3 + ["refused"]
    away = {weak: ["complied"] * 7 + ["refused"], strong: ["complied"] * 4 + ["broken"] * 4}
    trial = Trial(answered, {weak: ["refused"] * 8, strong: ["refused"] * 8}, away, None)
    thresholds = {setting: best_outcome(trial, setting, scores, harmful, 0.05) for setting in SETTINGS}
    found = [shares(outcomes(trial, s, scores, thresholds[s]), harmful) for s in SETTINGS]
    assert found[1].safe_refused == 0 < found[0].safe_refused and found[1].accuracy == 0.5 < found[0].accuracy


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(4, 14), st.sampled_from([0.0, 0.1, 1.0]))
def test_the_threshold_has_the_best_outcome_that_keeps_refusals(seed, n, max_drop):
    rng = np.random.default_rng(seed)
    before, toward, away = (rng.random((3, n)) < np.array([[0.5], [0.8], [0.2]])).tolist()
    harmful = [True, False, *(rng.random(n - 2) < 0.5).tolist()]
    scores = rng.integers(0, 9, n) / 8
    words = [["refused" if v else "complied" for v in verdicts] for verdicts in (before, toward, away)]
    trial = Trial(words[0], {SETTINGS[0]: words[1]}, {SETTINGS[0]: words[2]}, None)
    floor = np.mean([b for b, h in zip(before, harmful, strict=True) if h]) - max_drop

    def rates(threshold):
        told = [t if s >= threshold else a for t, a, s in zip(toward, away, scores, strict=True)]
        safe = np.mean([v for v, h in zip(told, harmful, strict=True) if not h])
        return safe, np.mean([v for v, h in zip(told, harmful, strict=True) if h])

    chosen = best_outcome(trial, SETTINGS[0], scores, harmful, max_drop)
    safe, unsafe = rates(chosen)
    tried = [rates(threshold) for threshold in np.arange(-1, 19) / 16 + 1 / 32]
    kept = [(s, u) for s, u in tried if u >= floor - 1e-9]
    if kept:
        assert unsafe >= floor - 1e-9
        assert unsafe - safe == pytest.approx(max(u - s for s, u in kept))
    else:
        assert unsafe == pytest.approx(max(u for _, u in tried))


def slow_divergences(model, rows, answers, added, gates):
    """Mean KL in nats a token along the answers, of plain passes without and with `added` times each of the gates."""
    texts = [Row(r.ids + tuple(t.tolist()), 0) for r, t in zip(rows, answers.tokens, strict=True)]
    batch = pad_rows(texts, length=48)
    start = jnp.array([row.instruction_end for row in rows])

    def log_p(gate):
        edits = {"resid": edit(add=added, gate=jnp.asarray(gate, jnp.float32), start=start)}
        out = whole(model.config, model.params, batch.tokens, batch.valid, edits)
        return np.asarray(jax.nn.log_softmax(out), np.float64)

    before, means = log_p(np.zeros(len(rows))), []
    for gate in gates:
        after, total = log_p(gate), 0.0
        for b, length in enumerate(answers.lengths):
            at = batch.tokens.shape[1] - NEW - 1 + np.arange(length)
            total += (np.exp(before[b, at]) * (before[b, at] - after[b, at])).sum()
        means.append(total / answers.lengths.sum())
    return means


def test_divergences_follow_their_prompts_through_the_batches(model, directions):
    rows = model.rows(PROMPTS[:6])
    steerings = [steering_of(directions, Choice(WHOLE, LAST, at, alpha_rel=0.3)) for at in (-2.0, 2.0)]
    steerings.append(steering_of(directions, Choice(WHOLE, LAST, 0.0, alpha_rel=0.0)))
    answers = model.answers(rows, Decoding(NEW))
    cut = Answers(answers.texts, answers.tokens, np.array([8, 3, 0, 5, 8, 1], np.int32))
    found = model.steered(steerings).divergences(rows, cut, batch_size=4).sum(1) / cut.written
    added = steerings[0].strength[:, None] * steerings[0].directions
    wanted = slow_divergences(model, rows, cut, added, [np.full(6, gate) for gate in (1.0, -1.0, 0.0)])
    for ours, slow in zip(found, wanted, strict=True):
        assert ours == pytest.approx(slow, rel=1e-4, abs=1e-6)
    assert found[0] > 0.01 and found[0] != pytest.approx(found[1], rel=0.01)


# The choice


def candidate(accuracy, kl, harmful=0.9):
    safe = 1 + harmful - 2 * accuracy
    return Candidate(LayerRange(1, 2), 0.1, 1.0, 0.0, safe, harmful, accuracy, kl, True, False)


def test_the_strength_is_the_best_within_the_limit():
    good, better, near, far = candidate(0.7, 0.1), candidate(0.8, 0.3), candidate(0.8, 0.2), candidate(0.9, 0.6)
    for order in itertools.permutations([good, better, near, far]):
        assert choose_strength(order, 0.5, 0.0) is near
        assert choose_strength(order, 0.6, 0.0) is far
        assert choose_strength(order, 0.1, 0.0) is good
        with pytest.raises(ValueError, match=r"no strength keeps the benign KL within 0.05; the least was 0.1000"):
            choose_strength(order, 0.05, 0.0)


def test_a_strength_that_keeps_refusals_is_preferred():
    firm, lax = candidate(0.6, 0.1, harmful=0.9), candidate(0.8, 0.1, harmful=0.7)
    assert choose_strength([lax, firm], 0.5, 0.8) is firm
    assert choose_strength([lax, firm], 0.5, 0.95) is lax


def test_calibration_chooses_among_its_candidates(model, directions, scores, trial):
    given = (model, directions, (WHOLE, scores), SETTINGS)
    tried = calibrate(*given, CALIBRATION)
    assert [(c.layers, c.alpha_rel) for c in tried] == SETTINGS and all(type(c.layers) is LayerRange for c in tried)
    for c, setting in zip(tried, SETTINGS, strict=True):
        layers, alpha_rel = setting
        assert c.threshold == best_outcome(trial, setting, scores, LABELS, 0.2)
        told = shares(outcomes(trial, setting, scores, c.threshold), LABELS)
        assert (c.refusal_safe, c.refusal_harmful, c.broken) == (told.safe_refused, told.harmful_refused, told.broken)
        assert c.balanced_accuracy == (told.safe_complied + told.harmful_refused) / 2
        norms = [float(directions.residual_norm[i]) for i in range(layers.first, layers.stop)]
        assert c.alpha == pytest.approx(alpha_rel * sum(norms) / len(norms), rel=1e-6)
        assert c.kl_benign > 0 and c.allowed
    (chosen,) = [c for c in tried if c.chosen]
    least = shares(trial.before, LABELS).harmful_refused - 0.2
    assert dataclasses.replace(chosen, chosen=False) == choose_strength(
        [dataclasses.replace(c, chosen=False) for c in tried], 1e9, least
    )
    fixed = calibrate(*given, CALIBRATION, threshold=0.125)
    assert {c.threshold for c in fixed} == {0.125} and sum(c.chosen for c in fixed) == 1
    with pytest.raises(ValueError, match="no strength keeps the benign KL within 0"):
        calibrate(*given, dataclasses.replace(CALIBRATION, kl_limit=0.0))


def test_strengths_can_be_shares_of_the_difference(model, directions, scores):
    """The same strengths, told by the other length, do the same."""
    layers = LayerRange(1, 2)
    length = {share_of: float(directions.lengths(share_of)[1]) for share_of in ("state", "difference")}
    by_state, by_difference = (
        calibrate(
            model,
            directions,
            (WHOLE, scores),
            [(layers, 0.5 / length[share_of])],
            dataclasses.replace(CALIBRATION, share_of=share_of, kl_limit=99.0),
            threshold=0.1,
        )[0]
        for share_of in length
    )
    assert by_state.alpha_rel != pytest.approx(by_difference.alpha_rel)
    assert by_difference.alpha == pytest.approx(by_state.alpha) == pytest.approx(0.5)
    assert by_difference.kl_benign == pytest.approx(by_state.kl_benign, rel=1e-3) and by_state.kl_benign > 0


def test_exactly_one_of_equal_candidates_is_chosen(model, directions, scores):
    tried = calibrate(model, directions, (WHOLE, scores), [SETTINGS[0]] * 2, CALIBRATION)
    assert [c.chosen for c in tried] == [True, False]
    assert dataclasses.replace(tried[0], chosen=False) == tried[1]


def test_a_limit_leaves_out_what_diverges_more(model, directions, scores):
    tried = calibrate(model, directions, (WHOLE, scores), SETTINGS, CALIBRATION)
    small, large = sorted(tried, key=lambda c: c.kl_benign)
    limit = (small.kl_benign + large.kl_benign) / 2
    limited = calibrate(model, directions, (WHOLE, scores), SETTINGS, dataclasses.replace(CALIBRATION, kl_limit=limit))
    for c in limited:
        assert c.allowed == c.chosen == (c.kl_benign < limit)


def test_the_divergence_is_of_safe_prompts_that_are_answered(model, directions, scores, trial):
    threshold = float(np.median(scores))
    tried = calibrate(model, directions, (WHOLE, scores), SETTINGS, CALIBRATION, threshold)
    complied = [i for i in range(8) if trial.before[i] == "complied" and not LABELS[i]]
    assert 0 < len(complied) < 4
    rows = model.rows([PROMPTS[i] for i in complied])
    answers = Answers((), trial.answers.tokens[complied], trial.answers.lengths[complied])
    gate = np.where(scores[complied] >= threshold, 1.0, -1.0)
    for c in tried:
        steering = steering_of(directions, Choice(WHOLE, c.layers, threshold, alpha_rel=c.alpha_rel))
        added = steering.strength[:, None] * steering.directions
        assert c.kl_benign == pytest.approx(slow_divergences(model, rows, answers, added, [gate])[0], rel=1e-4)


def test_a_model_that_refuses_every_safe_prompt_cannot_be_calibrated(model, directions, scores):
    always = KeywordJudge("always", "1", lambda text: True)
    with pytest.raises(ValueError, match="complies with no safe calibration prompt"):
        calibrate(model, directions, (WHOLE, scores), SETTINGS, dataclasses.replace(CALIBRATION, judge=always))


# What is kept


@pytest.fixture(scope="module")
def found(model, directions, reading):
    return reading, vocabulary(model, directions)


def test_what_is_open_is_chosen_and_what_is_given_is_not(model, directions, found, tmp_path):
    reading, words = found
    store = Store(tmp_path)

    def chosen(**given):
        return choose_once(
            store, model, directions, found, OpenChoice(**{"strengths": (0.3, 0.6)} | given), CALIBRATION
        )

    choice, strength, scores = chosen()
    scored, _ = choose_classifier(reading.cosines, LABELS)
    assert choice.scored == scored and choice.alpha is None
    np.testing.assert_array_equal(scores, reading.cosines[:, scored.first : scored.stop].mean(1))
    assert (strength.kl_limit, strength.max_drop, strength.n) == (1e9, 0.2, 8)
    pairs = [(layers, a) for layers in layer_candidates(3, words) for a in (0.3, 0.6)]
    assert [(c.layers, c.alpha_rel) for c in strength.candidates] == pairs
    wanted = calibrate(model, directions, (scored, scores), pairs, CALIBRATION)
    assert list(strength.candidates) == wanted
    (best,) = [c for c in strength.candidates if c.chosen]
    assert choice == Choice(scored, best.layers, best.threshold, alpha_rel=best.alpha_rel)

    choice, strength, scores = chosen(scored=LayerRange(0, 2), layers=LAST, threshold=0.25)
    assert (choice.scored, choice.layers, choice.threshold) == (LayerRange(0, 2), LAST, 0.25)
    np.testing.assert_array_equal(scores, reading.cosines[:, :2].mean(1))
    assert [(c.layers, c.alpha_rel, c.threshold) for c in strength.candidates] == [(LAST, 0.3, 0.25), (LAST, 0.6, 0.25)]

    choice, strength, scores = chosen(threshold_by="roc", layers=LAST)
    assert {c.threshold for c in strength.candidates} == {choice.threshold} == {best_threshold(scores, LABELS)}
    with pytest.raises(ValueError, match=r"config\.threshold_by 'auc' is not known; use 'outcome' or 'roc'"):
        OpenChoice(threshold_by="auc")


def test_choices_are_made_once(model, directions, found, tmp_path, monkeypatch):
    store, given = Store(tmp_path), OpenChoice(layers=LAST, strengths=(0.3, 0.6))

    def choose(model=model, directions=directions, given=given, calibration=CALIBRATION):
        return choose_once(store, model, directions, found, given, calibration)

    choice, strength, scores = choose()
    made = []

    def noted(*given):
        made.append(given)
        return list(strength.candidates)

    monkeypatch.setattr(scans_calibration, "calibrate", noted)
    again, kept, same = choose()
    assert (again, kept) == (choice, strength) and not made
    np.testing.assert_array_equal(scores, same)
    assert all(type(c.layers) is LayerRange for c in kept.candidates)
    judge = KeywordJudge("vowels", "2", RULE.rule)
    flipped = (not LABELS[0], *LABELS[1:])
    elsewhere = LayerRange(0, 2) if choice.scored != LayerRange(0, 2) else LAST
    calibrations = [
        {"prompts": (*PROMPTS[:7], "Why?")},
        {"harmful": flipped},
        {"judge": judge},
        {"judge": KeywordJudge("other", "1", RULE.rule)},
        {"kl_limit": 1e8},
        {"max_drop": 0.1},
        {"broken": SOME_BROKEN},
        {"decoding": Decoding(NEW + 1)},
        {"decoding": Decoding(NEW, seed=1)},
        {"decoding": Decoding(NEW, Sampling(repetition_penalty=1.1))},
    ]
    for change in calibrations:
        choose(calibration=dataclasses.replace(CALIBRATION, **change))
    assert len(made) == len(calibrations)
    others = [
        {"given": OpenChoice(layers=WHOLE, strengths=(0.3, 0.6))},
        {"given": OpenChoice(layers=LAST, strengths=(0.3, 0.7))},
        {"given": OpenChoice(layers=LAST, strengths=(0.3, 0.6), threshold=0.1)},
        {"given": OpenChoice(layers=LAST, strengths=(0.3, 0.6), scored=elsewhere)},
        {"directions": dataclasses.replace(directions, direction=-directions.direction)},
        {"directions": dataclasses.replace(directions, residual_norm=2 * directions.residual_norm)},
        {"model": model.with_params(tiny_params(model.config, 1))},
        {"model": model.with_prompt("Be short.")},
    ]
    for change in others:
        choose(**change)
    assert len(made) == len(calibrations) + len(others)
    # Ends of answers are of what answers follow from.
    ends = list(model.tokenizer.eos_ids)
    monkeypatch.setitem(vars(model.tokenizer), "eos_ids", (*ends, 7))
    choose()
    assert len(made) == len(calibrations) + len(others) + 1


def test_an_interrupted_calibration_goes_on_from_its_batches(model, directions, tmp_path, trial):
    calibration, log = dataclasses.replace(CALIBRATION, batch_size=2), Store(tmp_path).log("strength", 0)
    heard = []

    def stopped(n):
        if len(log.entries()) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        try_strengths(model, directions, SETTINGS, calibration, InHand(log, stopped))
    assert len(log.entries()) == 4
    found = try_strengths(model, directions, SETTINGS, calibration, InHand(log, heard.append))
    assert heard[0] == 2 * 4 * 5 and sum(heard) == 2 * 8 * 5 == OpenChoice(layers=LAST, strengths=(1, 2)).pieces(8, 3)
    assert (found.before, found.toward, found.away) == (trial.before, trial.toward, trial.away)
    np.testing.assert_array_equal(found.answers.tokens, trial.answers.tokens)
    np.testing.assert_array_equal(found.answers.lengths, trial.answers.lengths)


def test_prompts_longer_than_the_context_are_refused_before_anything_runs(tmp_path, directions):
    short = tiny_chat_model(tmp_path, context=20)
    with pytest.raises(ValueError, match=r"prompt 0 needs 19 tokens \+ 8 new ones; the model's context is 20"):
        try_strengths(short, directions, SETTINGS, CALIBRATION)
