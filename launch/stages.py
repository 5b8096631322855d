"""How far a stage of a run is: a bar on a terminal, a line now and then in a log."""

import contextlib
import datetime
import threading
from collections.abc import Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from jaxsafe.progress import Progress

from . import command

EVERY = 30.0
"""Seconds between two lines of a stage."""
MEMORY = 600.0
"""Seconds over which a rate is taken; batches may be minutes apart."""


@contextlib.contextmanager
def stage(what: str, total: int) -> Iterator[Progress]:
    """Shows the stage `what` of `total` pieces (0 where they are not counted); yields what is called with n more.

    A stage that is left without an error is finished, whatever was called.
    """
    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    console = command.console
    bars = Bars(*columns, *times, console=console, disable=not console.is_terminal, speed_estimate_period=MEMORY)
    with bars:
        number = bars.add_task(what, total=total or None)
        with contextlib.nullcontext() if console.is_terminal else lines(bars.tasks[0]):
            yield lambda n: bars.advance(number, n)
            bars.update(number, total=total or 1, completed=total or 1)


@contextlib.contextmanager
def lines(task: Task) -> Iterator[None]:
    """A line at the start, every `EVERY` seconds, and at the end, unless there is an error."""
    left, counted = threading.Event(), bool(task.total)

    def tell() -> None:
        while not left.wait(EVERY):
            command.say(under_way(task))

    command.say(f"{task.description}: 0/{task.total:.0f}" if counted else task.description)
    clock = threading.Thread(target=tell, daemon=True)
    clock.start()
    try:
        yield
    finally:
        left.set()
        clock.join()
    finished = f"{task.completed:.0f}/{task.total:.0f}" if counted else "done"
    command.say(f"{task.description}: {finished} in {_time(task.elapsed)}")


def under_way(task: Task) -> str:
    """What is finished of the stage, how fast it goes, and how long it takes yet, as far as these are known."""
    if not task.total:
        return f"{task.description}: for {_time(task.elapsed)}"
    rate = f", {task.speed:.3g} a second" if task.speed else ""
    rest = f", {_time(task.time_remaining)} left" if task.time_remaining is not None else ""
    return f"{task.description}: {task.completed:.0f}/{task.total:.0f}{rate}{rest}"


def _time(seconds: float | None) -> str:
    return str(datetime.timedelta(seconds=round(seconds or 0)))
