"""Parquet files that claim more than they hold, or hold more than anybody reads."""

import contextlib
import random
import re
import struct

import pyarrow
import pyarrow.parquet
import pytest

from jaxsafe.prompts import files
from jaxsafe.prompts.files import read_rows

COUNT = 100
ROWS = [{"prompt": f"How do I {verb} it, {i}?", "label": i % 2} for i in range(COUNT // 2) for verb in ("cut", "burn")]
HUGE = (2**31 - 1, 2**31, 3 * 2**30, 2**40, 2**60)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    file = tmp_path_factory.mktemp("parquet") / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    return file.read_bytes()


def number(value: int) -> bytes:
    """`value` as footers write it: zigzag, seven bits a byte."""
    left, out = value << 1, b""
    while left > 127:
        left, out = left >> 7, out + bytes([left & 127 | 128])
    return out + bytes([left])


def with_footer(data: bytes, change) -> bytes:
    """The file `data` with its footer changed."""
    begin = len(data) - 8 - struct.unpack("<I", data[-8:-4])[0]
    footer = change(data[begin:-8])
    return data[:begin] + footer + struct.pack("<I", len(footer)) + b"PAR1"


@contextlib.contextmanager
def most_bytes(limit: int):
    """The memory that pyarrow has taken at most, ever, grows by less than `limit` bytes inside."""
    before = pyarrow.default_memory_pool().max_memory()
    yield
    assert pyarrow.default_memory_pool().max_memory() - before < limit


def test_a_whole_file_is_read(whole, tmp_path):
    (tmp_path / "p.parquet").write_bytes(whole)
    assert read_rows(tmp_path / "p.parquet") == ROWS


@pytest.mark.parametrize("claim", HUGE)
def test_a_footer_of_more_rows_than_the_file_holds(whole, tmp_path, claim):
    file = tmp_path / "p.parquet"
    file.write_bytes(with_footer(whole, lambda footer: footer.replace(number(COUNT), number(claim))))
    with most_bytes(2**20), pytest.raises(ValueError, match=f"{re.escape(str(file))} .* claims {claim} rows; it holds"):
        read_rows(file)


def test_footers_of_huge_numbers_take_no_memory(whole, tmp_path):
    file, read = tmp_path / "p.parquet", set()
    for seed in range(150):
        rng = random.Random(seed)

        def changed(footer, rng=rng):
            at = rng.randrange(len(footer))
            return footer[:at] + number(rng.choice(HUGE)) + footer[at + rng.choice((0, 1, 1, 2)) :]

        file.write_bytes(with_footer(whole, changed))
        with most_bytes(2**20), contextlib.suppress(ValueError, OSError):
            read.add(len(read_rows(file)))
    assert read == {COUNT}


def test_more_rows_or_bytes_than_anybody_reads(tmp_path, monkeypatch):
    file = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["x" * 10_000] * 2000}), file)
    assert file.stat().st_size < 10_000 and len(read_rows(file)) == 2000
    for name, limit in (("LARGEST", 2**20), ("MOST_ROWS", 1023)):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"more than .* split it"):
            patch.setattr(files, name, limit)
            read_rows(file)
