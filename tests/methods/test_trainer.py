"""Runs against optax on a loss written here; what is frozen; one device and eight; and runs that are killed.

`python test_trainer.py FOLDER` is the run that the tests kill.
"""

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compilations import compilations
from tiny import random_rows, tiny_config, tiny_params, training_batches

from jaxsafe.io.checkpoint import open_checkpoints, outline, restore, save
from jaxsafe.kernels.freezing import freeze, layers, outside
from jaxsafe.kernels.lora import LoRA, init
from jaxsafe.methods import trainer
from jaxsafe.methods.trainer import (
    FREE,
    FineTuning,
    begin,
    compiled_step,
    joined,
    learning_rates,
    train,
    trained,
)
from jaxsafe.model.transformer import forward
from jaxsafe.model.weights import flatten, linear_maps, nest, shardings
from jaxsafe.parallel import parse_mesh, put_rows
from jaxsafe.rows import Row, pad_rows

CONFIG = tiny_config(layers=2)
ROWS = random_rows([14, 16, 13, 15, 16, 14, 13, 15, 16], behind=[4, 7, 3, 5, 2, 6, 3, 1, 8])
BRISK = FineTuning(steps=4, batch_size=4, learning_rate=3e-3, weight_decay=0.1, seed=2)
KILLED = dataclasses.replace(BRISK, steps=16, checkpoint_every=2)


def quick(on):
    """The programs are tiny: less time goes to running than to optimising them."""
    jax.config.update("jax_disable_most_optimizations", on)


@pytest.fixture(autouse=True, scope="module")
def quick_programs():
    quick(True)
    yield
    quick(False)


@functools.cache
def params():
    return tiny_params(CONFIG)


def random_mask(seed=0):
    rng = np.random.default_rng(seed)
    return nest({path: rng.random(flatten(params())[path].shape) < 0.5 for path in linear_maps(CONFIG)})


def bits(a):
    return np.asarray(a).view({2: np.uint16, 4: np.uint32}[a.dtype.itemsize])


def assert_same_bits(ours, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), ours, wanted)


# A run is that of optax


def plain_loss(config, params, batch):
    """Mean loss of the answer tokens, written out over all slots."""
    p = jax.nn.log_softmax(forward(config, params, batch.tokens, batch.valid)[:, :-1])
    picked = jnp.take_along_axis(p, batch.tokens[:, 1:, None], -1)[..., 0]
    counted = jnp.arange(1, batch.tokens.shape[1])[None] > batch.instruction_end[:, None]
    counted &= batch.valid[:, 1:]
    return -jnp.where(counted, picked, 0).sum() / counted.sum().astype(jnp.float32)


def plain_run(config, params, settings, optimizer):
    """The weights and losses of a plain loop in the dtype of `params`."""

    @jax.jit
    def step(params, state, batch):
        loss, gradient = jax.value_and_grad(lambda p: plain_loss(config, p, batch))(params)
        with jax.numpy_dtype_promotion("standard"):  # optax takes powers of integer counts
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for batch in training_batches(ROWS, settings.batch_size, settings.steps, settings.seed):
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
    return params, losses


@functools.cache
def whole_run():
    """Weights and losses of the brisk run without any special."""
    return weights_and_losses(train(CONFIG, params(), ROWS, BRISK))


def weights_and_losses(steps):
    """The weights at the end of a run, and the loss of every step."""
    first, *others = steps
    assert first.loss is None
    return others[-1].weights(), [step.loss for step in others]


def test_a_run_is_that_of_optax_on_a_plain_loss():
    before = jax.tree.map(np.array, params())
    ours, losses = whole_run()
    wanted, wanted_losses = plain_run(CONFIG, params(), BRISK, optax.adamw(3e-3, weight_decay=0.1))
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-5)
    # Adam divides by the gradient's size, so the rounding of a tiny gradient weighs as much as a large one.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), ours, wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.median(np.abs(a - b)), 0, atol=1e-7), ours, wanted)
    assert min(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (ours, before)), strict=True)) > 5e-3
    assert_same_bits(params(), before)


@pytest.mark.parametrize("change", [{}, {"accumulation": 2, "remat": True}, {"slots": (48, 8)}])
def test_what_rows_begin_with_is_run_once_and_changes_no_number(change, monkeypatch):
    begin = random_rows([24], seed=5)[0].ids
    rows = [Row((*begin, *row.ids), 24 + row.instruction_end) for row in ROWS]
    settings, seen = dataclasses.replace(BRISK, **change), []

    def run(shared):
        monkeypatch.setattr(trainer, "joined", lambda *a: shared)
        monkeypatch.setattr(trainer, "put_rows", lambda batch, mesh: seen.append(batch.shared) or put_rows(batch, mesh))
        return weights_and_losses(train(CONFIG, params(), rows, settings))

    (wanted, wanted_losses), (ours, losses) = run(0), run(joined(rows, settings, None))
    assert seen == [0] * 4 + [24] * 4
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), ours, wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.median(np.abs(a - b)), 0, atol=1e-7), ours, wanted)


def test_rows_are_joined_on_one_device_where_they_are_short_and_nothing_is_dropped():
    begin = random_rows([30], seed=5)[0].ids
    rows = [Row((*begin, *row.ids), 30 + row.instruction_end) for row in ROWS]
    assert joined(rows, BRISK, None) == joined(rows, BRISK, parse_mesh("data:1,model:8")) == 24
    assert joined(rows, dataclasses.replace(BRISK, lora=LoRA(2)), None) == 24
    assert joined(rows, dataclasses.replace(BRISK, lora=LoRA(2, dropout=0.1)), None) == 0
    assert joined(rows, BRISK, parse_mesh("data:4,model:2")) == 0
    assert joined([*rows, Row((*begin, *range(500)), 40)], BRISK, None) == 0


def test_microbatches_and_recomputation_change_no_number():
    settings = dataclasses.replace(BRISK, accumulation=2, remat=True)
    ours, losses = weights_and_losses(train(CONFIG, params(), ROWS, settings))
    np.testing.assert_allclose(losses, whole_run()[1], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), ours, whole_run()[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.median(np.abs(a - b)), 0, atol=1e-7), ours, whole_run()[0])


def test_adapters_learn_and_leave_the_rest():
    settings = dataclasses.replace(
        BRISK, steps=30, learning_rate=2e-2, weight_decay=0.0, lora=LoRA(4, 8.0, ("q", "v", "down"))
    )
    ours, losses = weights_and_losses(train(CONFIG, params(), ROWS, settings))
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:3])
    for path, weight in flatten(params()).items():
        if path in ("layers/q", "layers/v", "layers/down"):
            axis = 32 if path != "layers/down" else 48
            change = np.asarray(flatten(ours)[path] - weight)
            assert all(np.linalg.matrix_rank(c.reshape(axis, -1), tol=1e-3) == 4 for c in change), path
        else:
            np.testing.assert_array_equal(bits(flatten(ours)[path]), bits(weight))


def test_slots_give_one_shape_and_change_no_number():
    settings = dataclasses.replace(BRISK, batch_size=9, steps=2)
    found = [
        trained(train(CONFIG, params(), ROWS, dataclasses.replace(settings, slots=s))) for s in ((16, 8), (40, 30))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), *found)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.median(np.abs(a - b)), 0, atol=1e-7), *found)
    for slots in ((15, 8), (16, 7)):
        with pytest.raises(ValueError, match=r"row \d has \d+ tokens, \d of its answer; slots are"):
            trained(train(CONFIG, params(), ROWS, dataclasses.replace(settings, slots=slots)))


def test_steps_move_nothing_to_the_device_but_their_batches():
    settings = FineTuning(steps=3, batch_size=3, learning_rate=1e-2)
    alone = [step.loss for step in train(CONFIG, params(), ROWS, settings)]
    steps = train(CONFIG, params(), ROWS, settings)
    next(steps)
    # A batch is placed by hand; whatever else were moved at a step would be refused.
    refused = pytest.raises(Exception, match="Disallowed host-to-device transfer")
    with jax.transfer_guard_host_to_device("disallow_explicit"), refused:
        next(steps)
    steps = train(CONFIG, params(), ROWS, settings)
    losses = [next(steps).loss]
    with jax.transfer_guard_host_to_device("disallow"):
        losses += [step.loss for step in steps]
    assert losses == alone


def test_weights_on_the_way_are_those_of_a_shorter_run():
    seen = {step.number: step.weights() for step in train(CONFIG, params(), ROWS, BRISK)}
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert_same_bits(seen[0], params())
    assert_same_bits(seen[2], trained(train(CONFIG, params(), ROWS, dataclasses.replace(BRISK, steps=2))))
    assert_same_bits(seen[4], whole_run()[0])


@pytest.mark.parametrize("lora", [None, LoRA(4, 16.0)], ids=["full", "lora"])
def test_another_step_seed_mask_or_row_compiles_nothing(lora):
    settings = dataclasses.replace(BRISK, steps=2, lora=lora, slots=(16, 8))
    steps = train(CONFIG, params(), ROWS, settings, frozen=freeze(random_mask()))
    next(steps), next(steps).weights()
    compiled = compilations()
    trained(steps)
    others = dataclasses.replace(settings, seed=5, checkpoint_every=7)
    first = trained(train(CONFIG, params(), ROWS, others, frozen=freeze(random_mask(1))))
    second = trained(train(CONFIG, params(), ROWS[2:], others, frozen=freeze(random_mask(2))))
    assert compiled == []
    for mask, ours in ((random_mask(1), first), (random_mask(2), second)):
        for path, part in flatten(mask).items():
            same = bits(flatten(ours)[path]) == bits(flatten(params())[path])
            assert same[part].all() and same[~part].mean() < 0.01


# Frozen parts


@pytest.mark.parametrize("lora", [None, LoRA(4, 16.0)], ids=["full", "lora"])
def test_what_is_frozen_stays_and_the_rest_moves(lora):
    draws = np.random.default_rng(3).standard_normal((2, 2, 48, 5))
    bases = {"layers/q": np.linalg.qr(draws[0, :, :32])[0], "layers/gate": np.linalg.qr(draws[1])[0]}
    mask = {path: part for path, part in flatten(random_mask()).items() if path not in bases}
    frozen = optax.chain(outside(nest(bases)), freeze(nest(mask)), layers([1]))
    settings = dataclasses.replace(BRISK, lora=lora)
    ours = flatten(trained(train(CONFIG, params(), ROWS, settings, frozen=frozen)))
    for path, weight in flatten(params()).items():
        same = bits(ours[path]) == bits(weight)
        if not path.startswith("layers/"):
            assert same.all(), path
            continue
        assert same[0].all(), path
        if path in mask:
            assert same[1][mask[path][1]].all(), path
            assert same[1][~mask[path][1]].mean() < 0.01, path
        elif path in bases:
            change = np.asarray(ours[path][1], np.float64) - np.asarray(weight[1], np.float64)
            assert np.abs(change).max() > 3e-3, path
            assert np.abs(change.reshape(-1, bases[path].shape[1]) @ bases[path][1]).max() < 2e-6, path
        else:
            assert same[1].all() if lora else same[1].mean() < 0.01, path


# Precision and devices


def test_steps_that_bfloat16_would_lose_add_up():
    config = tiny_config(layers=1, dtype="bfloat16")
    start = tiny_params(config)
    settings = dataclasses.replace(BRISK, steps=200, learning_rate=1e-5, weight_decay=0.0)
    ours = trained(train(config, start, ROWS, settings))
    few = dataclasses.replace(settings, steps=5)
    naive, _ = plain_run(config, start, few, optax.adamw(1e-5, weight_decay=0.0))
    assert jax.tree.map(jnp.dtype, ours) == jax.tree.map(jnp.dtype, start)

    def moved(tree):
        pairs = [(flatten(tree)[path], flatten(start)[path]) for path in linear_maps(config)]
        large = [(np.abs(b) > 0.1, np.asarray(a != b)) for a, b in pairs]
        return np.concatenate([m[at] for at, m in large]).mean()

    assert moved(naive) == 0
    assert moved(ours) > 0.3


@pytest.mark.parametrize("lora", [None, pytest.param(LoRA(4, 16.0), marks=pytest.mark.slow)], ids=["full", "lora"])
def test_eight_devices_train_as_one(lora):
    mesh = parse_mesh("data:-1,model:2")
    settings = dataclasses.replace(BRISK, steps=3, batch_size=8, accumulation=2, learning_rate=1e-4, lora=lora)
    frozen = freeze(random_mask())
    placed = jax.device_put(params(), shardings(CONFIG, mesh))
    alone = trained(train(CONFIG, params(), ROWS, settings, frozen=frozen))
    spread = trained(train(CONFIG, placed, ROWS, settings, frozen=frozen, mesh=mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=0), alone, spread)
    assert jax.tree.map(lambda a: a.sharding, spread) == jax.tree.map(lambda a: a.sharding, placed)
    assert float(jnp.abs(alone["layers"]["q"] - params()["layers"]["q"]).max()) > 1e-4


def test_the_optimiser_lies_as_the_parameters(tmp_path):
    mesh = parse_mesh("data:-1,model:2")
    wanted = shardings(CONFIG, mesh)
    placed = jax.device_put(params(), wanted)
    settings = dataclasses.replace(BRISK, batch_size=8)
    tree, fixed, recipe = begin(CONFIG, placed, ROWS, settings, freeze(random_mask()), mesh)
    step = compiled_step(recipe, tree)
    after, _ = step(tree, put_rows(training_batches(ROWS, 8, 1, 0)[0], mesh), fixed)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(tree["params"]))
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, after, {})
    with open_checkpoints(tmp_path) as checkpoints:
        _, restored = restore(checkpoints, outline(after), {})
    for tree in (after, restored):
        (adam, *_), masks = tree["optimizer"]
        for part in (tree["params"], adam.mu, adam.nu):
            assert jax.tree.map(lambda a: a.sharding, part) == wanted
        for path, mask in masks.items():
            assert mask.sharding == flatten(wanted)[path], path


@pytest.mark.slow
def test_the_optimiser_of_adapters_lies_as_they_do():
    mesh = parse_mesh("data:-1,model:2")
    placed = jax.device_put(params(), shardings(CONFIG, mesh))
    settings = dataclasses.replace(BRISK, batch_size=8, lora=LoRA(4, 8.0, ("q", "down")))
    tree, fixed, recipe = begin(CONFIG, placed, ROWS, settings, FREE, mesh)
    wanted = jax.tree.map(lambda a: a.sharding, init(CONFIG, settings.lora, 0, mesh))
    after, _ = compiled_step(recipe, tree)(tree, put_rows(training_batches(ROWS, 8, 1, 0)[0], mesh), fixed)
    adam, *_ = after["optimizer"]
    for part in (after["params"], adam.mu, adam.nu):
        assert jax.tree.map(lambda a: a.sharding, part) == wanted


def float32_weights(settings):
    """The weights of the axes of which, those of all layers or of one in any order, a step makes a float32 array."""
    config = tiny_config(layers=2, dtype="bfloat16")
    tree, fixed, recipe = begin(config, tiny_params(config), ROWS, settings, FREE, None)
    batch = pad_rows(ROWS[:6], length=20)  # no activation is as long as a weight
    # As it is traced: the compiler for CPUs, which multiply bfloat16 in float32, makes such copies by itself.
    text = compiled_step(recipe, tree).lower(tree, batch, fixed).as_text()
    made = {axes(map(int, dims.split("x")[:-1])) for dims in re.findall(r"tensor<((?:\d+x)+)f32>", text)}
    found = set()
    for path, leaf in flatten(tiny_params(config)).items():
        one = leaf.shape[1:] if path.startswith("layers/") else leaf.shape
        if len(one) > 1 and made & {axes(leaf.shape), axes(one), axes((one[0], math.prod(one[1:])))}:
            found.add(path)
    return found


def axes(shape):
    """The axes of an array that are longer than 1, in one order."""
    return tuple(sorted(n for n in shape if n > 1))


@pytest.mark.parametrize(("dropout", "change"), [(0.0, {}), (0.1, {"accumulation": 2, "remat": True})])
def test_a_step_of_adapters_has_no_weight_in_float32(dropout, change):
    settings = dataclasses.replace(BRISK, lora=LoRA(3, 8.0, dropout=dropout), **change)
    assert float32_weights(settings) == set()


def test_a_step_of_the_weights_has_all_of_them_in_float32():
    assert len(float32_weights(BRISK)) == len(linear_maps(CONFIG)) + 2


# Learning rates and refusals


def test_learning_rates_by_step():
    def rates(**change):
        rate = learning_rates(FineTuning(steps=10, learning_rate=8.0, **change))
        return [float(rate(i)) for i in (0, 1, 2, 6, 10)]

    assert rates() == [8, 8, 8, 8, 8]
    np.testing.assert_allclose(rates(warmup=2), [0, 4, 8, 8, 8])
    np.testing.assert_allclose(rates(schedule="linear", warmup=2), [0, 4, 8, 4, 0])
    # Epochs of three steps: torch's StepLR, stepped at the end of each.
    np.testing.assert_allclose(rates(schedule="stepped", decay=0.5, decay_every=3), [8, 8, 8, 2, 1])
    np.testing.assert_allclose(rates(schedule="cosine", warmup=2), [0, 4, 8, 4, 0], atol=1e-6)
    np.testing.assert_allclose(rates(schedule="cosine")[3], 4 * (1 + np.cos(0.6 * np.pi)), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "steps 0"),
        ({"batch_size": 6, "accumulation": 4}, "batch_size 6 .* accumulation 4"),
        ({"schedule": "step"}, "'step' .*constant, linear, cosine"),
        ({"warmup": 10, "steps": 10}, "warmup 10 .* 10 steps"),
        ({"checkpoint_every": 0}, "checkpoint_every 0"),
        ({"decay_every": 0}, "decay_every 0"),
        ({"decay": 0.0}, "decay 0.0"),
    ],
)
def test_settings_that_make_no_run_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        FineTuning(**change)


def test_rows_that_cannot_be_trained_on_are_refused():
    with pytest.raises(ValueError, match="none of the 2 rows has an answer"):
        trained(train(CONFIG, params(), random_rows([5, 6]), BRISK))
    with pytest.raises(ValueError, match="row 1 has 161 tokens; the model's context is 160"):
        trained(train(CONFIG, params(), random_rows([5, 161], behind=[2, 2]), BRISK))
    with pytest.raises(ValueError, match="parts of 2 rows do not divide over 4 devices"):
        settings = dataclasses.replace(BRISK, accumulation=2)
        trained(train(CONFIG, params(), ROWS, settings, mesh=parse_mesh("data:-1,model:2")))


# Runs that are killed


def killable_run(folder, rows=ROWS, settings=KILLED, seed=0):
    return train(CONFIG, params(), rows, settings, freeze(random_mask(seed)), folder=folder)


@functools.cache
def uninterrupted():
    return trained(killable_run(None))


def test_a_run_may_write_no_checkpoint_unless_it_is_interrupted(tmp_path):
    settings = dataclasses.replace(KILLED, steps=4, checkpoint_every=5, checkpoint_end=False)
    wanted = trained(killable_run(tmp_path / "whole", settings=settings))
    with open_checkpoints(tmp_path / "whole") as checkpoints:
        assert checkpoints.latest is None
    with contextlib.closing(killable_run(tmp_path / "left", settings=settings)) as steps:
        for step in steps:
            if step.number == settings.steps:
                break
    (last,) = killable_run(tmp_path / "left", settings=settings)
    assert last.number == settings.steps and last.begins
    assert_same_bits(last.weights(), wanted)


def kill(folder, number, at):
    """Starts the run in another process, and sends it the signal `number` a moment after its step `at`."""
    root = pathlib.Path(__file__).parents[2]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests/support")]),
        "JAX_PLATFORMS": "cpu",
    }
    worker = subprocess.Popen(
        [sys.executable, __file__, str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        first = None
        for line in worker.stdout:
            first = int(line) if first is None else first
            if int(line) == at:
                time.sleep(random.random() * 0.1)  # within the next two steps
                worker.send_signal(number)
                break
        _, errors = worker.communicate(timeout=60)
    finally:
        worker.kill()
    assert worker.returncode == (-9 if number == signal.SIGKILL else 128 + number), errors
    return first


def test_a_run_that_is_interrupted_saves_where_it_stands(tmp_path):
    """At any moment: in the midst of a step, while somebody works with a step, and when it is closed."""
    numbers = []
    with pytest.raises(KeyboardInterrupt):
        for step in killable_run(tmp_path):
            numbers.append(step.number)
            if step.number == 3:
                signal.raise_signal(signal.SIGINT)
    assert numbers == [0, 1, 2, 3] and latest(tmp_path) == 3
    steps = killable_run(tmp_path)
    assert [next(steps).number for _ in range(3)] == [3, 4, 5]
    steps.close()
    assert latest(tmp_path) == 5
    timer = threading.Timer(0.0, signal.raise_signal, [signal.SIGTERM])
    with pytest.raises(SystemExit, match="143"):
        for step in killable_run(tmp_path):
            timer.start() if step.number == 6 else None
    assert 6 <= latest(tmp_path) <= 16
    assert_same_bits(trained(killable_run(tmp_path)), uninterrupted())


def latest(folder):
    with open_checkpoints(folder) as checkpoints:
        return checkpoints.latest.step


@pytest.mark.slow
def test_a_run_that_is_killed_ends_with_the_same_bits(tmp_path):
    once, asked = random.randint(5, 7), random.randint(9, 11)
    assert kill(tmp_path, signal.SIGKILL, once) == 0
    # Asked to end, it saves where it stands.
    assert kill(tmp_path, signal.SIGTERM, asked) in (2, 4, 6, 8), (once, asked)
    with open_checkpoints(tmp_path) as checkpoints:
        stood = checkpoints.latest.step
    assert stood >= asked
    numbers = []
    assert_same_bits(trained(numbers.append(step.number) or step for step in killable_run(tmp_path)), uninterrupted())
    assert numbers == list(range(stood, 17)), (once, asked)
    # A run that is done is read, not run.
    (end,) = killable_run(tmp_path)
    assert (end.number, end.begins) == (16, True) and 0 < end.loss < 10
    assert_same_bits(end.weights(), uninterrupted())
    for change, word in [
        ({"settings": dataclasses.replace(KILLED, learning_rate=1e-4)}, "learning_rate"),
        ({"rows": ROWS[:-1]}, "rows"),
        ({"seed": 1}, "frozen"),
    ]:
        with pytest.raises(ValueError, match=f"holds a run with {word}"):
            next(killable_run(tmp_path, **change))


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 2])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path, time):
    for first, last in ((0, 3), (6, 7), (10, 11)):
        kill(tmp_path, signal.SIGKILL, random.randint(first, last))
    assert_same_bits(trained(killable_run(tmp_path)), uninterrupted())


def main(folder):
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_default_matmul_precision", "highest")
    quick(True)

    for step in killable_run(folder):
        if not step.begins:
            print(step.number - 1, flush=True)
            time.sleep(0.05)


if __name__ == "__main__":
    main(*sys.argv[1:])
