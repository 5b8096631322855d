"""Ctrl-C and SIGTERM: the first one ends a run as soon as the batch in hand is finished, the second one at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

SAID = "interrupted: ends after the batch in hand, once more: at once; the same command goes on from what is finished"


class Interrupted(KeyboardInterrupt):
    """The signal `number` asked the run to end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.status = 128 + number


def end_at_once() -> None:
    """Until a run begins to listen, Ctrl-C ends the process with one line and status 130, also within an import."""

    def ended(number: int, frame: FrameType | None) -> None:
        os.write(2, b"interrupted before the run began\n")  # print may be what was interrupted
        os._exit(128 + number)

    signal.signal(signal.SIGINT, ended)


@contextlib.contextmanager
def interruptible(signals: Sequence[int], say: Callable[[str], object]) -> Iterator[None]:
    """Inside, the first of `signals` calls `say` with one line and raises Interrupted; a second one ends the process.

    Python acts on a signal only between two of its own operations, which may be a compilation apart; a thread that
    is woken by every signal needs not wait for that. To be used in the main thread.
    """

    def raised(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = {number: signal.signal(number, raised) for number in signals}
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    listener = threading.Thread(target=_listen, args=(reader, signals, say), daemon=True)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)  # which ends the listener, once it has said what it heard
        listener.join()


def _listen(reader: int, signals: Sequence[int], say: Callable[[str], object]) -> None:
    heard = 0
    while byte := os.read(reader, 1):
        if byte[0] in signals:
            heard += 1
            if heard == 2:
                os._exit(128 + byte[0])
            say(SAID)
    os.close(reader)
