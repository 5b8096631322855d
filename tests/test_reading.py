"""Errors in reading files: one line that names the file, whoever raised it."""

import json

import pytest

from jaxsafe.reading import reading


class PanicException(BaseException):
    """As Rust's panics come to Python: no Exception."""


ERRORS = [
    KeyError("x"),
    TypeError("unhashable"),
    RecursionError("deep"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    json.JSONDecodeError("Expecting\nvalue", "", 0),
    OSError(5, "Input/output error"),
    ValueError(""),
    PanicException("index out of bounds"),
    type("ArrowMemoryError", (MemoryError,), {})("malloc of size 2199023255552 failed"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_is_raised_names_the_file_in_one_line(error):
    with (
        pytest.raises(ValueError, match=r"^dir/mine\.csv cannot be read as CSV: .+") as found,
        reading("dir/mine.csv", "cannot be read as CSV"),
    ):
        raise error
    assert "\n" not in str(found.value) and found.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "no such file", "mine.csv"),
        MemoryError(),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_names_the_file_or_is_not_of_the_file_stays(error):
    with pytest.raises(type(error)) as found, reading("mine.csv"):
        raise error
    assert found.value is error


def test_what_is_read_stays():
    with reading("mine.csv"):
        value = 3
    assert value == 3


def test_a_line_that_names_the_file_is_not_said_twice():
    with pytest.raises(ValueError, match=r"^mine\.csv, row 3: blank$"), reading("mine.csv"):
        raise ValueError("mine.csv, row 3: blank")
