"""Files of prompts: how any of them is read, which published ones are known by name, and where those lie."""

import csv
import functools
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
"""One line of a file: column name -> cell."""

Label = Callable[[Row], bool | None]
"""row -> True (harmful), False (safe) or None (no label); ValueError where the row lacks what it looks at."""


@dataclass(frozen=True)
class KnownFile:
    """One published file of a prompt set.

    split: its name within the set; names: the file names it is published under; hub: its path in the set's
    hub repository, None where it is not there; label: the label of its rows.
    """

    split: str
    names: tuple[str, ...]
    hub: str | None
    label: Label


@dataclass(frozen=True)
class KnownSet:
    """A published prompt set.

    columns, kinds: columns that may hold the prompt and its category, first choice first; hub: data-set
    repository on the Hugging Face hub; files: its files, the split of the first being the default;
    joined: whether the default is all files together instead; context: column of a text to put before the prompt;
    marks: columns, in lower case, one of which tells a published file from another of its name.
    """

    name: str
    columns: tuple[str, ...]
    kinds: tuple[str, ...]
    hub: str | None
    files: tuple[KnownFile, ...]
    joined: bool = False
    context: str | None = None
    marks: tuple[str, ...] = ()


def has_columns(known: KnownSet, rows: Sequence[Row]) -> bool:
    """Whether `rows` are those of a file of `known` by their columns; a file with labels of its own is none."""
    seen = {column.lower() for row in rows for column in row}
    if len({file.label for file in known.files}) > 1 or not seen & {column.lower() for column in known.columns}:
        return False
    return bool(seen & set(known.marks)) if known.marks else "label" not in seen


def _harmful(row: Row) -> bool | None:
    return True


def _safe(row: Row) -> bool | None:
    return False


def _xstest(row: Row) -> bool | None:
    # Older layouts have no label column and mark the unsafe half in the prompt type.
    if word := str(row.get("label") or "").strip().lower():
        if word not in ("safe", "unsafe"):
            raise ValueError(f"XSTest labels are safe and unsafe, not {word!r}")
        return word == "unsafe"
    if row.get("type"):
        return "contrast_" in str(row["type"])
    raise ValueError("XSTest rows need a label or a type")


def _phtest(row: Row) -> bool | None:
    # Controversial prompts are those its authors would not call harmless or harmful: no label.
    if not row.get("Harmfulness"):
        raise ValueError("PHTest rows need a Harmfulness")
    return False if str(row["Harmfulness"]).strip().lower() == "harmless" else None


_TRAIN = "data/train-00000-of-00001.parquet"
_TRUTHFUL = "generation/validation-00000-of-00001.parquet"
_DIRECT = "DirectRequest/{}-00000-of-00001.parquet"

KNOWN = (
    KnownSet(  # arXiv 2308.01263
        "xstest",
        ("prompt",),
        ("type",),
        "Paul/XSTest",
        (KnownFile("all", ("xstest_prompts.csv", "xstest_v2_prompts.csv"), "xstest_prompts.csv", _xstest),),
        marks=("type",),
    ),
    KnownSet(  # arXiv 2401.17633
        "oktest",
        ("prompt",),
        (),
        None,
        (
            KnownFile("test", ("OKTest.csv",), None, _safe),
            KnownFile("heldout", ("OKTest_heldout.csv",), None, _safe),
        ),
    ),
    KnownSet(  # arXiv 2307.15043
        "advbench",
        ("goal", "prompt"),
        (),
        "walledai/AdvBench",
        (KnownFile("all", ("advbench.csv", "AdvBench.csv", "harmful_behaviors.csv"), _TRAIN, _harmful),),
    ),
    KnownSet(  # arXiv 2310.06987
        "malicious_instruct",
        ("prompt", "text"),
        (),
        "walledai/MaliciousInstruct",
        (KnownFile("all", ("MaliciousInstruct.txt",), _TRAIN, _harmful),),
    ),
    KnownSet(  # arXiv 2109.07958
        "truthfulqa",
        ("Question",),
        ("Category",),
        "truthfulqa/truthful_qa",
        (KnownFile("all", ("TruthfulQA.csv", "TruthfulQA_v0.csv"), _TRUTHFUL, _safe),),
    ),
    KnownSet(  # arXiv 2402.04249
        "harmbench",
        ("Behavior", "prompt"),
        ("SemanticCategory", "category"),
        "swiss-ai/harmbench",
        (
            KnownFile("all", ("harmbench_behaviors_text_all.csv",), "metadata.csv", _harmful),
            KnownFile("val", ("harmbench_behaviors_text_val.csv",), _DIRECT.format("val"), _harmful),
            KnownFile("test", ("harmbench_behaviors_text_test.csv",), _DIRECT.format("test"), _harmful),
        ),
        context="ContextString",
    ),
    KnownSet(  # arXiv 2404.01318
        "jailbreakbench",
        ("Goal",),
        ("Category",),
        "JailbreakBench/JBB-Behaviors",
        (
            KnownFile("harmful", ("harmful-behaviors.csv",), "data/harmful-behaviors.csv", _harmful),
            KnownFile("benign", ("benign-behaviors.csv",), "data/benign-behaviors.csv", _safe),
        ),
        joined=True,
    ),
    KnownSet(  # arXiv 2405.20947
        "or_bench",
        ("prompt",),
        ("category",),
        "bench-llm/or-bench",
        (
            KnownFile("hard-1k", ("or-bench-hard-1k.csv",), "or-bench-hard-1k.csv", _safe),
            KnownFile("80k", ("or-bench-80k.csv",), "or-bench-80k.csv", _safe),
            KnownFile("toxic", ("or-bench-toxic.csv",), "or-bench-toxic.csv", _harmful),
        ),
    ),
    KnownSet(  # arXiv 2409.00598
        "phtest",
        ("Request",),
        ("Harmfulness",),
        "furonghuang-lab/PHTest",
        (KnownFile("all", ("PHTest.csv",), "PHTest.csv", _phtest),),
        marks=("harmfulness",),
    ),
    KnownSet(  # arXiv 2402.10260
        "strongreject",
        ("forbidden_prompt", "prompt"),
        ("category",),
        "walledai/StrongREJECT",
        (KnownFile("all", ("strongreject_dataset.csv",), _TRAIN, _harmful),),
    ),
)


def locate(known: KnownSet, file: KnownFile, folder: Path | None) -> Path:
    """Path of a published file: in `folder` or one level below it; without a folder, from the hub or its cache.

    Raises FileNotFoundError where it is in neither, ValueError where two folders hold it.
    """
    if folder is None:
        return _from_hub(known, file)
    for name in file.names:
        found = [p for p in (folder / name, *sorted(folder.glob(f"*/{name}"))) if p.is_file()]
        if len(found) > 1:
            raise ValueError(f"{known.name}: both {found[0]} and {found[1]} exist; give one of them as path=")
        if found:
            return found[0]
    raise FileNotFoundError(
        f"{known.name}: no {' or '.join(file.names)} in {folder} or one level below; give the file as path="
    )


def _from_hub(known: KnownSet, file: KnownFile) -> Path:
    wanted = f"{known.name} (split {file.split})"
    way_out = f"give the file or its folder as path= (published as {' or '.join(file.names)})"
    if known.hub is None or file.hub is None:
        raise FileNotFoundError(f"{wanted} is not on the Hugging Face hub; {way_out}")
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(known.hub, file.hub, repo_type="dataset")
    if isinstance(cached, str):
        return Path(cached)
    try:
        return Path(huggingface_hub.hf_hub_download(known.hub, file.hub, repo_type="dataset"))
    except Exception as error:  # offline, gated, renamed: unrelated exception families, one way out
        raise FileNotFoundError(
            f"{wanted}: {known.hub}/{file.hub} could not be fetched ({type(error).__name__}); {way_out}"
        ) from error


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV, TSV, JSON, JSONL, Parquet or text file (one row a line, column `text`), told by its suffix.

    Raises FileNotFoundError, and ValueError for another suffix, text that is not UTF-8, malformed content, or
    no rows.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise ValueError(f"{path}: unknown suffix {path.suffix!r}; need one of {', '.join(_READERS)}")
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
    return [{"text": line} for line in text.split("\n")] if text else []


def _read_csv(path: Path) -> list[Row]:
    text = io.StringIO(_text(path), newline="")
    # strict, because a quote left open would otherwise swallow the rest of the file as one prompt.
    reader = csv.DictReader(text, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.reader.line_num}: {error}") from error
    for i, row in enumerate(rows, 1):
        if None in row:  # cells beyond the header: an unquoted separator would cut the prompt short
            raise ValueError(f"{path}, row {i}: more cells than the {len(row) - 1} columns of the header")
    return list(rows)


def _parse(path: Path, text: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {first_line + error.lineno - 1}: not JSON ({error.msg})") from error


def _objects(path: Path, items: list[Any]) -> list[Row]:
    for i, item in enumerate(items, 1):
        if not isinstance(item, str | dict):
            raise ValueError(f"{path}, row {i}: {type(item).__name__} where an object or a string is needed")
    return [{"text": item} if isinstance(item, str) else item for item in items]


def _read_json(path: Path) -> list[Row]:
    content = _parse(path, _text(path))
    if not isinstance(content, list):
        raise ValueError(f"{path}: holds {type(content).__name__}; need a list of objects or of strings")
    return _objects(path, content)


def _read_jsonl(path: Path) -> list[Row]:
    # split("\n"), not splitlines: JSON strings may hold U+2028 and its like unescaped.
    lines = enumerate(_text(path).split("\n"), 1)
    return _objects(path, [_parse(path, line, i) for i, line in lines if line.strip()])


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_table(path).to_pylist())
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not Parquet ({str(error).splitlines()[0]})") from error


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_lines,
}
