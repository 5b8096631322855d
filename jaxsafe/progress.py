"""How work says how far it is: functions that are called with a number of finished rows, prompts or blocks."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

Progress = Callable[[int], None]
"""Called with the number of pieces that were finished since the last call."""

Watch = Callable[[str, int], AbstractContextManager[Progress]]
"""(name of a stage, its number of pieces) -> a context in which the stage runs, and its progress."""


def silent(n: int) -> None:
    """A progress that is shown to nobody."""


@contextlib.contextmanager
def unwatched(stage: str, total: int) -> Iterator[Progress]:
    """A watch that shows nothing."""
    yield silent
