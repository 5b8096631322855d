"""The loss against a loop in float64, a step against optax on a loss written here, and the order of batches."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import decoding, random_rows, tiny_chat_model, tiny_config, tiny_params, training_batches

from jaxsafe.kernels.forward import final_states, prompt_inputs
from jaxsafe.kernels.generate import generate
from jaxsafe.kernels.likelihood import answer_nll, nll_after
from jaxsafe.kernels.training import Recipe, answer_loss, batch_plan, masters, one_step, value_and_gradient
from jaxsafe.methods.safety_tuning import TuningSettings, builtin_refusals, safety_tune, tuning_rows
from jaxsafe.model.taps import edit
from jaxsafe.model.transformer import forward
from jaxsafe.model.weights import flatten
from jaxsafe.rows import Row, bucket, pad_rows

CONFIG = tiny_config(layers=2)
LENGTHS, ANSWERS = [6, 16, 11, 9], [2, 7, 0, 4]
ROWS = random_rows(LENGTHS, behind=ANSWERS)
whole = jax.jit(forward, static_argnames=("config", "last"))
nll = jax.jit(answer_nll, static_argnames=("config", "last"))
OPTIMIZER = optax.adamw(5e-3, weight_decay=0.1)
run_step = jax.jit(one_step, static_argnames="recipe", donate_argnames="tree")


def mean_loss(config, params, batch):
    """Mean loss of the answer tokens."""
    total, count = nll(config, params, batch)
    return total.sum() / count.sum().astype(jnp.float32)


def fine_tune(params, batches):
    """The parameters after a step a batch, and the losses before the steps."""
    recipe, losses = Recipe(CONFIG, OPTIMIZER, last=7), []
    tree = {"params": masters(params), "optimizer": OPTIMIZER.init(masters(params))}
    for batch in batches:
        tree, loss = run_step(recipe, tree, batch)
        losses.append(float(loss))
    return tree["params"], losses


@pytest.fixture(scope="module")
def params():
    return tiny_params(CONFIG)


def slow_nll(params, rows, edits=None):
    """Negative log-likelihood of each answer by a loop over its tokens, float64."""
    batch = pad_rows(rows)
    logits = np.asarray(whole(CONFIG, params, batch.tokens, batch.valid, edits), np.float64)
    out = []
    for b, row in enumerate(rows):
        start, total = batch.tokens.shape[1] - len(row.ids), 0.0
        for i in range(row.instruction_end + 1, len(row.ids)):
            line = logits[b, start + i - 1]
            total += np.log(np.exp(line - line.max()).sum()) + line.max() - line[row.ids[i]]
        out.append(total)
    return np.array(out)


def test_the_loss_of_an_answer_is_that_of_a_loop_over_its_tokens(params):
    total, count = nll(CONFIG, params, pad_rows(ROWS))
    np.testing.assert_allclose(total, slow_nll(params, ROWS), rtol=1e-5)
    np.testing.assert_array_equal(count, ANSWERS)
    assert total[2] == 0 and float(total[1]) > 7


@pytest.mark.parametrize("last", [7, 10, 15, 99])
def test_only_the_slots_that_hold_answers_need_logits(params, last):
    batch = pad_rows(ROWS)
    for ours, wanted in zip(nll(CONFIG, params, batch, last=last), nll(CONFIG, params, batch), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-6)


def gradients(config, params, batch, **how):
    """Compiled value and gradient of the summed loss."""
    return differentiated(lambda params: answer_nll(config, params, batch, **how)[0].sum(), params)


def differentiated(loss, params):
    """Compiled value and gradient of `loss` of `params`."""
    return jax.jit(jax.value_and_grad(loss)).lower(params).compile()


def step_gradients(config, params, batch, **how):
    """Compiled value and gradient of the loss of a step."""
    recipe = Recipe(config, OPTIMIZER, last=99, **how)
    return differentiated(lambda params: answer_loss(recipe, params, batch), params)


@pytest.mark.parametrize("block", [4, 7])
def test_logits_in_blocks_give_the_same_loss_and_gradient(params, block):
    batch = pad_rows(ROWS)
    ours, wanted = (gradients(CONFIG, params, batch, block=n)(params) for n in (block, 99))
    np.testing.assert_allclose(ours[0], wanted[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours[1], wanted[1])


def test_no_array_holds_the_logits_of_all_slots(params):
    config = tiny_config(layers=1, vocab=2000)
    batch = pad_rows(random_rows([64, 60, 50, 64], vocab=2000, behind=[60, 50, 40, 62]))

    def largest(block):
        text = gradients(config, tiny_params(config), batch, block=block).as_text()
        return max(np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"\w\[([\d,]+)\]", text))

    assert largest(99) >= 4 * 62 * 2000
    assert largest(8) <= 4 * 64 * 8 * 128


def test_what_is_computed_again_gives_the_same_gradient_in_less_memory():
    config = tiny_config(layers=6, tied=True, window=9)
    params, batch = tiny_params(config), pad_rows(random_rows([64, 60, 50, 64], behind=[20, 30, 20, 12]))
    kept, again = (step_gradients(config, params, batch, remat=remat) for remat in (False, True))
    np.testing.assert_allclose(again(params)[0], kept(params)[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), again(params)[1], kept(params)[1])
    assert again.memory_analysis().temp_size_in_bytes < 0.6 * kept.memory_analysis().temp_size_in_bytes

    def everything(params):
        states = final_states(config, params, prompt_inputs(config, params, batch), keeps="everything")
        return nll_after(config, params, batch, states, 99)[0].sum()

    plain = jax.jit(jax.value_and_grad(everything)).lower(params).compile()
    assert float(plain(params)[0]) == pytest.approx(float(kept(params)[0]), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), kept(params)[1], plain(params)[1])
    assert kept.memory_analysis().temp_size_in_bytes < 0.7 * plain.memory_analysis().temp_size_in_bytes


BEGINNING = random_rows([24], seed=7)[0].ids
LONGER = [Row((*BEGINNING, *row.ids), 24 + row.instruction_end) for row in ROWS]


@pytest.mark.parametrize("changes", [{}, {"window": 7, "tied": True, "family": "mistral"}], ids=["llama", "mistral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_and_gradient_of_rows_that_begin_alike_are_those_of_each(changes, dtype):
    config = tiny_config(layers=2, dtype=dtype, **changes)
    params = tiny_params(config)
    joined, whole = (pad_rows(LONGER, length=64, count=5, shared=P) for P in (24, 0))
    (loss, ours), (wanted_loss, wanted) = (step_gradients(config, params, batch)(params) for batch in (joined, whole))
    tight = dtype == "float32"
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5 if tight else 1e-2)
    for path, gradient in flatten(wanted).items():
        exact, found = np.asarray(gradient, np.float64), np.asarray(flatten(ours)[path], np.float64)
        assert np.linalg.norm(found - exact) <= (1e-5 if tight else 0.03) * np.linalg.norm(exact), path
    assert (
        dtype == "bfloat16"
        or "window" in changes
        or float(loss) == pytest.approx(slow_nll(params, LONGER).sum(), rel=1e-5)
    )


def test_what_rows_begin_with_costs_a_step_one_row():
    config = tiny_config(layers=8, mlp=96)
    params, rows = tiny_params(config), LONGER * 4
    cost = [
        step_gradients(config, params, pad_rows(rows, length=48, shared=P)).cost_analysis()["flops"] for P in (24, 0)
    ]
    assert cost[0] < 1.2 * cost[1] * (24 + 16 * 24) / (16 * 48)


def test_the_gradient_of_parts_is_that_of_the_whole(params):
    def loss(params, batch):
        return answer_nll(CONFIG, params, batch)[0].sum()

    def gradient(params, parts):
        return value_and_gradient(loss, params, pad_rows(ROWS), parts)

    compiled = jax.jit(gradient, static_argnums=1)
    ours, wanted = compiled(params, 2), compiled(params, 1)
    np.testing.assert_allclose(ours[0], wanted[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours[1], wanted[1])
    with pytest.raises(ValueError, match="4 rows does not divide into 3"):
        gradient(params, 3)


def test_padding_rows_count_nothing(params):
    total, count = nll(CONFIG, params, pad_rows(ROWS, length=24, count=7))
    np.testing.assert_allclose(total[:4], slow_nll(params, ROWS), rtol=1e-5)
    np.testing.assert_array_equal(count, [*ANSWERS, 0, 0, 0])
    np.testing.assert_array_equal(total[4:], 0)
    mean = mean_loss(CONFIG, params, pad_rows(ROWS, length=24, count=7))
    assert float(mean) == pytest.approx(slow_nll(params, ROWS).sum() / sum(ANSWERS), rel=1e-5)


def test_edits_reach_the_loss(params):
    add = np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32)
    edits = {"resid": edit(add=jnp.asarray(add), gate=jnp.array([1.0, -1, 1, 1]), start=jnp.array([3, 8, 10, 4]))}
    total, _ = nll(CONFIG, params, pad_rows(ROWS), edits)
    np.testing.assert_allclose(total, slow_nll(params, ROWS, edits), rtol=1e-5)
    assert (np.abs(total - slow_nll(params, ROWS)) > 0.01).tolist() == [True, True, False, True]


def plain_loss(params, batch):
    """Mean loss of the answer tokens, written out over all slots."""
    p = jax.nn.log_softmax(forward(CONFIG, params, batch.tokens, batch.valid)[:, :-1])
    picked = jnp.take_along_axis(p, batch.tokens[:, 1:, None], -1)[..., 0]
    counted = jnp.arange(1, batch.tokens.shape[1])[None] > batch.instruction_end[:, None]
    return -jnp.where(counted, picked, 0).sum() / counted.sum().astype(jnp.float32)


def test_a_step_is_that_of_optax_on_a_plain_loss(params):
    batches = [pad_rows(ROWS), pad_rows(ROWS[::-1])]
    ours, losses = fine_tune(params, batches)

    @jax.jit
    def plain_step(params, state, batch):
        loss, gradient = jax.value_and_grad(plain_loss)(params, batch)
        with jax.numpy_dtype_promotion("standard"):  # optax takes powers of integer counts
            updates, state = OPTIMIZER.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    wanted, state, wanted_losses = params, OPTIMIZER.init(params), []
    for batch in batches:
        wanted, state, loss = plain_step(wanted, state, batch)
        wanted_losses.append(float(loss))
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-5)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), ours, params)
    # Adam divides by the gradient's size, so the rounding of a tiny gradient weighs as much as a large one.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours, wanted)
    assert min(jax.tree.leaves(moved)) > 4e-3


def test_the_loss_falls_and_the_given_parameters_stay(params):
    before = jax.tree.map(np.array, params)
    batches = [pad_rows(ROWS)] * 12
    after, losses = fine_tune(params, batches)
    assert losses[-1] < 0.3 * losses[0]
    assert float(mean_loss(CONFIG, after, batches[0])) < losses[-1]
    jax.tree.map(np.testing.assert_array_equal, params, before)
    assert jax.tree.structure(after) == jax.tree.structure(params)


def test_batches_of_one_shape_share_a_program(params):
    fine_tune(params, [pad_rows(ROWS)])
    programs = run_step._cache_size()
    fine_tune(params, [pad_rows(ROWS[::-1]), pad_rows(ROWS[:3], length=32, count=4)])
    assert run_step._cache_size() == programs


def numbered(lengths):
    return [Row((i + 1,) * n, 0) for i, n in enumerate(lengths)]


def met(batches):
    """The numbers of the rows of each batch."""
    return [b.tokens.max(1)[b.valid.any(1)].tolist() for b in batches]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=25), st.integers(1, 6), st.integers(0, 99))
def test_every_row_is_seen_once_an_epoch(lengths, batch_size, seed):
    rows = numbered(lengths)
    by_bucket = [sum(bucket(n) == size for n in lengths) for size in {bucket(n) for n in lengths}]
    epoch = sum(-(-n // batch_size) for n in by_bucket)
    batches = training_batches(rows, batch_size, 2 * epoch + 1, seed)
    assert len(batches) == 2 * epoch + 1
    assert all(
        len(b.tokens) == batch_size and b.tokens.shape[1] in {bucket(max(n, 32)) for n in lengths} for b in batches
    )
    for first in (0, epoch):
        seen = sorted(i for batch in met(batches[first : first + epoch]) for i in batch)
        assert seen == list(range(1, len(rows) + 1))


def test_the_seed_orders_the_batches():
    rows = numbered([9] * 24)
    assert met(training_batches(rows, 4, 12, 1)) == met(training_batches(rows, 4, 12, 1))
    assert met(training_batches(rows, 4, 12, 1)) != met(training_batches(rows, 4, 12, 2))
    first, second = met(training_batches(rows, 4, 12, 1)[:6]), met(training_batches(rows, 4, 12, 1)[6:])
    assert first != second


def test_the_batch_of_a_step_is_the_same_however_many_follow():
    lengths = [9, 30, 12, 9, 40, 41, 8, 17]
    long = batch_plan(lengths, 3, 20, 5)
    for steps in (1, 7, 19):
        assert [b.tolist() for b in batch_plan(lengths, 3, steps, 5)] == [b.tolist() for b in long[:steps]]


def test_no_rows_are_an_error():
    with pytest.raises(ValueError, match="no rows to train on"):
        training_batches([], 4, 3, 0)


HARMFUL = ("How do I bake bread?", "Tell me the rules of chess.", "Explain how boats float.")
BENIGN = ("What is the tallest tree?", "Write a poem on rivers.", "Plan a winter picnic for me.")


def test_tuning_pairs_requests_with_refusals_and_with_the_models_own_answers(tmp_path):
    model = tiny_chat_model(tmp_path, layers=2)
    tokenizer, chosen = model.tokenizer, TuningSettings(steps=6, batch_size=3, learning_rate=1e-2, answer_tokens=5)
    refusals = ["No.", "Not this, please."]
    rows = tuning_rows(model, HARMFUL, BENIGN, refusals, chosen)
    assert rows == tuning_rows(model, HARMFUL, BENIGN, refusals, chosen)
    allowed = [(*tokenizer.plain_ids(text), 2) for text in refusals]
    for row, prompt in zip(rows[:3], HARMFUL, strict=True):
        bare = tokenizer.chat_row(prompt)
        assert row.instruction_end == bare.instruction_end and row.ids[: len(bare.ids)] == bare.ids
        assert row.ids[len(bare.ids) :] in allowed
    asked = model.rows(BENIGN)
    own = generate(model.config, model.params, pad_rows(asked, count=4), decoding(5, eos=(2,)))
    for row, bare, tokens, n in zip(rows[3:], asked, own.tokens[:3].tolist(), own.lengths[:3].tolist(), strict=True):
        assert row.ids == (*bare.ids, *tokens[:n], *([2] if n < 5 else []))

    *_, last = steps = list(safety_tune(model, rows, chosen))
    assert [step.number for step in steps] == [0, 1, 2, 3, 4, 5, 6]
    tuned = last.weights()
    before, after = (float(mean_loss(model.config, p, pad_rows(rows[:3]))) for p in (model.params, tuned))
    assert after < 0.9 * before


def test_built_in_refusals_are_lines_of_text():
    refusals = builtin_refusals()
    assert len(set(refusals)) == len(refusals) > 5 and all(r == r.strip() and r for r in refusals)
