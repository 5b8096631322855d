"""The result of a run as a table in the terminal."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from jaxsafe.records.run import Comparison, Rate, Run, TableRow
from jaxsafe.report.page import is_number, number, p_value, points, times
from jaxsafe.report.sections import Pair, columns, main_comparison, pairs, ratio, short_names


def percent(rate: Rate | None, digits: int = 0) -> str:
    """A rate with its interval, such as "12% [5, 26]"; "-" where nothing was scored."""
    if rate is None or rate.value is None:
        return "-"
    if rate.ci_low is None or rate.ci_high is None:
        return f"{100 * rate.value:.{digits}f}%"
    return f"{100 * rate.value:.{digits}f}% [{100 * rate.ci_low:.0f}, {100 * rate.ci_high:.0f}]"


def result_table(run: Run, shown: Sequence[str] | None = None) -> Table:
    """The result of a run: a row a set of prompts where one group is compared with its baseline, else a row a group.

    `shown` names entries of the rows' `about` that become columns; None names how much is removed or kept. Rows of
    steps that are not a run's last are left out.
    """
    title = f"{run.task.capitalize()}, {run.model.name}; judge {run.judge.name}, {run.new_tokens} new tokens"
    compared = pairs(run)
    if len(compared) == 1 and shown is None:
        return _by_prompts(run, compared[0], title)
    return _by_group(run, shown, title)


def scored_lines(run: Run) -> list[str]:
    """Of each side whose own answers were scored: how many prompts were left out for their answer."""
    return [
        f"  {each.side}: scores of {each.used} rows; {each.dropped} of {each.prompts} prompts left out, whose answer"
        f" {'does not refuse' if each.side == 'safety' else 'refuses or is blank'} ({each.judge})"
        for each in run.scored
    ]


def _table(title: str, first: str, *heads: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(first, overflow="fold")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def _by_prompts(run: Run, pair: Pair, title: str) -> Table:
    table = _table(title, "prompts", "n", pair.first, pair.second, "p (McNemar)")
    for row in pair.rows:
        p = "-" if row.p_value is None else f"{row.p_value:.2g}"
        table.add_row(row.label, str(row.n), percent(row.first_rate, 1), percent(row.second_rate, 1), p)
        if row.first_broken.value or row.second_broken.value:
            table.add_row("  broken", "", percent(row.first_broken, 1), percent(row.second_broken, 1), "")
    first, second = (next((row for row in run.table if row.group == name), None) for name in (pair.first, pair.second))
    tokens = max((result.perplexity_tokens for result in run.results), default=0)
    if first and second and tokens:
        change = ratio(run, second)
        after = _number(second.perplexity) + (f" ({times(change)})" if is_number(change) else "")
        table.add_row("perplexity", str(tokens), _number(first.perplexity), after, "")
    return table


def _by_group(run: Run, shown: Sequence[str] | None, title: str) -> Table:
    rows = [row for row in run.table if row.about.get("last") is not False or row.about.get("step") == 0]
    named, tested = columns(rows), any(row.against_baseline for row in rows)
    # The first rate of each sort.
    asr, broken, harmless = (named.starting(start)[:1] for start in ("asr_", "broken/", "refusal_"))
    heads = [*(shown or []), *["ASR"] * len(asr), *["broken"] * len(broken), *["harmless\nrefused"] * len(harmless)]
    heads += ["perpl."] + ["refusals less\nbaseline's"] * tested
    changes = shown is None and any(map(_changed, rows))
    table = _table(title, "variant\n(removed or kept)" if changes else "variant", *heads)
    for label, row in zip(_labels(rows, changes), rows, strict=True):
        cells = [str(row.about.get(name, "-")) for name in shown or []]
        cells += [percent(row.rates.get(name)) for name in asr]
        cells += [_share(row.rates.get(name)) for name in (*broken, *harmless)]
        cells += [_number(row.perplexity), *[_test(main_comparison(row.against_baseline))] * tested]
        table.add_row(label, *cells)
    return table


def _labels(rows: Sequence[TableRow], changes: bool) -> list[str]:
    """Short names, with how much is removed or kept where `changes` asks for it.

    A control right below what it belongs to removes or keeps as much, and needs no name of its own.
    """
    owners = (None, *rows)
    return [
        "  random control" if owner and owner.control == row.group else name + (_changed(row) if changes else "")
        for name, row, owner in zip(short_names(rows), rows, owners, strict=False)
    ]


def _changed(row: TableRow) -> str:
    """How much of the model is removed or kept, as " (12%)"; "" where neither is said."""
    for name in ("sparsity", "share"):
        if is_number(row.about.get(name)) and row.about[name] > 0:
            return f" ({number(100 * row.about[name])}%)"
    ranks = row.about.get("ranks")
    return f" ({number(ranks)} ranks)" if is_number(ranks) and ranks > 0 else ""


def _share(rate: Rate | None) -> str:
    return "-" if rate is None or rate.value is None else f"{rate.value:.0%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _test(row: Comparison | None) -> str:
    """A difference of refusals in points, with the p of one seed, or else with its interval."""
    if row is None or row.difference.value is None:
        return "-"
    if row.p_value is None:
        return points(row.difference)
    return f"{points(row.difference).split(' ')[0]}, p{p_value(row.p_value).replace(' ', '')}"
