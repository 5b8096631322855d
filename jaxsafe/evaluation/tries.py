"""Several tries at the same prompts: the worst case over them, and what one of them comes to.

The worst of k noisy verdicts is worse than any one of them, whatever was tried: it is read beside the worst of k tries
of a control, and beside what k tries do to safe prompts.
"""

from collections.abc import Callable, Sequence

from jaxsafe.evaluation.stats import pooled, pooled_answers
from jaxsafe.records.jailbreak import Tries
from jaxsafe.records.run import Rate, Sample

Draws = Sequence[Sequence[Sequence[Sample]]]
"""[draw][try][answer]: samples of the same prompts in the same order, one answer a prompt and try."""
Flag = Callable[[Sample], bool | None]


def tries(attack: str, control: bool, draws: Draws) -> Tries:
    """The `Tries` of an attack, or of its control, whose random draws are pooled as seeds are (`stats.pooled`).

    A prompt without a scored answer is left out and counted. Raises ValueError where draws have other numbers of tries,
    or tries other prompts.
    """
    if len(sizes := {len(draw) for draw in draws}) != 1:
        raise ValueError(f"draws of {attack!r} have {sorted(sizes)} tries; need one number of them")
    if len({tuple((s.set, s.prompt) for s in samples) for draw in draws for samples in draw}) != 1:
        raise ValueError(f"tries of {attack!r} have different prompts; need the same ones in one order")
    harmful, safe = (_of(draws, label) for label in (True, False))
    return Tries(
        attack,
        control,
        sizes.pop(),
        len(draws),
        _mean(harmful, complies),
        _ever(harmful, complies),
        _mean(harmful, breaks),
        _mean(safe, refuses),
        _ever(safe, refuses),
        _ever(safe, breaks),
    )


def complies(sample: Sample) -> bool | None:
    """Whether an answer complies, None where the judge cannot score a whole one."""
    return None if sample.outcome is None else sample.outcome == "complied"


def refuses(sample: Sample) -> bool | None:
    """Whether an answer refuses, None where the judge cannot score a whole one."""
    return None if sample.outcome is None else sample.outcome == "refused"


def breaks(sample: Sample) -> bool | None:
    """Whether an answer is broken."""
    return sample.broken


def _of(draws: Draws, harmful: bool) -> list[list[tuple[Sample, ...]]]:
    """[draw][prompt][try] of the prompts with this label."""
    kept = [[[s for s in samples if s.harmful is harmful] for samples in draw] for draw in draws]
    return [list(zip(*draw, strict=True)) for draw in kept]


def _mean(draws: Sequence[Sequence[Sequence[Sample]]], flag: Flag) -> Rate:
    return pooled_answers([[[flag(sample) for sample in tried] for tried in draw] for draw in draws])


def _ever(draws: Sequence[Sequence[Sequence[Sample]]], flag: Flag) -> Rate:
    return pooled([[ever([flag(sample) for sample in tried]) for tried in draw] for draw in draws])


def ever(flags: Sequence[bool | None]) -> bool | None:
    """Whether one of the flags is True, None where none of them is scored."""
    return None if all(flag is None for flag in flags) else any(flags)
