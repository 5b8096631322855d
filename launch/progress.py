"""The time that each stage of a run takes, and what it goes over."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax

from jaxsafe.evaluation.utilisation import Tokens, utilisation
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
    _within: float = 0.0
    _watching: bool = False

    def __post_init__(self) -> None:
        def hear(event: str, duration_secs: float, **_: Any) -> None:
            if event.endswith("backend_compile_duration"):
                self.seconds["compile_s"] = self.seconds.get("compile_s", 0.0) + duration_secs

        jax.monitoring.register_event_duration_secs_listener(hear)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to `name`."""
        start, outer, self._within = time.perf_counter(), self._within, 0.0
        yield
        took = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + took - self._within
        self._within = outer + took

    def watch(self, name: str) -> Watch:
        """A `Watch` that shows a stage and adds the time of what it watches to `name`."""

        @contextmanager
        def watched(what: str, total: int) -> Iterator[Progress]:
            outer, self._watching = self._watching, True
            shown = contextlib.nullcontext(silent) if outer else stage(what, total)
            try:
                with self.stage(name), shown as done:  # one at a time: the outermost
                    yield done
            finally:
                self._watching = outer

        return watched

    def count(self, name: str, tokens: Tokens) -> None:
        """Adds what the stage `name` went over."""
        self.tokens[name] = self.tokens.get(name, Tokens()) + tokens

    def record(self, config: ModelConfig, batch: int) -> dict[str, Any]:
        """The seconds, and "use": what `utilisation` tells of each stage; answers came in batches of `batch`."""
        use = {
            name: utilisation(config, jax.devices(), tokens, batch, self.seconds[name])
            for name, tokens in self.tokens.items()
            if tokens
        }
        return {**self.seconds, "use": use}


def use_line(timings: Mapping[str, Any]) -> str:
    """What a run tells of its speed, a stage after the other; empty where nothing was run."""
    return "; ".join(_use(name.removesuffix("_s").replace("_", " "), use) for name, use in timings["use"].items())


def _use(stage: str, use: Mapping[str, float]) -> str:
    new = f" ({use['new_tokens_per_s']:.0f} new)" if "new_tokens_per_s" in use else ""
    shares = {"model FLOPs": "model_flops_share", "bandwidth": "bandwidth_share"}
    parts = [f"{100 * use[key]:.2g}% of peak {what}" for what, key in shares.items() if key in use]
    return ", ".join([f"{stage} {use['tokens_per_s']:.0f} tokens/s{new}", *parts])
