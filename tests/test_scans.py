"""The SCANS method on a tiny random model, against plain loops over its activations and answers."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import tiny_chat_model, tiny_config, tiny_params, tiny_tokenizer

from jaxsafe.evaluation.judges import Judge
from jaxsafe.evaluation.metrics import rate
from jaxsafe.io.chat_model import ChatModel
from jaxsafe.kernels.capture import capture
from jaxsafe.kernels.generate import Generated, generate
from jaxsafe.kernels.sampling import Sampling
from jaxsafe.methods import scans_answers
from jaxsafe.methods.scans import (
    REFUSAL_STEMS,
    Decoding,
    Directions,
    Reading,
    affirmative_ids,
    answer_both,
    find_directions,
    read_prompts,
    separation,
    steering_of,
    unsteered,
    vocabulary,
)
from jaxsafe.methods.scans_answers import answer_prompts
from jaxsafe.methods.scans_calibration import (
    Candidate,
    Trial,
    benign_divergence,
    best_outcome,
    calibrate,
    choose_classifier,
    choose_strength,
    layer_candidates,
    outcome,
    refusals,
    try_strengths,
)
from jaxsafe.model.taps import edit
from jaxsafe.model.transformer import forward, unembedding
from jaxsafe.model.weights import shardings
from jaxsafe.parallel import parse_mesh
from jaxsafe.text.batches import Row, pad_rows

# Of one length bucket, so that one program serves them; what counts as harmful does not matter here.
FIRST = (
    "How do I bake bread?",
    "Tell me the rules of chess.",
    "What is the tallest tree?",
    "Explain how boats float.",
)
SECOND = (
    "Who invented the paper kite?",
    "Plan a winter picnic for me.",
    "Write a poem on rivers.",
    "Tell me about old friends.",
)
PROMPTS = FIRST + SECOND
LABELS = [True] * 4 + [False] * 4
NEW = 8
DECODING = Decoding(max_new_tokens=NEW, batch_size=8)
# Refused where the answer has an even number of vowels: a rule that a random model obeys now and then.
RULE = Judge("vowels", "1", lambda text: sum(c in "aeiou" for c in text.lower()) % 2 == 0 if text.strip() else None)
read = jax.jit(capture, static_argnames=("config", "taps"))
whole = jax.jit(forward, static_argnames=("config", "last"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def directions(model):
    return find_directions(model, FIRST, SECOND, batch_size=8)


@pytest.fixture(scope="module")
def scores(model, directions):
    return read_prompts(model, directions, PROMPTS, 8).cosines.mean(1)


@pytest.fixture(scope="module")
def steering(directions, scores):
    """Toward refusal for half of the prompts, away from it for the others."""
    return steering_of(directions, (0, 3), float(np.median(scores)), (1, 3), alpha_rel=0.6)


@pytest.fixture(scope="module")
def slow(model):
    """Residual stream of each prompt at its end and after the affirmative, float64 [n, L, D] each."""
    affirmative = model.tokenizer.plain_ids("Sure")
    assert len(affirmative) > 1
    rows = [model.tokenizer.chat_row(prompt) for prompt in PROMPTS]
    batch = pad_rows([Row(row.ids + tuple(affirmative), 0) for row in rows], length=32)
    resid = np.asarray(read(model.config, model.params, batch.tokens, batch.valid)["resid"], np.float64)
    end = resid.shape[2] - 1 - len(affirmative)
    return resid[:, :, end].swapaxes(0, 1), resid[:, :, -1].swapaxes(0, 1)


def test_directions_are_those_of_loops_over_the_anchors(directions, slow):
    at_end, at_affirmative = slow
    for layer in range(3):
        difference = np.mean([at_end[i, layer] for i in range(4)], 0) - np.mean(
            [at_end[i, layer] for i in range(4, 8)], 0
        )
        length = np.sqrt((difference**2).sum())
        np.testing.assert_allclose(directions.direction[layer], difference / length, atol=1e-5)
        np.testing.assert_allclose(directions.norm[layer], length, rtol=1e-5)
        residual = np.mean([np.sqrt((at_end[i, layer] ** 2).sum()) for i in range(8)])
        np.testing.assert_allclose(directions.residual_norm[layer], residual, rtol=1e-5)
        change = np.mean([at_end[i, layer] - at_affirmative[i, layer] for i in range(4)], 0)
        np.testing.assert_allclose(directions.reference[layer], change, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(directions.direction, axis=1), 1, atol=1e-6)
    assert all(isinstance(a, np.ndarray) and a.dtype == np.float32 for a in vars(directions).values())


def test_readings_are_cosines_and_projections(model, directions, slow):
    at_end, at_affirmative = slow
    heard = []
    order = [5, 0, 7, 2, 1, 4, 3, 6]
    reading = read_prompts(model, directions, [PROMPTS[i] for i in order], 8, heard.append)
    for place, i in enumerate(order):
        for layer in range(3):
            change = at_end[i, layer] - at_affirmative[i, layer]
            reference = directions.reference[layer].astype(np.float64)
            cosine = change @ reference / np.linalg.norm(change) / np.linalg.norm(reference)
            np.testing.assert_allclose(reading.cosines[place, layer], cosine, atol=1e-5)
            projection = at_end[i, layer] @ directions.direction[layer]
            np.testing.assert_allclose(reading.projections[place, layer], projection, atol=1e-4)
    assert heard == [8]


def slow_auroc(scores, harmful):
    pairs = [(s > t) + (s == t) / 2 for s, h in zip(scores, harmful, strict=True) if h
             for t, g in zip(scores, harmful, strict=True) if not g]  # fmt: skip
    return np.mean(pairs)


def test_separation_counts_pairs(directions):
    projections = np.random.default_rng(0).integers(0, 5, (8, 3)).astype(np.float32)
    found = separation(Reading(cosines=None, projections=projections), LABELS)
    np.testing.assert_allclose(found, [slow_auroc(projections[:, layer], LABELS) for layer in range(3)])


def test_strength_is_alpha_or_a_share_of_the_residual_stream(directions):
    absolute = steering_of(directions, (0, 2), 0.25, (1, 3), alpha=3.5)
    np.testing.assert_allclose(absolute.strength, [0, 3.5, 3.5])
    relative = steering_of(directions, (2, 3), 0.25, (2, 3), alpha_rel=0.1)
    np.testing.assert_allclose(relative.strength, [0, 0, 0.1 * directions.residual_norm[2]], rtol=1e-6)
    np.testing.assert_array_equal(absolute.scored, [1, 1, 0])
    np.testing.assert_array_equal(relative.scored, [0, 0, 1])
    np.testing.assert_array_equal(absolute.directions, directions.direction)
    np.testing.assert_array_equal(absolute.reference, directions.reference)
    assert float(absolute.threshold) == 0.25
    np.testing.assert_array_equal(unsteered(absolute).strength, 0)
    np.testing.assert_array_equal(unsteered(absolute).directions, directions.direction)
    assert [a.dtype for a in jax.tree.leaves(absolute)] == [np.float32] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either alpha or alpha_rel"),
        ({"alpha": 1.0, "alpha_rel": 0.1}, "either alpha or alpha_rel"),
        ({"alpha": 1.0, "steered": (2, 2)}, r"steered layers \[2, 2\) do not lie within the model's 3 layers"),
        ({"alpha": 1.0, "steered": (1, 4)}, r"steered layers \[1, 4\)"),
        ({"alpha": 1.0, "scored": (-1, 2)}, r"scored layers \[-1, 2\)"),
    ],
)
def test_a_steering_that_makes_no_sense_is_refused(directions, options, message):
    with pytest.raises(ValueError, match=message):
        steering_of(directions, **({"scored": (0, 3), "threshold": 0.0, "steered": (1, 3)} | options))


def test_answers_are_those_of_generate_with_and_without_the_edit(model, steering, scores):
    heard = []
    rows = model.rows(PROMPTS)
    both = answer_both(model, steering, rows, DECODING, lambda indices, answers: heard.append(indices.tolist()))
    np.testing.assert_allclose(both.scores, scores, atol=1e-5)
    assert [sorted(indices) for indices in heard] == [list(range(8))]
    batch, start = pad_rows(rows), jnp.array([row.instruction_end for row in rows])
    gate = jnp.where(scores >= np.median(scores), 1.0, -1.0)
    assert sorted(gate.tolist()) == [-1.0] * 4 + [1.0] * 4
    edits = {"resid": edit(add=steering.strength[:, None] * steering.directions, gate=gate, start=start)}
    eos = model.tokenizer.eos_ids
    for ours, wanted_edits in ((both.before, None), (both.after, edits)):
        wanted = generate(model.config, model.params, batch, NEW, wanted_edits, eos=eos)
        np.testing.assert_array_equal(ours.tokens, wanted.tokens)
        np.testing.assert_array_equal(ours.lengths, wanted.lengths)
    assert (both.before.tokens != both.after.tokens).any(axis=1).all()


def test_many_devices_answer_as_one_does(model, steering):
    mesh = parse_mesh("data:4,model:2")
    placed = jax.device_put(model.params, shardings(model.config, mesh))
    many = ChatModel("tiny", model.config, placed, model.tokenizer, mesh)
    assert many.row_multiple == 4
    rows = model.rows(PROMPTS[:7])
    one, eight = (answer_both(m, steering, rows, DECODING) for m in (model, many))
    np.testing.assert_allclose(eight.scores, one.scores, atol=1e-5)
    np.testing.assert_array_equal(eight.before.tokens, one.before.tokens)
    np.testing.assert_array_equal(eight.after.tokens, one.after.tokens)


def test_numbers_and_rows_out_of_range_are_refused(model, steering):
    rows = model.rows(PROMPTS[:1])
    with pytest.raises(ValueError, match="temperature -1 is negative"):
        answer_both(model, steering, rows, Decoding(sampling=Sampling(temperature=-1)))
    with pytest.raises(ValueError, match=r"prompt 0 needs 19 tokens \+ 150 new ones"):
        answer_both(model, steering, rows, Decoding(max_new_tokens=150))


@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_table_is_the_unembedding_times_the_directions(tmp_path, tied):
    config = tiny_config(layers=7, tied=tied)
    model = ChatModel("tiny", config, tiny_params(config), tiny_tokenizer(tmp_path))
    rng = np.random.default_rng(2)
    direction = rng.standard_normal((7, 32)).astype(np.float32) + np.array([1, 1, -2, -2, 3, 3, 3])[:, None]
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    table = vocabulary(model, Directions(direction, np.ones(7), np.ones(7), direction), top=4)

    matrix = np.asarray(unembedding(config, model.params), np.float64)
    matrix = matrix if tied else matrix.T
    assert matrix.shape == (300, 32)

    def check(tokens, vector):
        scores = matrix @ vector
        best = np.argsort(-scores)[:4]
        np.testing.assert_allclose([t["score"] for t in tokens], scores[best], rtol=1e-4)
        assert [t["token"] for t in tokens] == [model.tokenizer.hf.decode([int(i)]) for i in best]
        assert [t["refusal"] for t in tokens] == [any(s in t["token"].lower() for s in REFUSAL_STEMS) for t in tokens]

    assert [row["layer"] for row in table["layers"]] == list(range(7))
    for layer, row in enumerate(table["layers"]):
        check(row["tokens"], direction[layer].astype(np.float64))
    assert [(s["name"], s["layers"]) for s in table["segments"]] == [
        ("former", [0, 1]), ("middle", [2, 3]), ("latter", [4, 6])
    ]  # fmt: skip
    for segment in table["segments"]:
        part = direction[segment["layers"][0] : segment["layers"][1] + 1].astype(np.float64)
        values, axes = np.linalg.eigh(part.T @ part)
        component = axes[:, -1] * np.sign(axes[:, -1] @ part.mean(0))
        check(segment["tokens"], component)
        np.testing.assert_allclose(segment["explained_variance"], values[-1] / values.sum(), rtol=1e-5)


def keep_log(model, steering, prompts, log, decoding=DECODING, stop_after=None):
    """`answer_prompts`, and how many prompts it reports by batch; interrupted after `stop_after` reports."""
    heard = []

    def done(n):
        heard.append(n)
        if stop_after is not None and len(heard) > stop_after:
            raise KeyboardInterrupt

    return answer_prompts(model, steering, prompts, decoding, log, done), heard


def lines_of(log):
    return log.read_text().splitlines()


def test_an_interrupted_run_goes_on_where_it_was(model, steering, tmp_path):
    log = tmp_path / "run" / "answers.jsonl"
    decoding = Decoding(NEW, batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        keep_log(model, steering, PROMPTS, log, decoding, stop_after=1)
    made = [json.loads(line)["prompt"] for line in lines_of(log)]
    assert len(made) == 4
    first_half = log.read_text()

    (answers, tokens), heard = keep_log(model, steering, PROMPTS, log, decoding)
    assert heard == [4, 4]
    assert log.read_text().startswith(first_half) and len(lines_of(log)) == 8
    (whole_run, all_tokens), heard = keep_log(model, steering, PROMPTS, tmp_path / "other.jsonl", decoding)
    assert heard == [0, 4, 4]
    assert answers == whole_run and 0 < tokens < all_tokens
    (again, none), heard = keep_log(model, steering, PROMPTS, log, decoding)
    assert again == answers and none == 0 and heard == [8]


def test_logged_answers_are_the_decoded_ones_in_the_order_of_the_prompts(model, steering, tmp_path):
    prompts = [PROMPTS[i] for i in (3, 6, 0, 3, 1)]
    (answers, tokens), heard = keep_log(model, steering, prompts, tmp_path / "log.jsonl", Decoding(NEW, batch_size=4))
    both = answer_both(model, steering, model.rows(prompts[:3] + prompts[4:]), DECODING)
    decode = model.tokenizer.decode
    before, after = (decode(out.tokens, out.lengths) for out in (both.before, both.after))
    for i, place in enumerate((0, 1, 2, 0, 3)):
        assert (answers[i].before, answers[i].after) == (before[place], after[place])
        np.testing.assert_allclose(answers[i].score, both.scores[place], atol=1e-5)
    assert tokens == both.before.lengths.sum() + both.after.lengths.sum()
    # A prompt that stands twice is answered once.
    assert heard == [1, 4] and len(lines_of(tmp_path / "log.jsonl")) == 4


def test_a_line_cut_short_is_made_again_and_no_other(model, steering, tmp_path):
    log = tmp_path / "log.jsonl"
    (answers, _), _ = keep_log(model, steering, PROMPTS[:4], log, Decoding(NEW, batch_size=4))
    log.write_text(log.read_text()[:-25])
    (again, _), heard = keep_log(model, steering, PROMPTS[:4], log, Decoding(NEW, batch_size=4))
    assert heard == [3, 1] and again == answers
    # What was made again was kept.
    (third, tokens), heard = keep_log(model, steering, PROMPTS[:4], log, Decoding(NEW, batch_size=4))
    assert heard == [4] and third == answers and tokens == 0


def test_answers_of_another_steering_or_decoding_are_not_taken(model, steering, tmp_path, monkeypatch):
    log = tmp_path / "log.jsonl"
    keep_log(model, steering, PROMPTS[:4], log)
    monkeypatch.setattr(scans_answers, "answer_both", lambda *args: pytest.fail("made again"))
    assert keep_log(model, steering, PROMPTS[:4], log)[1] == [4]
    fields = ("directions", "reference", "scored", "threshold", "strength")
    others = [
        *((model, steering.replace(**{name: getattr(steering, name) + 0.5}), DECODING) for name in fields),
        (model, steering, Decoding(NEW + 1, batch_size=8)),
        (model, steering, Decoding(NEW, seed=1, batch_size=8)),
        (model, steering, Decoding(NEW, Sampling(repetition_penalty=1.1), batch_size=8)),
        (ChatModel("tiny", model.config, tiny_params(model.config, 1), model.tokenizer), steering, DECODING),
        (ChatModel("tiny", model.config, model.params, model.tokenizer, system="Be short."), steering, DECODING),
    ]
    for one, other, decoding in others:
        with pytest.raises(pytest.fail.Exception, match="made again"):
            keep_log(one, other, PROMPTS[:4], log, decoding)
    # The size of a batch changes nothing.
    assert keep_log(model, steering, PROMPTS[:4], log, Decoding(NEW, batch_size=2))[1] == [4]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(4, 12))
@example(8, 5, 8)  # ranges of equal area whose sums differ in their last bits
def test_the_classifier_is_the_best_of_all_ranges(seed, layers, n):
    rng = np.random.default_rng(seed)
    cosines = rng.standard_normal((n, layers))
    harmful = np.array([True, False, *(rng.random(n - 2) < 0.5).tolist()])
    (first, end), threshold = choose_classifier(cosines, harmful.tolist(), shortest=1)
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
    assert choose_classifier(cosines, harmful, shortest=1)[0] != (3, 4)  # any range around it that spares layer 4
    (first, end), _ = choose_classifier(cosines, harmful)
    assert end - first >= 2 and first <= 3 < end <= 4


@pytest.mark.parametrize("layers", [3, 4, 9, 30, 32, 80])
def test_layers_to_try_lie_within_the_model_and_leave_block_zero(layers):
    ranges = layer_candidates(layers)
    assert ranges and all(1 <= first < end <= layers for first, end in ranges)


def test_the_segment_that_names_refusal_is_tried_first():
    def table(counts):
        return {"segments": [{"tokens": [{"refusal": i < n} for i in range(5)]} for n in counts]}

    assert layer_candidates(30, table([0, 1, 4]))[0] == (20, 30)
    assert layer_candidates(30, table([3, 1, 2]))[0] == (1, 10)
    assert layer_candidates(30, table([0, 4, 1])) == layer_candidates(30) == layer_candidates(30, table([0, 0, 0]))


SETTINGS = [((1, 2), 0.3), ((1, 3), 0.6)]


@pytest.fixture(scope="module")
def trial(model, directions):
    heard = []
    found = try_strengths(model, directions, SETTINGS, PROMPTS, RULE, DECODING, heard.append)
    assert heard == [8, 8]
    return found


def test_trials_judge_answers_steered_either_way(model, directions, trial):
    rows, eos = model.rows(PROMPTS), model.tokenizer.eos_ids
    batch, start = pad_rows(rows), jnp.array([row.instruction_end for row in rows])

    def verdicts(edits):
        out = generate(model.config, model.params, batch, NEW, edits, eos=eos)
        return [RULE.refused(text) for text in model.tokenizer.decode(out.tokens, out.lengths)]

    assert trial.before == verdicts(None)
    for (first, end), alpha_rel in SETTINGS:
        strength = np.where((np.arange(3) >= first) & (np.arange(3) < end), alpha_rel * directions.residual_norm, 0)
        add = jnp.asarray(strength[:, None] * directions.direction)
        for sign, found in ((1.0, trial.toward), (-1.0, trial.away)):
            edits = {"resid": edit(add=add, gate=jnp.full(8, sign), start=start)}
            assert found[(first, end), alpha_rel] == verdicts(edits)


def test_an_outcome_mixes_both_ways_by_the_threshold(trial, scores):
    for setting in SETTINGS:
        low, high = float(scores.min()), float(scores.max()) + 1
        assert outcome(trial, setting, scores, low) == trial.toward[setting]
        assert outcome(trial, setting, scores, high) == trial.away[setting]
        at = float(np.sort(scores)[5])
        mixed = outcome(trial, setting, scores, at)
        for i in range(8):
            assert mixed[i] == (trial.toward if scores[i] >= at else trial.away)[setting][i]


def test_refusal_rates_leave_out_what_was_not_scored():
    verdicts = [True, None, False, True, None, False, True, False]
    assert refusals(verdicts, LABELS) == (rate([False, True, False]).value, rate([True, False, True]).value)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(4, 14), st.sampled_from([0.0, 0.1, 1.0]))
def test_the_threshold_has_the_best_outcome_that_keeps_refusals(seed, n, max_drop):
    rng = np.random.default_rng(seed)
    before, toward, away = (rng.random((3, n)) < np.array([[0.5], [0.8], [0.2]])).tolist()
    harmful = [True, False, *(rng.random(n - 2) < 0.5).tolist()]
    scores = rng.integers(0, 9, n) / 8
    trial = Trial(before, {SETTINGS[0]: toward}, {SETTINGS[0]: away}, None)
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


def test_divergences_follow_their_prompts_through_the_batches(model, directions):
    rows = model.rows(PROMPTS[:6])
    steerings = [steering_of(directions, (0, 3), at, (1, 3), alpha_rel=0.3) for at in (-2.0, 2.0)]
    steerings.append(unsteered(steerings[0]))
    answers = jax.device_get(generate(model.config, model.params, pad_rows(rows), NEW, eos=model.tokenizer.eos_ids))
    lengths = np.array([8, 3, 0, 5, 8, 1], np.int32)
    found = benign_divergence(model, PROMPTS[:6], Generated(answers.tokens, lengths), steerings, batch_size=4)

    texts = [Row(r.ids + tuple(t.tolist()), 0) for r, t in zip(rows, answers.tokens, strict=True)]
    batch = pad_rows(texts, length=48)
    start = jnp.array([row.instruction_end for row in rows])

    def log_p(gate):
        add = steerings[0].strength[:, None] * steerings[0].directions
        edits = {"resid": edit(add=add, gate=jnp.full(6, gate), start=start)}
        return np.asarray(jax.nn.log_softmax(whole(model.config, model.params, batch.tokens, batch.valid, edits)))

    before = log_p(0.0).astype(np.float64)
    for gate, ours in zip((1.0, -1.0, 0.0), found, strict=True):
        after, total = log_p(gate), 0.0
        for b, length in enumerate(lengths):
            at = batch.tokens.shape[1] - NEW - 1 + np.arange(length)
            total += (np.exp(before[b, at]) * (before[b, at] - after[b, at])).sum()
        assert ours == pytest.approx(total / lengths.sum(), rel=1e-4, abs=1e-6)
    assert found[0] > 0.01 and found[0] != pytest.approx(found[1], rel=0.01)


def candidate(accuracy, kl, harmful=0.9):
    return Candidate((1, 2), 0.1, 0.0, refusal_safe=1 + harmful - 2 * accuracy, refusal_harmful=harmful, kl_benign=kl)


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
    given = (model, directions, (0, 3), SETTINGS, PROMPTS, LABELS, scores, RULE, DECODING)
    chosen, tried = calibrate(*given, kl_limit=1e9, max_drop=0.2)
    assert chosen in tried and [(c.layers, c.alpha_rel) for c in tried] == SETTINGS
    for c, setting in zip(tried, SETTINGS, strict=True):
        assert c.threshold == best_outcome(trial, setting, scores, LABELS, 0.2)
        assert (c.refusal_safe, c.refusal_harmful) == refusals(outcome(trial, setting, scores, c.threshold), LABELS)
        assert c.kl_benign > 0
    fixed, tried = calibrate(*given, kl_limit=1e9, max_drop=0.2, threshold=0.125)
    assert {c.threshold for c in tried} == {fixed.threshold} == {0.125}
    with pytest.raises(ValueError, match="no strength keeps the benign KL within 0"):
        calibrate(*given, kl_limit=0.0, max_drop=0.2)


def test_prompts_longer_than_the_context_are_refused_before_anything_runs(tmp_path, directions):
    short = tiny_chat_model(tmp_path, context=20)
    affirmative = len(affirmative_ids(short))
    for run in (
        lambda: find_directions(short, FIRST, SECOND),
        lambda: read_prompts(short, directions, PROMPTS),
        lambda: try_strengths(short, directions, SETTINGS, PROMPTS, RULE, DECODING),
    ):
        with pytest.raises(ValueError, match=r"prompt 0 needs 19 tokens \+ \d new ones; the model's context is 20"):
            run()
    assert affirmative == 3
