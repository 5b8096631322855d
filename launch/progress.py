"""What a long run tells while it runs: progress bars, and the time that each stage takes."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from launch import command


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Any]:
    """A bar of `total` steps; yields a function that hears of n more steps."""
    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=command.console) as progress:
        task = progress.add_task(what, total=total)
        yield lambda n: progress.advance(task, n)


def reached(done: Callable[[int], Any]) -> Callable[[int], None]:
    """Tells `done` of n more steps when it hears that so many are finished in all, as a resumed run does."""
    before = 0

    def tell(finished: int) -> None:
        nonlocal before
        done(finished - before)
        before = finished

    return tell


@dataclasses.dataclass
class Clock:
    """Seconds by stage, for the record of a run; "compile_s" is part of the stages in which it fell."""

    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        def hear(event: str, duration_secs: float, **_: Any) -> None:
            if event.endswith("backend_compile_duration"):
                self.seconds["compile_s"] = self.seconds.get("compile_s", 0.0) + duration_secs

        jax.monitoring.register_event_duration_secs_listener(hear)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
