"""SCANS on a tiny random model, against plain loops over its activations and answers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scans_case import FIRST, LABELS, NEW, PROMPTS, SECOND, slow_auroc
from tiny import decoding, tiny_chat_model, tiny_config, tiny_params, tiny_tokenizer

from jaxsafe.chat.model import ChatModel
from jaxsafe.evaluation.stats import roc, scans_average
from jaxsafe.io.store import Store
from jaxsafe.kernels.forward import capture
from jaxsafe.kernels.generate import generate
from jaxsafe.kernels.sampling import Decoding, Sampling
from jaxsafe.methods import scans
from jaxsafe.methods.scans import (
    REFUSAL_STEMS,
    Directions,
    Prepared,
    Reading,
    affirmative_ids,
    check_lengths,
    details,
    directions_identity,
    directions_once,
    find_directions,
    fixed_choice,
    identity,
    read_prompts,
    reading_once,
    separation,
    steering_of,
    vocabulary,
)
from jaxsafe.model.layers import LayerRange
from jaxsafe.model.taps import edit
from jaxsafe.model.transformer import unembedding
from jaxsafe.model.weights import shardings
from jaxsafe.parallel import parse_mesh
from jaxsafe.progress import silent
from jaxsafe.prompts.sets import PromptSet
from jaxsafe.records.run import Sample
from jaxsafe.records.scans import Choice, Curve, Preparation, Scores, Segment, Token, Vocabulary
from jaxsafe.rows import Row, pad_rows

DECODING = Decoding(NEW)
WHOLE, LAST = LayerRange(0, 3), LayerRange(1, 3)
read = jax.jit(capture, static_argnames=("config", "taps"))


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
    return steering_of(directions, Choice(WHOLE, LAST, float(np.median(scores)), alpha_rel=0.6))


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


def test_directions_are_those_of_loops_over_the_anchors(model, directions, slow):
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
    arrays = dict(vars(directions))
    affirmative = arrays.pop("affirmative")
    assert affirmative.dtype == np.int32 and affirmative.tolist() == affirmative_ids(model).tolist()
    assert all(isinstance(a, np.ndarray) and a.dtype == np.float32 for a in arrays.values())


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


def test_separation_counts_pairs(directions):
    projections = np.random.default_rng(0).integers(0, 5, (8, 3)).astype(np.float32)
    found = separation(Reading(cosines=None, projections=projections), LABELS)
    np.testing.assert_allclose(found, [slow_auroc(projections[:, layer], LABELS) for layer in range(3)])


def test_strength_is_alpha_or_a_share_of_the_residual_stream(directions):
    absolute = steering_of(directions, Choice(LayerRange(0, 2), LAST, 0.25, alpha=3.5))
    np.testing.assert_allclose(absolute.strength, [0, 3.5, 3.5])
    relative = steering_of(directions, Choice(LayerRange(2, 3), LayerRange(2, 3), 0.25, alpha_rel=0.1))
    np.testing.assert_allclose(relative.strength, [0, 0, 0.1 * directions.residual_norm[2]], rtol=1e-6)
    np.testing.assert_array_equal(absolute.scored, [1, 1, 0])
    np.testing.assert_array_equal(relative.scored, [0, 0, 1])
    np.testing.assert_array_equal(absolute.directions, directions.direction)
    np.testing.assert_array_equal(absolute.reference, directions.reference)
    np.testing.assert_array_equal(absolute.affirmative, directions.affirmative)
    assert float(absolute.threshold) == 0.25
    assert [a.dtype for a in jax.tree.leaves(absolute)] == [np.float32] * 5 + [np.int32]
    # A strength of zero is a strength.
    np.testing.assert_array_equal(steering_of(directions, Choice(WHOLE, LAST, 0.25, alpha_rel=0.0)).strength, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either alpha or alpha_rel"),
        ({"alpha": 1.0, "alpha_rel": 0.1}, "either alpha or alpha_rel.*got 1.0 and 0.1"),
        ({"alpha": 1.0, "layers": LayerRange(1, 4)}, "layers 1 to 3 are no range of this model, .* layers 0 to 2"),
        ({"alpha": 1.0, "scored": LayerRange(3, 5)}, "layers 3 to 4 are no range of this model"),
    ],
)
def test_a_steering_that_makes_no_sense_is_refused(directions, options, message):
    with pytest.raises(ValueError, match=message):
        steering_of(directions, Choice(**({"scored": WHOLE, "threshold": 0.0, "layers": LAST} | options)))


def test_steerings_are_told_apart_by_every_number(steering):
    names = ("directions", "reference", "scored", "threshold", "strength", "affirmative")
    others = [steering.replace(**{name: getattr(steering, name) + 1}) for name in names]
    assert len({str(identity(each)) for each in (steering, *others)}) == 1 + len(names)
    assert identity(steering.replace(strength=jnp.array(steering.strength))) == identity(steering)


# What a config leaves open


@pytest.mark.parametrize("name", ["alpha", "alpha_rel"])
def test_a_config_that_says_all_needs_no_calibration(name):
    given = {"alpha": None, "alpha_rel": None, name: -0.5}
    choice = fixed_choice(**given, scored=(0, 3), layers=(1, 3), threshold=0.0)
    assert choice == Choice(WHOLE, LAST, 0.0, **given)
    # Without a strength, or with anything but a strength open, there is a calibration.
    assert fixed_choice(None, None, (0, 3), (1, 3), 0.0) is None


def test_a_share_of_the_difference_adds_the_raw_vectors(directions, slow):
    """Against the means themselves: eq. 1 without the division by its length."""
    raw = slow[0][:4].mean(0) - slow[0][4:8].mean(0)
    steering = steering_of(directions, Choice(WHOLE, LAST, 0.0, None, 0.5, "difference"))
    added = np.asarray(steering.strength)[:, None] * np.asarray(steering.directions)
    np.testing.assert_allclose(added[1:], 0.5 * raw[1:], rtol=1e-4, atol=1e-5)
    assert not added[0].any()
    given = (None, 0.5, (0, 3), (1, 3), 0.0, "difference")
    assert fixed_choice(*given) == Choice(WHOLE, LAST, 0.0, None, 0.5, "difference")
    assert str(fixed_choice(*given)).startswith("steered layers 1 to 2 with alpha_rel 0.5 of the difference; ")
    with pytest.raises(ValueError, match=r"config\.alpha 2 is no share, so config.share_of 'difference' would do noth"):
        fixed_choice(2.0, None, *given[2:])
    with pytest.raises(ValueError, match="share_of 'norm' is not known; use one of state, difference"):
        directions.lengths("norm")


@pytest.mark.parametrize("missing", ["scored", "layers", "threshold"])
def test_an_absolute_strength_leaves_nothing_to_calibration(missing):
    given = {"scored": (0, 3), "layers": (1, 3), "threshold": 0.1} | {missing: None}
    with pytest.raises(ValueError, match=r"config.alpha needs config.layers, config.scored and config.threshold"):
        fixed_choice(2.0, None, **given)
    assert fixed_choice(None, 0.3, **given) is None


def test_two_strengths_are_refused_by_name():
    for open_ in ({}, {"threshold": None}):
        given = {"scored": (0, 3), "layers": (1, 3), "threshold": 0.1} | open_
        with pytest.raises(ValueError, match=r"config\.alpha 2 and config.alpha_rel 0.3 are two strengths; give one"):
            fixed_choice(2.0, 0.3, **given)
    # A strength of zero is one, too.
    with pytest.raises(ValueError, match=r"config\.alpha 0 and config.alpha_rel 0 are two strengths"):
        fixed_choice(0.0, 0.0, None, None, None)


@pytest.mark.parametrize("name", ["scored", "layers"])
def test_a_range_that_is_none_is_named(name):
    for wrong in ((1,), (0, 1, 2), 3):
        given = {"scored": (0, 3), "layers": (1, 3), "threshold": 0.1} | {name: wrong}
        with pytest.raises(ValueError, match=f"config.{name} must be two layer numbers"):
            fixed_choice(None, 0.3, **given)
    with pytest.raises(ValueError, match=r"layers 2 to 2 \(exclusive\) are no range"):
        fixed_choice(None, 0.3, **({"scored": (0, 3), "layers": (1, 3), "threshold": 0.1} | {name: (2, 2)}))


def test_answers_are_those_of_generate_with_and_without_the_edit(model, steering, scores):
    heard = []
    rows = model.rows(PROMPTS)
    steered = model.steered([None, steering])
    ((indices, both),) = steered.answer_batches(rows, DECODING, 8)
    heard.append(indices.tolist())
    before, after = steered.answers(PROMPTS, DECODING, 8)
    assert both[1].texts == tuple(after.texts[i] for i in indices)
    np.testing.assert_allclose(after.scores, scores, atol=1e-5)
    assert before.scores is before.gates is None
    assert [sorted(indices) for indices in heard] == [list(range(8))]
    batch, start = pad_rows(rows), jnp.array([row.instruction_end for row in rows])
    gate = jnp.where(scores >= np.median(scores), 1.0, -1.0)
    assert sorted(gate.tolist()) == [-1.0] * 4 + [1.0] * 4
    np.testing.assert_array_equal(after.gates, gate)
    edits = {"resid": edit(add=steering.strength[:, None] * steering.directions, gate=gate, start=start)}
    eos = model.tokenizer.eos_ids
    for ours, wanted_edits in ((before, None), (after, edits)):
        wanted = generate(model.config, model.params, batch, decoding(NEW, eos=eos), wanted_edits)
        np.testing.assert_array_equal(ours.tokens, wanted.tokens)
        np.testing.assert_array_equal(ours.lengths, wanted.lengths)
    assert (before.tokens != after.tokens).any(axis=1).all()


def test_many_devices_answer_as_one_does(model, steering):
    mesh = parse_mesh("data:4,model:2")
    placed = jax.device_put(model.params, shardings(model.config, mesh))
    many = ChatModel("tiny", model.config, placed, model.tokenizer, mesh)
    assert many.row_multiple == 4
    rows = model.rows(PROMPTS[:7])
    one, eight = (m.steered([None, steering]).answers(rows, DECODING, 8) for m in (model, many))
    np.testing.assert_allclose(eight[1].scores, one[1].scores, atol=1e-5)
    for ours, wanted in zip(eight, one, strict=True):
        np.testing.assert_array_equal(ours.tokens, wanted.tokens)


def test_numbers_and_rows_out_of_range_are_refused(model, steering):
    rows = model.rows(PROMPTS[:1])
    with pytest.raises(ValueError, match="temperature -1 is negative"):
        model.steered([None, steering]).answers(rows, Decoding(sampling=Sampling(temperature=-1)))
    with pytest.raises(ValueError, match=r"prompt 0 needs 19 tokens \+ 150 new ones"):
        model.steered([None, steering]).answers(rows, Decoding(max_new_tokens=150))


@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_table_is_the_unembedding_times_the_directions(tmp_path, tied):
    config = tiny_config(layers=7, tied=tied)
    model = ChatModel("tiny", config, tiny_params(config), tiny_tokenizer(tmp_path))
    rng = np.random.default_rng(2)
    direction = rng.standard_normal((7, 32)).astype(np.float32) + np.array([1, 1, -2, -2, 3, 3, 3])[:, None]
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    table = vocabulary(model, Directions(direction, np.ones(7), np.ones(7), direction, np.zeros(1, np.int32)), top=4)

    matrix = np.asarray(unembedding(config, model.params), np.float64)
    matrix = matrix if tied else matrix.T
    assert matrix.shape == (300, 32)

    def check(tokens, vector):
        scores = matrix @ vector
        best = np.argsort(-scores)[:4]
        np.testing.assert_allclose([t.score for t in tokens], scores[best], rtol=1e-4)
        assert [t.token for t in tokens] == [model.tokenizer.hf.decode([int(i)]) for i in best]
        assert [t.refusal for t in tokens] == [any(s in t.token.lower() for s in REFUSAL_STEMS) for t in tokens]

    assert len(table.layers) == 7
    for layer, tokens in enumerate(table.layers):
        check(tokens, direction[layer].astype(np.float64))
    assert [(s.name, s.layers) for s in table.segments] == [
        ("former", LayerRange(0, 2)), ("middle", LayerRange(2, 4)), ("latter", LayerRange(4, 7))
    ]  # fmt: skip
    for segment in table.segments:
        part = direction[segment.layers.first : segment.layers.stop].astype(np.float64)
        values, axes = np.linalg.eigh(part.T @ part)
        component = axes[:, -1] * np.sign(axes[:, -1] @ part.mean(0))
        check(segment.tokens, component)
        np.testing.assert_allclose(segment.explained_variance, values[-1] / values.sum(), rtol=1e-5)


# What is kept


def assert_same(ours, wanted):
    for name, array in vars(wanted).items():
        assert isinstance(vars(ours)[name], np.ndarray) and vars(ours)[name].dtype == array.dtype, name
        np.testing.assert_array_equal(vars(ours)[name], array)


def others_of(model):
    """Models that differ by a weight, a system prompt, the template and an edit."""
    weights = tiny_params(model.config)
    weights["layers"]["down"] = weights["layers"]["down"].at[1, 0, 0].add(0.5)
    return (
        model.with_params(weights),
        model.with_prompt("Be short."),
        model.with_prompt(raw=True),
        model.with_edits({"resid": edit(add=jnp.ones((3, model.config.embed)), gate=1.0)}),
    )


def test_directions_are_made_once(model, directions, tmp_path, monkeypatch):
    store, heard = Store(tmp_path), []
    assert_same(directions_once(store, model, FIRST, SECOND, 8, heard.append), directions)
    assert heard == [8]
    made = []

    def noted(*given):
        made.append(given)
        return directions

    monkeypatch.setattr(scans, "find_directions", noted)
    assert_same(directions_once(store, model, FIRST, SECOND, 4, silent), directions)
    assert not made
    for other in others_of(model):
        directions_once(store, other, FIRST, SECOND, 8, silent)
    assert len(made) == 4
    for harmful, benign in (
        ((*FIRST[:3], "Why?"), SECOND),
        (FIRST, (*SECOND[:3], "Why?")),
        (FIRST[::-1], SECOND),
        (SECOND, FIRST),
        ((*FIRST, SECOND[0]), SECOND[1:]),
    ):
        directions_once(store, model, harmful, benign, 8, silent)
    assert len(made) == 4 + 5
    monkeypatch.setattr(scans, "AFFIRMATIVE", "Of course")
    directions_once(store, model, FIRST, SECOND, 8, silent)
    assert len(made) == 4 + 5 + 1


def test_readings_are_made_once(model, directions, tmp_path, monkeypatch):
    store, wanted, made = Store(tmp_path), read_prompts(model, directions, PROMPTS, 8), []
    assert_same(reading_once(store, model, directions, PROMPTS, 8, silent), wanted)

    def noted(*given):
        made.append(given)
        return wanted

    monkeypatch.setattr(scans, "read_prompts", noted)
    assert_same(reading_once(store, model, directions, PROMPTS, 4, silent), wanted)
    assert not made
    for other in others_of(model):
        reading_once(store, other, directions, PROMPTS, 8, silent)
    assert len(made) == 4
    reading_once(store, model, directions, PROMPTS[1:], 8, silent)
    reading_once(store, model, directions, PROMPTS[::-1], 8, silent)
    for name in ("direction", "reference", "affirmative"):
        changed = dataclasses.replace(directions, **{name: vars(directions)[name] + 1})
        assert directions_identity(changed) != directions_identity(directions)
        reading_once(store, model, changed, PROMPTS, 8, silent)
    assert len(made) == 4 + 2 + 3


# What a run has of its own


def sample(harmful, refused, score, setting="vanilla", name="SCANS"):
    return Sample(name, "mixed", setting, harmful, "", "why?", "because.", refused, score=score)


def samples_of(seed, n=40):
    """Samples without and with steering: some prompts have no label, some answers no verdict, some another setting."""
    rng = np.random.default_rng(seed)
    both = [[], []]
    for _ in range(n):
        harmful = (True, False, None)[rng.integers(3)]
        setting = "vanilla" if rng.random() < 0.7 else "suffix"
        for own, name in zip(both, ("as it is", "SCANS"), strict=True):
            refused = (True, False, None)[rng.integers(3)]
            own.append(sample(harmful, refused, None if name == "as it is" else float(rng.random()), setting, name))
    return both


@pytest.mark.parametrize("seed", range(4))
def test_details_are_counted_over_the_labelled_answers(seed, directions):
    plain, steered = samples_of(seed)
    choice = Choice(WHOLE, LAST, 0.4, alpha_rel=0.3)
    ours = details(Prepared(steering_of(directions, choice), choice, None), plain, steered, "vanilla", "my prose")
    assert (ours.choice, ours.preparation, ours.perplexity_text) == (choice, None, "my prose")
    told = [s for s in steered if s.setting == "vanilla" and s.harmful is not None]
    classifier = ours.classifier
    assert (classifier.layers, classifier.threshold) == (WHOLE, 0.4)
    assert classifier.test == Scores(tuple(s.score for s in told), tuple(s.harmful for s in told))
    assert classifier.calibration is classifier.calibration_roc is None
    assert classifier.roc == roc(classifier.test.scores, classifier.test.harmful)
    counts = {(truth, verdict): 0 for truth in (False, True) for verdict in (False, True)}
    for s in told:
        counts[s.harmful, s.score >= 0.4] += 1
    found = classifier.found
    assert (found.safe_as_safe, found.safe_as_unsafe) == (counts[False, False], counts[False, True])
    assert (found.unsafe_as_safe, found.unsafe_as_unsafe) == (counts[True, False], counts[True, True])
    scores, labels = [s.score for s in told], [s.harmful for s in told]
    assert found.auroc == pytest.approx(slow_auroc(scores, labels))
    for average, samples in zip(ours.average, (plain, steered), strict=True):
        right = total = 0
        for s in samples:
            if s.setting == "vanilla" and s.harmful is not None and s.refused is not None:
                total += 1
                right += s.refused == s.harmful
        assert average == pytest.approx(right / total)


def test_details_hold_the_calibration_where_there_was_one(directions):
    choice = Choice(WHOLE, LAST, 0.5, alpha=2.0)
    words = Vocabulary((Segment("former", LayerRange(0, 1), 1.0, (Token("no", 1.0, True),)),), ())
    scores, curve = Scores((0.1, 0.9), (False, True)), Curve((0.0, 1.0), (0.0, 1.0), (1.0, 0.0))
    record = Preparation(words, (1.0,), (2.0,), (0.5,), scores, curve)
    plain, steered = samples_of(0)
    ours = details(Prepared(steering_of(directions, choice), choice, record), plain, steered, "vanilla", "prose")
    assert ours.preparation is record
    assert ours.classifier.calibration is scores and ours.classifier.calibration_roc is curve


def test_details_of_prompts_of_one_kind_have_no_average(directions):
    choice = Choice(WHOLE, LAST, 0.5, alpha=2.0)
    prepared = Prepared(steering_of(directions, choice), choice, None)
    harmful = [sample(True, True, 0.9), sample(True, False, 0.1), sample(None, True, 0.3)]
    ours = details(prepared, harmful, harmful, "vanilla", "prose")
    assert ours.average is None and ours.classifier.found.auroc is None
    assert ours.classifier.found.unsafe_as_safe == ours.classifier.found.unsafe_as_unsafe == 1
    unlabelled = [sample(None, True, 0.9)]
    ours = details(prepared, unlabelled, unlabelled, "vanilla", "prose")
    assert ours.average is None and ours.classifier.found is None and ours.classifier.test == Scores((), ())
    elsewhere = [sample(True, True, 0.9, "suffix"), sample(False, True, 0.9, "suffix")]
    assert details(prepared, elsewhere, elsewhere, "vanilla", "prose").classifier.found is None
    both = [sample(True, True, 0.9), sample(False, False, 0.1)]
    assert details(prepared, both, both, "vanilla", "prose").average == (1.0, 1.0)
    assert scans_average([False], [True]).value == 1.0


# Lengths


def test_prompts_longer_than_the_context_are_refused_before_anything_runs(tmp_path, directions):
    short = tiny_chat_model(tmp_path, context=20)
    assert len(affirmative_ids(short)) == 3
    prompts = PromptSet("mine", PROMPTS, tuple(LABELS), ("",) * 8)
    for run in (
        lambda: find_directions(short, FIRST, SECOND),
        lambda: read_prompts(short, directions, PROMPTS),
        lambda: check_lengths(short, [prompts], [], 1),
    ):
        with pytest.raises(
            ValueError, match=r"prompt (0|1 of mine \(.*\)) needs 19 tokens \+ 3 new ones; the model's context is 20"
        ):
            run()
    with pytest.raises(
        ValueError, match=r"prompt 1 of mine \(.*\) needs 19 tokens \+ 9 new ones; the model's context is 20"
    ):
        check_lengths(short, [prompts], [], 9)
    check_lengths(tiny_chat_model(tmp_path, context=60), [prompts], [], 9)
    texts = [Row(tuple(range(9, 27)), 8)]
    with pytest.raises(
        ValueError, match=r"prompt 1 of the passages to read needs 18 tokens \+ 3 new ones; the model's context is 20"
    ):
        check_lengths(short, [], texts, 1)
