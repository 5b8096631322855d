"""What is finished is not made again, and nothing is seen by halves."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import bytes_mutated
from safetensors import SafetensorError

from jaxsafe.io.store import JSON, TREE, Log, Store, by_batch

VALUES = [None, {"a": [1, 2.5, "ü\u2028", True, None]}, "text", [], 3]


def tree():
    rng = np.random.default_rng(0)
    return {
        "layers": {"q": jnp.asarray(rng.standard_normal((3, 4)), jnp.bfloat16), "on": np.array([True, False])},
        "norm": np.asfortranarray(rng.standard_normal((4, 5)).astype(np.float32)),
        "count": np.int32(7),
        "turned": np.arange(6, dtype=np.int32).reshape(2, 3).T,
    }


class Maker:
    """Gives `value`, and counts how often it is asked."""

    def __init__(self, value):
        self.value, self.calls = value, 0

    def __call__(self):
        self.calls += 1
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_piece_is_made_once(tmp_path, value):
    store, make = Store(tmp_path / "store"), Maker(value)
    assert not store.has("piece", [1])
    assert store.once("piece", [1], make) == store.once("piece", [1], make) == value
    assert make.calls == 1 and store.has("piece", [1]) and store.read("piece", [1]) == value
    # Another store in the same folder: a run after this one.
    assert Store(tmp_path / "store").once("piece", [1], Maker(AssertionError("made again"))) == value


def test_what_a_file_holds_is_returned_from_the_first_time_on(tmp_path):
    store = Store(tmp_path)
    first = store.once("piece", None, lambda: {1: (2, 3), "x": math.pi})
    assert first == {"1": [2, 3], "x": math.pi} == store.once("piece", None, Maker(None))


def test_arrays_keep_types_shapes_and_bits(tmp_path):
    store, make = Store(tmp_path), Maker(tree())
    for _ in range(2):
        found = store.once("vectors", {"n": 1}, make, TREE)
        assert jax.tree.structure(found) == jax.tree.structure(tree())
        for ours, wanted in zip(jax.tree.leaves(found), map(np.asarray, jax.tree.leaves(tree())), strict=True):
            assert (ours.dtype, ours.shape) == (wanted.dtype, wanted.shape)
            np.testing.assert_array_equal(np.asarray(ours), wanted)
    assert make.calls == 1


def test_pieces_are_told_apart_by_name_follows_and_kind(tmp_path):
    store = Store(tmp_path)
    follows = [None, 1, 1.0, "1", [1], {"a": 1}, {"a": 2}, [1, None]]
    for i, each in enumerate(follows):
        assert store.once("piece", each, lambda i=i: i) == i
    assert store.once("other", 1, lambda: "other") == "other"
    store.write("piece", 1, {"a": np.ones(2, np.float32)}, TREE)
    assert [store.read("piece", each) for each in follows] == list(range(len(follows)))
    assert store.read("piece", 1, TREE)["a"].tolist() == [1, 1]
    assert store.read("piece", {"a": 1}) == 5
    assert len(list(tmp_path.iterdir())) == len(follows) + 2
    store.drop("piece", 1)
    assert not store.has("piece", 1) and store.has("piece", 1, TREE) and store.has("piece", 1.0)
    store.drop("piece", 1)


def test_equal_follows_are_one_piece(tmp_path):
    store = Store(tmp_path)
    store.write("piece", {"a": (1, 2), "b": 3}, "kept")
    assert store.once("piece", {"b": 3, "a": [1, 2]}, Maker(AssertionError())) == "kept"


def test_a_name_stands_in_the_file(tmp_path):
    store = Store(tmp_path)
    store.write("piece", 1, 2)
    (file,) = tmp_path.iterdir()
    assert file == store.path("piece", 1, ".json") and file.name.startswith("piece-") and file.suffix == ".json"


@pytest.mark.parametrize(("codec", "value"), [(JSON, {"a": object()}), (TREE, {"a": np.array([object()])})])
def test_a_piece_that_cannot_be_written_leaves_nothing(tmp_path, codec, value):
    store = Store(tmp_path)
    with pytest.raises((TypeError, SafetensorError)):
        store.once("piece", 1, lambda: value, codec)
    assert not store.has("piece", 1, codec) and not list(tmp_path.iterdir())


def test_a_piece_whose_making_fails_is_made_the_next_time(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(RuntimeError, match="killed"):
        store.once("piece", 1, Maker(RuntimeError("killed")))
    assert not store.has("piece", 1)
    assert store.once("piece", 1, lambda: 5) == 5


def test_a_piece_is_not_seen_while_it_is_written(tmp_path, monkeypatch):
    store, seen = Store(tmp_path), []
    store.write("piece", 1, "old")

    def save(arrays, path):
        path.write_bytes(b"half")
        seen.append((store.has("piece", 2, TREE), store.read("piece", 1)))
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxsafe.io.store.save_file", save)
    with pytest.raises(KeyboardInterrupt):
        store.write("piece", 2, {"a": np.ones(2)}, TREE)
    assert seen == [(False, "old")]
    assert [file.name for file in tmp_path.iterdir()] == [store.path("piece", 1, ".json").name]


def test_torn_and_missing_files_are_named(tmp_path):
    store = Store(tmp_path)
    for codec in (JSON, TREE):
        with pytest.raises(FileNotFoundError):
            store.read("piece", 1, codec)
        store.write("piece", 1, {"a": np.ones(200, np.float32)} if codec is TREE else {"a": [1] * 200}, codec)
        path = store.path("piece", 1, codec.suffix)
        path.write_bytes(path.read_bytes()[:-20])
        said = "not a whole safetensors file" if codec is TREE else "not JSON"
        with pytest.raises(ValueError, match=f"is {said}; remove it to make it anew") as error:
            store.read("piece", 1, codec)
        assert str(path) in str(error.value)


def test_what_cannot_be_told_apart_is_refused(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        Store(tmp_path).once("piece", [object()], Maker(1))


ENTRIES = [[0, 1, ["a", None, False]], {"text": "ü\ud800\n"}, [], ["b", 1.5]]


def test_a_log_is_read_as_it_was_added(tmp_path):
    store = Store(tmp_path / "store")
    log = store.log("answers", [1])
    assert log.entries() == []
    log.add(*ENTRIES[:2])
    log.add()
    log.add(*ENTRIES[2:])
    assert log.entries() == store.log("answers", [1]).entries() == ENTRIES
    assert store.log("answers", [2]).entries() == []
    store.drop("answers", [1], ".jsonl")
    assert log.entries() == []


@settings(deadline=None, max_examples=60)
@given(cut=st.integers(0, 80), added=st.booleans())
def test_a_log_cut_anywhere_goes_on(tmp_path_factory, cut, added):
    whole = Log(tmp_path_factory.mktemp("whole") / "log.jsonl")
    whole.add(*ENTRIES)
    content = whole.path.read_bytes()
    torn = Log(tmp_path_factory.mktemp("torn") / "log.jsonl")
    torn.path.write_bytes(content[:cut])
    lines = content[:cut].decode().split("\n")
    kept = ENTRIES[: len(lines) - 1]
    # A whole entry without its end of line counts or does not; what is cut short never does.
    last = [ENTRIES[len(kept)]] if lines[-1] and lines[-1] == content.decode().split("\n")[len(kept)] else []
    found = torn.entries()
    assert found in (kept, kept + last)
    if added:
        torn.add(["new"])
        assert torn.entries() == [*found, ["new"]]
    assert torn.entries()[: len(found)] == found


@pytest.mark.parametrize("seed", range(60))
def test_a_log_that_changed_is_refused_or_the_same(tmp_path, seed):
    log = Log(tmp_path / "log.jsonl")
    log.add(*ENTRIES)
    log.path.write_bytes(bytes_mutated(log.path.read_bytes(), seed))
    try:
        found = log.entries()
    except ValueError as error:
        assert str(log.path) in str(error) and "remove it to make it anew" in str(error)
    else:
        # A line that is there twice is what it was; a lost end is that of a killed run.
        assert all(entry in ENTRIES for entry in found)


def test_values_made_by_batch_go_on_from_the_log(tmp_path):
    log, made = Log(tmp_path / "log.jsonl"), []

    def make(left):
        for i in range(0, len(left), 2):
            made.append(left[i : i + 2])
            yield left[i : i + 2], [{"square": n * n} for n in left[i : i + 2]]

    def stopped(n):
        if len(made) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        by_batch(7, make, log, stopped)
    assert made == [[0, 1], [2, 3]]
    heard = []
    assert by_batch(7, make, log, heard.append) == [{"square": n * n} for n in range(7)]
    assert made[2:] == [[4, 5], [6]] and heard == [4, 2, 1]
    assert by_batch(7, make, log) == by_batch(7, make) == [{"square": n * n} for n in range(7)]
    assert len(made) == 4 + 4
