"""The time that each stage of a run takes, and what it goes over."""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax

from jaxsafe.evaluation.utilisation import Tokens, utilisation
from jaxsafe.io.atomic import write_text
from jaxsafe.model.config import ModelConfig
from jaxsafe.progress import Progress, Watch, silent

from .stages import stage


@dataclasses.dataclass
class Clock:
    """Seconds by stage and the tokens that each went over, for the record of a run.

    What a stage within another takes counts for the inner one alone; "compile_s" is part of the stages in which it
    fell.
    """

    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    tokens: dict[str, Tokens] = dataclasses.field(default_factory=dict)
    earlier: dict[str, float] = dataclasses.field(default_factory=dict)
    _file: pathlib.Path | None = None
    _running: list[str] = dataclasses.field(default_factory=list)
    _since: float = 0.0
    _saved: float = 0.0
    _watching: bool = False

    def __post_init__(self) -> None:
        def hear(event: str, duration_secs: float, **_: Any) -> None:
            if event.endswith("backend_compile_duration"):
                self.seconds["compile_s"] = self.seconds.get("compile_s", 0.0) + duration_secs

        jax.monitoring.register_event_duration_secs_listener(hear)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to `name`."""
        self._lap()
        self._running.append(name)
        try:
            yield
        finally:
            self._lap()
            self._running.pop()
            self._save()

    def _lap(self) -> None:
        """Adds the time since the last lap to the innermost of the running stages."""
        now = time.perf_counter()
        if self._running:
            name = self._running[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    def resume(self, out: pathlib.Path) -> None:
        """Goes on from the seconds that an interrupted run left in the folder `out`, and keeps those of this one there.

        They are kept at the end of every stage, and every second while a stage is watched.
        """
        self._file = out / "store" / "seconds"
        with contextlib.suppress(FileNotFoundError):
            self.earlier = json.loads(self._file.read_text(encoding="utf-8"))

    def _whole(self) -> dict[str, float]:
        """The seconds of all parts of the run."""
        names = {**self.earlier, **self.seconds}
        return {name: self.earlier.get(name, 0.0) + self.seconds.get(name, 0.0) for name in names}

    def _save(self) -> None:
        if self._file is not None and self._file.parent.is_dir():  # a store begins with the first finished piece
            write_text(self._file, json.dumps(self._whole()))
        self._saved = time.perf_counter()

    def _done(self, done: Progress, n: int) -> None:
        done(n)
        self._lap()
        if self._since - self._saved > 1:
            self._save()

    def watch(self, name: str) -> Watch:
        """A `Watch` that shows a stage and adds the time of what it watches to `name`."""

        @contextmanager
        def watched(what: str, total: int) -> Iterator[Progress]:
            outer, self._watching = self._watching, True
            shown = contextlib.nullcontext(silent) if outer else stage(what, total)
            try:
                with self.stage(name), shown as done:  # one at a time: the outermost
                    yield lambda n: self._done(done, n)
            finally:
                self._watching = outer

        return watched

    def count(self, name: str, tokens: Tokens) -> None:
        """Adds what the stage `name` went over."""
        self.tokens[name] = self.tokens.get(name, Tokens()) + tokens

    def record(self, config: ModelConfig, batch: int) -> dict[str, Any]:
        """The seconds, those of earlier parts included, and "use": what `utilisation` tells of each stage of this part.

        Answers came in batches of `batch`. "resumed" stands beside "use" where there were earlier parts.
        """
        use = {
            name: utilisation(config, jax.devices(), tokens, batch, self.seconds[name])
            for name, tokens in self.tokens.items()
            if tokens
        }
        return {**self._whole(), "use": use} | ({"resumed": True} if self.earlier else {})


def use_line(timings: Mapping[str, Any]) -> str:
    """What a run tells of its speed, a stage after the other; empty where nothing was run."""
    said = "; ".join(_use(name.removesuffix("_s").replace("_", " "), use) for name, use in timings["use"].items())
    return f"since the run went on: {said}" if said and timings.get("resumed") else said


def _use(stage: str, use: Mapping[str, float]) -> str:
    new = f" ({use['new_tokens_per_s']:.0f} new)" if "new_tokens_per_s" in use else ""
    shares = {"model FLOPs": "model_flops_share", "bandwidth": "bandwidth_share"}
    parts = [f"{100 * use[key]:.2g}% of peak {what}" for what, key in shares.items() if key in use]
    return ", ".join([f"{stage} {use['tokens_per_s']:.0f} tokens/s{new}", *parts])
