"""What the report of attacks that leave the weights alone has of its own: what each reaches, the worst of k tries."""

from collections.abc import Sequence

from jaxsafe.records.jailbreak import About, Details, Tries
from jaxsafe.records.run import Run, TableRow, from_json
from jaxsafe.report import plots_jailbreak as plots
from jaxsafe.report.own import Own
from jaxsafe.report.page import words
from jaxsafe.report.plots_jailbreak import Reached
from jaxsafe.report.sections import Line, broken_rate, broken_words, lines, spoken

MOST_POINTS = 12
"""An attack of more attempts than these is drawn as the worst case over them alone; the table has all."""


def own(run: Run) -> Own:
    """The sections of a run of such attacks. Raises ValueError where its details or its columns are none."""
    details = from_json(run.details, Details)
    abouts = {row.group: from_json(row.about, About) for row in run.table}
    metric = f"asr_{run.judge.name}/jailbreak"
    best = strongest(lines(run), abouts, metric)
    drawn = reached(run.table, abouts, details.tries, metric)
    contents = {"reached": "Attacks"} if drawn else {}
    contents |= {"tries": "Several tries"} if details.tries else {}
    contents |= {"begun": "Openings"} if details.begun else {}
    return Own(
        title="Attacks without training on",
        kicker="Attacks that leave the weights alone",
        best=best,
        headline=headline(run, best, details.tries, metric),
        template="jailbreak.html.j2",
        contents=contents,
        figures=[plots.reached("reached", drawn)] if drawn else [],
        values={"details": details, "tries_name": tries_name},
        facts=[("Perplexity of", details.perplexity_text)],
    )


def strongest(found: Sequence[Line], abouts: dict[str, About], metric: str) -> TableRow | None:
    """The attack of the highest success among models that are not damaged; None where none was measured."""
    tried = [line.row for line in found if abouts[line.row.group].attack and not line.control and not line.damaged]
    measured = [row for row in tried if metric in row.rates and row.rates[metric].value is not None]
    return max(measured, key=lambda row: row.rates[metric].value or 0.0, default=None)


def reached(table: Sequence[TableRow], abouts: dict[str, About], tries: Sequence[Tries], metric: str) -> list[Reached]:
    """The lines of the figure: the plain request, each attempt before its control, and worst cases of attacks."""
    out = []
    for attack in dict.fromkeys(about.attack for about in abouts.values()):
        rows = [row for row in table if abouts[row.group].attack == attack and metric in row.rates]
        if sum(not abouts[row.group].control for row in rows) <= MOST_POINTS:
            out += [
                Reached(
                    row.group,
                    row.rates[metric],
                    broken_rate(row, metric),
                    abouts[row.group].control,
                    perplexity=row.answer_perplexity,
                )
                for row in rows
            ]
        for each in (each for each in tries if each.attack == attack):
            out.append(Reached(tries_name(each), each.worst, each.broken, each.control, worst=True))
    return out


def tries_name(tries: Tries) -> str:
    """ "decoding, worst of 10", "control, worst of 10"."""
    return f"{'control' if tries.control else words(tries.attack)}, worst of {tries.k}"


def headline(run: Run, best: TableRow | None, tries: Sequence[Tries], metric: str) -> str:
    """The result in one sentence: the attack that succeeds most, its control, and the worst of most tries."""
    plain = run.table[0]
    if best is None or metric not in plain.rates:
        return ""
    sentence = (
        f"The most successful of {sum(not row.about.get('control') for row in run.table) - 1} attempts ({best.group}) "
        f"raised attack success from {spoken(plain.rates[metric])} to {spoken(best.rates[metric])}"
        f"{broken_words(plain, best, metric)}"
    )
    control = next((row for row in run.table if row.group == best.control), None)
    sentence += f"; its control reached {spoken(control.rates[metric])}" if control else "; it has no control"
    several = [each for each in tries if not each.control]
    if not several:
        return sentence
    most = max(several, key=lambda each: each.k)
    other = next((each for each in tries if each.control and each.attack == most.attack), None)
    beside = f", of {other.k} tries of its control {spoken(other.worst)}" if other else ""
    return f"{sentence}; the worst of {most.k} tries of {words(most.attack)} reached {spoken(most.worst)}{beside}"
