"""What a cell of a file or the content of a message says, as one text."""

from collections.abc import Mapping
from typing import Any


def text_of(value: Any, role: str = "user") -> str:
    """The text that `value` holds, as it is: a text, text parts, a list of one turn, or one message of `role`.

    Raises ValueError for anything else: no text at all, an image, several turns or messages.
    """
    if isinstance(value, str):
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError("half of a character (a surrogate without its other half)")
        return value
    if isinstance(value, Mapping) and "content" in value:
        if value.get("role", role) != role:
            raise ValueError(f"a message of the role {value['role']!r}, where one of {role!r} is needed")
        return text_of(value["content"], role)
    if isinstance(value, list) and value and all(isinstance(part, Mapping) and "type" in part for part in value):
        return text_of("".join(map(_part, value)))
    if isinstance(value, list) and len(value) == 1:
        return text_of(value[0], role)
    if isinstance(value, list) and value:
        raise ValueError(f"a list of {len(value)}, where one text, one turn or one message is needed")
    raise ValueError(f"{'null' if value is None else type(value).__name__}, which is not a text")


def _part(part: Mapping[str, Any]) -> str:
    if part["type"] != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f"a part of the type {part['type']!r}; only parts of text are read")
    return part["text"]


def cell_text(row: Mapping[str, Any], column: str, where: str, role: str = "user") -> str:
    """The text of a cell of `row`. Raises ValueError as `text_of`, in one line that says where."""
    try:
        return text_of(row[column], role)
    except ValueError as error:
        raise ValueError(f"{where}: {column!r} holds {error}") from None
