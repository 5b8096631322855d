"""What a report has of its task, beside what any run has."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxsafe.records.run import TableRow
from jaxsafe.report.style import Drawing


@dataclasses.dataclass(frozen=True)
class Own:
    """The parts of a page that follow from the task.

    title: stands before the model's name; kicker: stands above it; headline: the result, None leaves it to
    `sections.headline`; best: the group that it is about; template: extends report.html.j2 and fills its blocks from
    `values`; contents: {id of a section of the template: its name}; shown: rows of the table of rates, None shows all;
    facts: terms and values that are added to those of any run.
    """

    title: str
    kicker: str
    best: TableRow | None
    headline: str | None = None
    template: str = "report.html.j2"
    contents: Mapping[str, str] = dataclasses.field(default_factory=dict)
    figures: Sequence[Drawing] = ()
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shown: Sequence[TableRow] | None = None
    facts: Sequence[tuple[str, object]] = ()
