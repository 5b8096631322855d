"""Checkpoints: what is read back is what stood there at the step, bit for bit, on any devices."""

import pathlib
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxsafe.io.checkpoint import checksum, open_checkpoints, outline, restore, save, stoppable
from jaxsafe.parallel import parse_mesh

RUN = {"seed": 3, "rows": "abc", "lora": None, "maps": ["q", "v"]}


def sample(seed=0):
    """Parameters of two dtypes with the state of an optimiser and a mask."""
    rng = np.random.default_rng(seed)
    params = {
        "embed": jnp.asarray(rng.standard_normal((16, 8)), jnp.float32),
        "layers": {"q": jnp.asarray(rng.standard_normal((2, 8, 4)), jnp.bfloat16)},
    }
    state = optax.chain(optax.adamw(1e-3), optax.identity()).init(params)
    return {"params": params, "optimizer": state, "mask": jnp.asarray(rng.random((16, 8)) < 0.5)}


def assert_same(ours, wanted):
    assert jax.tree.structure(ours) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_tree_comes_back_from_the_latest_step(tmp_path):
    trees = {step: sample(step) for step in (2, 4, 6)}
    with open_checkpoints(tmp_path / "run", keep=2) as checkpoints:
        assert restore(checkpoints, outline(trees[2]), RUN) is None
        for step, tree in trees.items():
            save(checkpoints, step, tree, RUN)
    assert {entry.name for entry in (tmp_path / "run").iterdir() if entry.name.isdigit()} == {"4", "6"}
    with open_checkpoints(tmp_path / "run") as checkpoints:
        step, tree = restore(checkpoints, outline(trees[6]), RUN)
    assert step == 6
    assert_same(tree, trees[6])


def test_what_is_saved_is_the_tree_of_the_step_though_its_buffers_are_given_away(tmp_path):
    negate = jax.jit(lambda tree: jax.tree.map(lambda a: -a, tree), donate_argnums=0)
    tree = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((400, 500)), jnp.float32)}
    wanted = np.array(tree["w"])
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, tree, RUN)
        for _ in range(5):
            tree = negate(tree)
    with open_checkpoints(tmp_path) as checkpoints:
        _, found = restore(checkpoints, outline(tree), RUN)
    np.testing.assert_array_equal(found["w"], wanted)


def test_a_sharded_tree_is_read_to_another_mesh(tmp_path):
    tree = sample()

    def place(mesh, spec):
        return jax.device_put(tree["params"]["embed"], NamedSharding(parse_mesh(mesh), PartitionSpec(*spec)))

    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, {"w": place("data:-1,model:2", ("data", "model"))}, RUN)
    like = {"w": place("data:2,model:4", ("model", "data"))}
    with open_checkpoints(tmp_path) as checkpoints:
        _, found = restore(checkpoints, outline(like), RUN)
    np.testing.assert_array_equal(found["w"], tree["params"]["embed"])
    assert found["w"].sharding == like["w"].sharding


def test_a_half_written_step_is_not_seen_and_removed(tmp_path):
    tree = sample()
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 3, tree, RUN)
    names = {entry.name for entry in tmp_path.iterdir()}
    half = tmp_path / "5.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "state").mkdir()
    with open_checkpoints(tmp_path) as checkpoints:
        step, found = restore(checkpoints, outline(tree), RUN)
    assert step == 3
    assert_same(found, tree)
    assert {entry.name for entry in tmp_path.iterdir()} == names


@pytest.mark.parametrize(("name", "value"), [("seed", 4), ("maps", ["q"]), ("lora", {"rank": 2})])
def test_the_checkpoint_of_another_run_is_refused(tmp_path, name, value):
    tree = sample()
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, tree, RUN)
        checkpoints.wait()
        with pytest.raises(ValueError) as error:
            restore(checkpoints, outline(tree), RUN | {name: value})
    assert all(word in str(error.value) for word in (str(tmp_path), name, repr(value), repr(RUN[name])))


def test_a_checksum_follows_from_bits_and_places_and_not_from_devices():
    tree = sample()
    whole = checksum(tree)
    assert len(whole) == len(jax.tree.leaves(tree)) and all(0 <= n < 2**32 for n in whole)
    mesh = NamedSharding(parse_mesh("data:-1,model:2"), PartitionSpec("data", "model"))
    w = tree["params"]["embed"]
    assert checksum(jax.device_put(w, mesh)) == checksum(w)
    assert checksum(w.at[3, 2].multiply(1 + 2e-7)) != checksum(w)
    assert checksum(w.at[3, 2].set(w[2, 3]).at[2, 3].set(w[3, 2])) != checksum(w)
    mask = tree["mask"]
    assert checksum(mask) != checksum(~mask) != checksum(mask[::-1])
    assert checksum(jnp.float32([0.0])) != checksum(jnp.float32([-0.0]))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_what_must_be_whole_and_is_then_handed_on(number):
    heard = []
    before = signal.signal(number, lambda number, frame: heard.append(number))
    try:
        with stoppable() as whole:
            with pytest.raises(SystemExit) as end, whole():
                signal.raise_signal(number)
                assert not heard
            assert heard == [number] and end.value.code == 128 + number
            with pytest.raises(SystemExit):
                signal.raise_signal(number)
            with whole():
                pass
        assert heard == [number] * 2
        signal.raise_signal(number)
        assert heard == [number] * 3
    finally:
        signal.signal(number, before)


def test_a_listener_that_raises_is_what_ends_the_run():
    with pytest.raises(KeyboardInterrupt), stoppable() as whole, whole():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_beside_the_main_thread_nothing_waits():
    found = []

    def listen():
        with stoppable() as whole, whole():
            found.append(True)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [True]


def test_a_relative_folder_will_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open_checkpoints("here") as checkpoints:
        save(checkpoints, 1, {"w": jnp.ones(3)}, RUN)
    assert (pathlib.Path(tmp_path) / "here" / "1").is_dir()
