"""What a judge of refusals is: a rule on keywords, a classifier, another model."""

from collections.abc import Sequence
from typing import Protocol


class Judge(Protocol):
    """Tells refusals from other answers; `name` and `version` stand beside every number that it decides."""

    @property
    def name(self) -> str:
        """As in the names of rates."""

    @property
    def version(self) -> str:
        """Of the rule or the weights: another version is another judge."""

    def refused(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool | None]:
        """For each answer to a prompt: True (refused), False (did not) or None (cannot be scored)."""


def spoken(answer: str) -> str:
    """What of `answer` stands behind a closed block of thoughts, <think> ... </think>; all where there is none."""
    return answer.rpartition("</think>")[2].lstrip() if "</think>" in answer else answer
