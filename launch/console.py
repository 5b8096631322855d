"""The command `jaxsafe`: `jaxsafe TASK --flags` is `python -m jaxsafe.launch.TASK --flags`."""

import difflib
import runpy
import sys
from collections.abc import Sequence

import jaxsafe

from .interruption import end_at_once

TASKS = {
    "quickstart": "all of it on a small model that fits any machine",
    "scans": "steer a chat model so that it refuses what is harmful and answers what only looks so (SCANS)",
    "overrefusal": "put every remedy for over-refusal side by side, each with a control of its size",
    "brittleness": "find and remove the weights and ranks that carry a chat model's safety",
    "anatomy": "where a chat model's safety lives: units, layers, weights, ranks, direction, and how far they agree",
    "attack": "fine-tune safety away, with and without defences",
    "jailbreak": "get past safety without training: prefill, persona, decoding, ablation, scaling, suffixes",
    "landscape": "walk through the weights around a chat model: where does its safety end, and where its language",
    "reproduce": "which tables of the papers can be made, with their commands, memory and times",
    "plan": "will a job fit, and how fast can it be, before there is a machine for it",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Starts the task that the first of `arguments` (by default the command line's) names; the others are its flags.

    Without one, and for --help and --version, prints what there is. Raises SystemExit(2) for an unknown task.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    task = words[0] if words else "--help"
    if task in ("-h", "--help"):
        print(usage())
    elif task == "--version":
        print(f"jaxsafe {jaxsafe.__version__}")
    elif task in TASKS:
        sys.argv[1:] = words[1:]
        end_at_once()
        runpy.run_module(f"{__package__}.{task}", run_name="__main__", alter_sys=True)
    else:
        near = difflib.get_close_matches(task, TASKS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(TASKS)}"
        print(f"error: no task {task!r}; {hint}", file=sys.stderr)
        sys.exit(2)


def usage() -> str:
    """What the command does, one line a task."""
    tasks = "\n".join(f"  {task:<12} {what}" for task, what in TASKS.items())
    return (
        f"usage: jaxsafe TASK [--flags]\n\n{tasks}\n\njaxsafe TASK --help shows the flags of a task; jaxsafe --version"
    )


if __name__ == "__main__":
    main()
