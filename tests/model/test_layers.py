"""Ranges of layers against loops."""

import dataclasses

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsafe.model.layers import LayerRange

ranges = st.tuples(st.integers(0, 12), st.integers(1, 12)).map(lambda ends: LayerRange(ends[0], sum(ends)))


@pytest.mark.parametrize(("ends", "text"), [((10, 20), "10 to 19"), ((0, 2), "0 to 1"), ((3, 4), "3"), ((0, 1), "0")])
def test_both_ends_are_printed(ends, text):
    assert str(LayerRange(*ends)) == f"{LayerRange(*ends)}" == text


@given(ranges, st.integers(0, 6))
def test_a_mask_is_true_in_the_range_alone(layers, more):
    count = layers.stop + more
    mask = layers.mask(count)
    assert mask.dtype == bool and mask.tolist() == [layers.first <= i < layers.stop for i in range(count)]
    assert len(layers) == mask.sum()
    np.testing.assert_array_equal(np.arange(count)[layers.slice], np.flatnonzero(mask))
    assert layers.within(count) is layers


def test_a_range_beyond_the_model_is_refused():
    message = "layers 2 to 3 are no range of this model, which has layers 0 to 2"
    for use in (LayerRange(2, 4).within, LayerRange(2, 4).mask):
        with pytest.raises(ValueError, match=message):
            use(3)


@pytest.mark.parametrize("ends", [(3, 3), (4, 2), (-1, 2), (0, 0)])
def test_an_empty_and_a_negative_range_are_refused(ends):
    message = rf"layers {ends[0]} to {ends[1]} \(exclusive\) are no range; need 0 <= first < stop"
    for make in (lambda: LayerRange(*ends), lambda: LayerRange.parse(ends)):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("value", [(1, 3), [1, 3], np.array([1, 3]), (np.int32(1), np.int64(3))])
def test_two_numbers_are_a_range(value):
    layers = LayerRange.parse(value)
    assert layers == LayerRange(1, 3) and type(layers.first) is type(layers.stop) is int


@pytest.mark.parametrize("value", [5, "13", "1-3", (1,), (1, 2, 3), (), None, (1.5, 3), (1, "3"), (None, 3)])
def test_anything_else_is_refused(value):
    with pytest.raises(ValueError, match=r"config.steer must be two layer numbers, first and stop .*; got ") as error:
        LayerRange.parse(value, "config.steer")
    assert repr(value) in str(error.value) and "\n" not in str(error.value)


def test_ranges_are_sorted_and_kept_in_json():
    some = [LayerRange(2, 5), LayerRange(0, 9), LayerRange(2, 3)]
    assert sorted(some) == [some[1], some[2], some[0]]
    assert msgspec.convert(msgspec.to_builtins(some), list[LayerRange]) == some
    with pytest.raises(dataclasses.FrozenInstanceError):
        some[0].first = 1
