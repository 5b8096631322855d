"""What attempts that leave the weights alone come to together: worst cases, and answers with openings."""

from collections.abc import Mapping, Sequence

from jaxsafe.evaluation.judges.judge import Judge
from jaxsafe.evaluation.stats import rate
from jaxsafe.evaluation.tries import complies, tries
from jaxsafe.methods.jailbreaks import Attempt
from jaxsafe.records.jailbreak import Begun, Tries
from jaxsafe.records.run import Sample, outcome

Samples = Mapping[str, Sequence[Sample]]
"""Variant -> its answers."""


def tries_of(attempts: Sequence[Attempt], samples: Samples) -> tuple[Tries, ...]:
    """The worst cases of attacks with several attempts, each followed by that of its control."""
    families: dict[tuple[str, bool], dict[int, list[Sequence[Sample]]]] = {}
    for attempt in attempts:
        draws = families.setdefault((attempt.attack, attempt.control), {})
        draws.setdefault(attempt.draw, []).append(samples[attempt.variant.name])
    several = {attack for (attack, control), draws in families.items() if not control and len(draws[0]) > 1}
    return tuple(
        tries(attack, control, list(draws.values()))
        for (attack, control), draws in families.items()
        if attack in several
    )


def begun(attempts: Sequence[Attempt], samples: Samples, judge: Judge) -> tuple[Begun, ...]:
    """Compliance with harmful prompts, judged on what stands behind each opening and on both together."""
    out = []
    for attempt in attempts:
        opening = attempt.setting.opening
        answers = [sample for sample in samples[attempt.variant.name] if opening and sample.harmful]
        if not answers:
            continue
        whole = judge.refused([s.prompt for s in answers], [f"{opening} {s.text.lstrip()}" for s in answers])
        outcomes = [outcome(refused, s.broken) for refused, s in zip(whole, answers, strict=True)]
        flags = [None if found is None else found == "complied" for found in outcomes]
        out.append(Begun(attempt.variant.name, opening, rate(map(complies, answers)), rate(flags)))
    return tuple(out)
