"""Buckets, padding, grouping, and the loop over batches, with NumPy alone and a call that fails on demand."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsafe.progress import silent
from jaxsafe.rows import (
    Batch,
    Row,
    bucket,
    group_by_length,
    in_order,
    pad_rows,
    reported,
    row_bucket,
    run_batches,
)

unhurried = settings(deadline=None)
lengths_of_rows = st.lists(st.integers(1, 140), min_size=1, max_size=40)


def map_batches(call, rows, batch_size, multiple=1, done=silent):
    """The results of all batches, in the order of `rows`."""
    return in_order(reported(run_batches(call, rows, batch_size, multiple), done))


def rows_of(lengths):
    """Row i is i + 1, repeated; distinct rows that any shuffling would show."""
    return [Row((i + 1,) * n, n - 1) for i, n in enumerate(lengths)]


def test_buckets_are_powers_of_two_and_three_quarters_of_them():
    sizes = [8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
    for n in range(513):
        assert bucket(n) == min(size for size in sizes if size >= n), n


def test_rows_stand_at_the_right_of_their_batch():
    batch = pad_rows([Row((5, 6, 7), 2), Row((8, 9, 10, 11), 1)], length=6, count=3, pad=99)
    np.testing.assert_array_equal(
        batch.tokens, [[99, 99, 99, 5, 6, 7], [99, 99, 8, 9, 10, 11], [99, 99, 99, 99, 99, 99]]
    )
    np.testing.assert_array_equal(batch.valid, np.array([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0] * 6], bool))
    np.testing.assert_array_equal(batch.instruction_end, [5, 3, 5])
    np.testing.assert_array_equal(batch.response, np.array([[0] * 6, [0, 0, 0, 0, 1, 1], [0] * 6], bool))
    assert (batch.tokens.dtype, batch.valid.dtype, batch.instruction_end.dtype) == (np.int32, bool, np.int32)


def test_rows_are_padded_to_the_bucket_of_the_longest():
    assert pad_rows(rows_of([3, 34])).tokens.shape == (2, 48)
    assert pad_rows(rows_of([3, 13])).tokens.shape == (2, 32)


@pytest.mark.parametrize("options", [{"length": 3}, {"count": 1}])
def test_rows_that_do_not_fit_are_refused(options):
    with pytest.raises(ValueError, match="2 rows of up to 4 tokens do not fit"):
        pad_rows(rows_of([4, 2]), **options)


@pytest.mark.parametrize(("n", "end"), [(3, 3), (3, -1), (0, 0)])
def test_an_instruction_end_outside_the_row_is_refused(n, end):
    with pytest.raises(ValueError, match=f"instruction_end {end} lies outside the row's {n} tokens"):
        Row((1,) * n, end)


@unhurried
@given(lengths_of_rows, st.integers(1, 9), st.data())
def test_groups_hold_every_row_once_longest_first_and_mix_lengths_below_the_least(lengths, batch_size, data):
    least = data.draw(st.integers(0, batch_size))
    groups = group_by_length(lengths, batch_size, least)
    order = [lengths[i] for group in groups for i in group]
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert order == sorted(order, reverse=True)
    slots = [[bucket(lengths[i]) for i in group] for group in groups]
    for sizes in slots:
        assert len(sizes) <= batch_size
        assert all(size == sizes[0] or (i < least and 2 * size >= sizes[0]) for i, size in enumerate(sizes))
    for one, two in itertools.pairwise(slots):
        full = len(one) == batch_size or (one[0] != two[0] and len(one) >= least)
        assert full or 2 * two[0] < one[0], "the next row had a place here"


def test_batches_of_different_lengths_are_half_full():
    shapes = []

    def call(batch, indices):
        shapes.append(batch.tokens.shape)
        return batch.tokens.max(-1)

    map_batches(call, rows_of([90] + [60] * 3 + [50] * 2 + [20, 5]), 8)
    assert shapes == [(4, 96), (4, 64)]


@unhurried
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 8]))
def test_a_batch_of_rows_is_padded_to_a_power_of_two_times_the_devices(n, batch_size, multiple):
    n = min(n, batch_size)
    count = row_bucket(n, batch_size, multiple)
    assert count >= n and count % multiple == 0
    powers = [multiple * 2**i for i in range(8)]
    most = multiple * -(-batch_size // multiple)
    assert count == min(most, next(size for size in powers if size >= n))


@unhurried
@given(lengths_of_rows, st.integers(1, 9), st.sampled_from([1, 2, 4]))
def test_results_come_in_the_order_of_the_rows_each_row_once(lengths, batch_size, multiple):
    rows, heard, met = rows_of(lengths), [], []

    def call(batch, indices):
        real = batch.valid.any(-1)
        assert batch.tokens.shape[0] == len(indices) == row_bucket(real.sum(), batch_size, multiple)
        np.testing.assert_array_equal(indices >= 0, real)
        met.extend(indices[real].tolist())
        return {"first": batch.tokens.max(-1) * batch.valid.any(-1), "nested": (batch.valid.sum(-1),)}

    out = map_batches(call, rows, batch_size, multiple, heard.append)
    assert sorted(met) == list(range(len(rows)))
    np.testing.assert_array_equal(out["first"], np.arange(len(rows)) + 1)
    np.testing.assert_array_equal(out["nested"][0], lengths)
    assert sum(heard) == len(rows)


def out_of_memory(most):
    """A call that fails above `most` rows a batch as an accelerator would, and the sizes it was tried with."""
    tried: list[int] = []

    def call(batch: Batch, indices: np.ndarray):
        tried.append(len(indices))
        if len(indices) > most:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")
        return batch.tokens.max(-1)

    return call, tried


@unhurried
@given(lengths_of_rows, st.integers(1, 5))
def test_a_batch_that_does_not_fit_memory_is_halved_until_it_does(lengths, most):
    call, tried = out_of_memory(most)
    heard: list[int] = []
    out = map_batches(call, rows_of(lengths), 16, done=heard.append)
    np.testing.assert_array_equal(out, np.arange(len(lengths)) + 1)
    assert sum(heard) == len(lengths)
    # What did not fit once is not tried at that size again.
    failed = [size for size in tried if size > most]
    assert failed == sorted(set(failed), reverse=True)


def test_a_halved_batch_still_divides_over_the_devices():
    call, tried = out_of_memory(4)
    map_batches(call, rows_of([5] * 16), 16, multiple=4)
    assert tried == [16, 8, 4, 4, 4, 4]


def test_one_row_that_does_not_fit_memory_is_an_error():
    call, tried = out_of_memory(0)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        map_batches(call, rows_of([5] * 4), 4)
    assert tried == [4, 2, 1]


def test_another_failure_of_the_device_is_not_tried_again():
    tried = []

    def call(batch, indices):
        tried.append(len(indices))
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        map_batches(call, rows_of([5] * 4), 4)
    assert tried == [4]


def test_no_rows_are_an_error():
    with pytest.raises(ValueError, match="no rows to run"):
        map_batches(lambda batch, indices: batch.tokens, [], 4)
