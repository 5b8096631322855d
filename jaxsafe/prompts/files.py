"""Files of prompts: how any of them is read as rows of named columns."""

import csv
import functools
import io
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxsafe.reading import reading

Row = Mapping[str, Any]
"""One line of a file: column name -> cell."""

LINE_END = re.compile(r"\r\n|\r|\n")
"""Not what str.splitlines takes for one: JSON strings may hold U+2028 and its like unescaped."""
MOST_ROWS, LARGEST = 2**22, 2**30
"""Rows and bytes of a Parquet file as it is read: a few bytes of one may stand for any number of them."""
NAME_WORDS = 3
"""A file of one column whose first line has more words than this has no header: no column is called so."""


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV, TSV, JSON, JSONL, Parquet or text file (one row a line, column `text`), told by its suffix.

    A CSV file of one column may have no header; its column is `text`, too. JSON may be rows, columns, or an object
    around rows. Raises FileNotFoundError, and ValueError for another suffix, text that is not UTF-8, malformed
    content, two columns of one name, or no rows.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise ValueError(f"{path}: unknown suffix {path.suffix!r}; need one of {', '.join(_READERS)}")
    with reading(path, f"cannot be read as {path.suffix[1:].upper()}"):
        state = path.stat()
        # Within a tick of the clock, another content of the same size would have the same time.
        fresh = time.time_ns() - state.st_mtime_ns < 2_000_000_000
        rows = read(path) if fresh else _rows(read, path.resolve(), state.st_mtime_ns, state.st_size)
    if not rows:
        raise ValueError(f"{path}: holds no prompts")
    return list(rows)


@functools.lru_cache(maxsize=16)
def _rows(read: Callable[[Path], list[Row]], path: Path, modified: int, size: int) -> list[Row]:
    """What `read` makes of a file in the state that it is in: a run looks at it before it begins, and then uses it."""
    return read(path)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error


def _read_lines(path: Path) -> list[Row]:
    text = _text(path).strip("\r\n")
    return [{"text": line} for line in LINE_END.split(text)] if text else []


def _read_csv(path: Path) -> list[Row]:
    # strict, because a quote left open would otherwise swallow the rest of the file as one prompt.
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        lines = [line for line in reader if line]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    if lines and len(lines[0]) == 1 and len(lines[0][0].split()) > NAME_WORDS:
        lines.insert(0, ["text"])
    header, *rows = lines or [[]]
    _check_columns(header)
    for i, row in enumerate(rows, 1):
        if len(row) > len(header):  # an unquoted separator would cut the prompt short
            raise ValueError(f"{path}, row {i}: more cells than the {len(header)} columns of the header")
    return [dict(zip(header, row + [None] * (len(header) - len(row)), strict=True)) for row in rows]


def _check_columns(names: list[str]) -> None:
    """Raises ValueError for two columns of one name; of an index without any, nobody asks."""
    seen = set[str]()
    for name in names:
        if name.strip() and name in seen:
            raise ValueError(f"two columns {name!r}; rename one of them")
        seen.add(name)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _check_columns([name for name, _ in pairs])
    return dict(pairs)


def _parse(path: Path, text: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {first_line + error.lineno - 1}: not JSON ({error.msg})") from error


def _objects(path: Path, items: list[Any]) -> list[Row]:
    for i, item in enumerate(items, 1):
        if not isinstance(item, str | dict):
            raise ValueError(f"{path}, row {i}: {type(item).__name__} where an object or a string is needed")
    return [{"text": item} if isinstance(item, str) else item for item in items]


def _read_json(path: Path) -> list[Row]:
    content = _parse(path, _text(path))
    rows = _of_columns(content) if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise ValueError(
            f"{path}: holds {type(content).__name__}; need a list of objects or of strings, or one list for each column"
        )
    return _objects(path, rows)


def _of_columns(content: dict[str, Any]) -> list[Any] | None:
    """The rows of an object of columns (lists, or objects by row, as pandas writes them), or of one around rows."""
    lists = {name: list(v.values()) if isinstance(v, dict) else v for name, v in content.items()}
    lists = {name: v for name, v in lists.items() if isinstance(v, list)}
    inside = next(iter(lists.values()), [])
    if len(lists) == 1 and inside and all(isinstance(row, dict) and "role" not in row for row in inside):
        return inside
    if lists.keys() == content.keys() and len({len(cells) for cells in lists.values()}) == 1:
        return [dict(zip(lists, cells, strict=True)) for cells in zip(*lists.values(), strict=True)]
    return None


def _read_jsonl(path: Path) -> list[Row]:
    lines = enumerate(LINE_END.split(_text(path)), 1)
    return _objects(path, [_parse(path, line, i) for i, line in lines if line.strip()])


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Nothing in a footer is longer than the file that holds it.
        limits = dict.fromkeys(("thrift_string_size_limit", "thrift_container_size_limit"), path.stat().st_size)
        with pyarrow.parquet.ParquetFile(path, **limits) as file:
            _check_columns(file.schema_arrow.names)
            return _parquet_rows(file)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not Parquet ({str(error).splitlines()[0]})") from error


def _parquet_rows(file: Any) -> list[Row]:
    """The rows of an open Parquet file, a few at a time: memory is taken for what it holds, not for what it claims."""
    rows, size = list[Row](), 0
    for batch in file.iter_batches(batch_size=1024):
        size += batch.nbytes
        if size > LARGEST or len(rows) > MOST_ROWS:
            raise ValueError(f"it holds more than {MOST_ROWS} rows or {LARGEST >> 20} MiB; split it")
        rows += batch.to_pylist()
    if len(rows) != file.metadata.num_rows:
        raise ValueError(f"its footer claims {file.metadata.num_rows} rows; it holds {len(rows)}")
    return rows


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_lines,
}
