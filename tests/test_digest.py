"""Equal content has equal digests, and other content others."""

import hashlib
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsafe.digest import arrays_sha256, digest

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


def test_the_digest_is_that_of_the_text():
    text = '["b",{"a":[1,2.5],"z":null}]'
    assert digest("b", {"z": None, "a": (1, 2.5)}) == hashlib.sha256(text.encode()).hexdigest()


@given(st.dictionaries(st.text(), values))
def test_the_order_of_a_mapping_does_not_count(mapping):
    assert digest(mapping) == digest(dict(reversed(mapping.items())))


@given(values, values)
def test_other_content_has_another_digest(a, b):
    assert a == b or digest(a) != digest(b)


@pytest.mark.parametrize(
    ("a", "b"), [(1, 1.0), (1, True), (None, "null"), ([1, 2], [2, 1]), ([], {}), ("é", "e\u0301"), ([[1], 2], [1, 2])]
)
def test_what_looks_alike_is_told_apart(a, b):
    assert digest(a) != digest(b)
    assert digest(a, b) != digest([a, b]) != digest(b, a)


@pytest.mark.parametrize("value", [object(), {1, 2}, np.float32(1), np.arange(2), b"a", math])
def test_what_json_cannot_hold_is_refused(value):
    with pytest.raises(TypeError, match="not JSON serializable"):
        digest({"x": value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest([value])


def test_arrays_are_told_apart_by_type_shape_and_bytes():
    array = np.arange(6, dtype=np.int32)
    wanted = arrays_sha256([array])
    assert arrays_sha256([jnp.asarray(array)]) == wanted
    assert arrays_sha256([np.arange(12, dtype=np.int32)[::2] // 2]) == wanted
    others = [
        [array.reshape(2, 3)],
        [array.reshape(3, 2)],
        [array.view(np.float32)],
        [array[:3], array[3:]],
        [array[::-1]],
        [],
    ]
    assert len({wanted, *map(arrays_sha256, others)}) == 1 + len(others)
    assert arrays_sha256([array.reshape(2, 3)]) == arrays_sha256([np.asfortranarray(array.reshape(2, 3))])
