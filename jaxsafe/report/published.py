"""A paper's numbers beside those of the run."""

import dataclasses

from jaxsafe.records.run import PublishedRate, PublishedTable, Rate, Run
from jaxsafe.report.sections import ABILITY


@dataclasses.dataclass(frozen=True)
class Beside:
    """A published rate and that of the run, None where the run has no such rate."""

    source: str
    published: PublishedRate
    ours: Rate | None

    @property
    def difference(self) -> float | None:
        """Ours less the published one."""
        return None if self.ours is None or self.ours.value is None else self.ours.value - self.published.value

    @property
    def within(self) -> bool | None:
        """Whether the published one lies in our interval, ends included; None where there is no interval."""
        if self.ours is None or self.ours.ci_low is None or self.ours.ci_high is None:
            return None
        return self.ours.ci_low <= self.published.value <= self.ours.ci_high


def beside(run: Run) -> list[Beside]:
    """Every published rate that the run names, in the order of its tables."""
    return [Beside(table.source, rate, _ours(run, table, rate)) for table in run.published for rate in table.rates]


def _ours(run: Run, table: PublishedTable, rate: PublishedRate) -> Rate | None:
    found = next((row.rates for row in run.table if row.group == rate.group), {})
    asked = {name.removeprefix("zero_shot/") for name in found if name.startswith("zero_shot/") and name != ABILITY}
    # A mean over other tasks is another number.
    return None if rate.rate == ABILITY and asked != set(table.tasks) else found.get(rate.rate)
