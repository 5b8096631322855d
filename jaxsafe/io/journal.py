"""Logs of finished pieces, one JSON object a line, from which an interrupted run goes on."""

import contextlib
import json
import pathlib
from typing import Any


def read_journal(path: pathlib.Path) -> list[dict[str, Any]]:
    """The entries of `path` (none where it is absent); a last line cut short is passed over.

    That line is ended, so that what is appended stands on lines of its own.
    """
    if not path.is_file():
        return []
    found, text = [], path.read_text(encoding="utf-8")
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    if text and not text.endswith("\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
    return found


def add_entry(path: pathlib.Path, entry: Any) -> None:
    """Appends `entry` to `path`."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
