"""Chat templates, which are programs of strangers: rendered in a process whose time and memory the system bounds.

A template that loops cannot be stopped within a process: one operation of it may take forever or all memory, whatever
is watched between operations. A process of its own can be ended, in any thread, at the price of a pipe's round trip.
"""

import functools
import json
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from jaxsafe.chat import renderer


class Renderer:
    """A process that renders templates; it starts when it is needed, and again after a template has ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Starts the process, where it does not run, without waiting for it."""
        with self._lock:
            self._running()

    def render(self, template: str, messages: Sequence[Mapping[str, str]], args: Mapping[str, Any]) -> str:
        """`messages` in the chat `template`, up to where an answer begins.

        Raises ValueError for a template that fails, or asks for more time, memory or text than any needs.
        """
        request = json.dumps({"template": template, "messages": list(messages), "args": dict(args)})
        with self._lock:
            process = self._running()
            try:
                line = _exchange(process, request)
            except BaseException:
                process.kill()  # the answer that is still to come is nobody's
                process.wait()
                raise
            if not line:
                raise ValueError(_end(process.wait()))
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["text"]

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(pathlib.Path(renderer.__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # Ctrl-C is this process's own affair
            )
        return self._process


@functools.cache
def shared_renderer() -> Renderer:
    """The renderer of this process: what it answers does not depend on what it was asked before."""
    return Renderer()


def _exchange(process: subprocess.Popen[str], request: str) -> str:
    """The line that answers the line `request`; empty where the process has ended."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(request + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return ""
    return process.stdout.readline()


def _end(status: int) -> str:
    if status == -signal.SIGPROF:
        return f"it takes more than {renderer.SECONDS} seconds for one conversation"
    return f"the process that renders it ended with status {status}"
