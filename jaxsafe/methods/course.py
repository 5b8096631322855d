"""The course of a training run that can be killed at any time: states by step, saved often enough to go on from."""

import contextlib
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax

from jaxsafe.io.checkpoint import preempted


class State(NamedTuple):
    """After `done` steps: the tree that the next one takes, and the loss of the last one; several runs have several."""

    done: int
    tree: Any
    loss: Any


class Saving(NamedTuple):
    """keep: writes a checkpoint of a state; every: after how many steps; whole: a context that signals wait for; end:
    whether one is written at the end, too."""

    keep: Callable[[State], None]
    every: int
    whole: Callable[[], AbstractContextManager[None]]
    end: bool = True


def course(
    begun: State, steps: int, take: Callable[[int, Any], tuple[Any, Any]], saving: Saving | None
) -> Generator[State, None, None]:
    """The states behind `begun`, up to `steps` steps; `take(i, tree)` is step i, which consumes the tree: (tree, loss).

    Each state is of use before the next one is asked for. One that is not saved yet is where the run is closed before
    its end, and on Ctrl-C and SIGTERM; on SIGTERM several processes end at a step on which they agree.
    """
    state, saved = begun, begun.done
    whole = contextlib.nullcontext if saving is None else saving.whole
    try:
        for i in range(begun.done, steps):
            with whole():
                state = State(i + 1, *take(i, state.tree))
            yield state
            ended = saving is not None and preempted(i)
            if saving and (ended or (state.done == steps and saving.end) or state.done % saving.every == 0):
                with whole():
                    saving.keep(state)
                    saved = state.done
            if ended:
                raise SystemExit(143)
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        # Of several processes, which save together, each may be interrupted at another step.
        if saving and saved < state.done and jax.process_count() == 1:
            saving.keep(state)
        raise
