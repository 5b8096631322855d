"""What the cells of a column of labels say: harmful, safe, or nothing."""

import re
from typing import Any

UNSAFE_WORDS = ("unsafe", "harmful", "toxic", "malicious")
SAFE_WORDS = ("safe", "harmless", "benign", "unharmful", "nontoxic", "non-toxic")
YES, NO = ("true", "yes", "1", "1.0"), ("false", "no", "0", "0.0")
WAY_OUT = "label the whole file, as in x.csv:safe or harmful=False"


def label_of(value: Any, column: str) -> bool | None:
    """True (harmful), False (safe) or None (an empty cell); yes and no answer what the column's name asks.

    Raises ValueError for another word, and for yes and no in a column whose name asks for neither harm nor safety.
    """
    word = "" if value is None else str(value).strip().lower()
    if word in (*UNSAFE_WORDS, *SAFE_WORDS):
        return word in UNSAFE_WORDS
    if word in (*YES, *NO):
        if (of_harm := asks_for_harm(column)) is None:
            raise ValueError(
                f"label {word!r} in column {column!r}, whose name does not say whether that is harmful; "
                f"name it 'harmful' or 'safe', or {WAY_OUT}"
            )
        return (word in YES) is of_harm
    if word:
        known = ", ".join((*UNSAFE_WORDS, *SAFE_WORDS, *YES, *NO))
        raise ValueError(f"label {word!r} in column {column!r} is none of {known}; or {WAY_OUT}")
    return None


def asks_for_harm(column: str) -> bool | None:
    """Whether a yes in `column` means harm (True) or safety (False); None where its name does not say."""
    name = re.sub(r"[\W_]+", "", column.lower())
    if re.search("(un|not|non)safe", name):
        return True
    if re.search("safe|benign|harmless|(un|not|non)(harm|toxic|malicious)", name):
        return False
    return True if re.search("harm|toxic|malicious|jailbreak|flagged|refus|label", name) else None
