"""What the report of fine-tuning attacks has of its own: how fast safety goes, and what freezing is worth.

The attacks are those of Qi et al. (arXiv 2310.03693), the table is after that of Wei et al. (arXiv 2402.05162).
"""

import dataclasses
from collections.abc import Sequence

from jaxsafe.model.layers import LayerRange
from jaxsafe.records.attack import About, Details, LayerScan
from jaxsafe.records.run import Comparison, Difference, Rate, Run, TableRow, from_json
from jaxsafe.report import plots_attack as plots
from jaxsafe.report.own import Own
from jaxsafe.report.plots_attack import Defended
from jaxsafe.report.sections import broken_words, columns, main_comparison, spoken
from jaxsafe.report.style import Drawing

Row = tuple[TableRow, About]


@dataclasses.dataclass(frozen=True)
class Group:
    """One attack and one way of training: the model before it, and at its end by defence, no defence first.

    metric: the name of the attack success rate.
    """

    attack: str
    tuning: str
    origin: TableRow | None
    metric: str
    rows: tuple[Defended, ...]

    @property
    def start(self) -> Rate | None:
        """Attack success before it."""
        return self.origin.rates.get(self.metric) if self.origin else None

    @property
    def label(self) -> str:
        """Its name."""
        return f"{self.attack}, {self.tuning}"

    @property
    def regions(self) -> list[str]:
        """What its defences keep."""
        return list(dict.fromkeys(row.about.region for row in self.rows if not row.undefended))


def own(run: Run) -> Own:
    """The sections of a run of attacks. Raises ValueError where its details or its columns are none."""
    details, groups = from_json(run.details, Details), grouped(run)
    rows = [(row, from_json(row.about, About)) for row in run.table]
    best = _best(groups)
    figures = _figures(groups)
    worth = any(figure.name.startswith("differences-") for figure in figures)
    contents = {"pivot": "Defences"} if len(groups) > 1 else {}
    contents |= {"steps": "Steps"} if groups else {}
    contents |= {"worth": "Worth"} if worth else {}
    return Own(
        title="Fine-tuning attacks on",
        kicker="Fine-tuning attacks, and what freezing is worth",
        best=best.row if best else None,
        headline=headline(groups),
        template="attack.html.j2",
        facts=[("Seeds, each with one random draw", len(run.config.get("seeds", ())) or None)],
        contents=contents | ({"layers": "Layers"} if details.layers else {}),
        figures=figures,
        values={
            "draws": max((len(row.row.variants) for group in groups for row in group.rows), default=0),
            "groups": groups,
            "worth": worth,
            "pivot": pivot(groups),
            "scans": [_scan(scan) for scan in details.layers],
            "loss": {name: loss for name, loss in details.loss.items() if loss is not None},
        },
        shown=[row for row, about in rows if about.last or about.tuning is None],
    )


def grouped(run: Run) -> list[Group]:
    """The rows of every attack and way of training that the run has been through."""
    names = columns(run.table).starting("asr_")
    rows = [(row, from_json(row.about, About)) for row in run.table]
    trained = dict.fromkeys((about.attack, about.tuning) for _, about in rows if about.tuning is not None)
    return [_group(rows, attack, str(tuning), names) for attack, tuning in trained]


def _group(rows: Sequence[Row], attack: str, tuning: str, names: Sequence[str]) -> Group:
    mine = [(row, about) for row, about in rows if about.attack == attack]
    origin = next((row for row, about in mine if about.tuning is None), None)
    metric = next((name for name in names if any(name in row.rates for row, _ in mine)), "")
    start = origin.rates.get(metric) if origin else None
    trained = [(row, about) for row, about in mine if about.tuning == tuning]
    defended = []
    for row, about in trained:
        if not about.last:
            continue
        steps = [(0, start)] if start else []
        others = [(b.step, other.rates.get(metric)) for other, b in trained if b.defence == about.defence]
        curve = [*steps, *sorted(((step, rate) for step, rate in others if rate), key=lambda point: point[0])]
        against = _prevented(main_comparison(row.against_baseline)), _prevented(main_comparison(row.against_control))
        same = [(b.step, other) for other, b in trained if b.defence == about.defence]
        read = [(0, origin)] if origin and same else []
        read += sorted(same, key=lambda point: point[0])
        utility = tuple((step, other.perplexity) for step, other in read if other.perplexity is not None)
        defended.append(Defended(row, about, tuple(curve), *against, utility))
    ordered = tuple(sorted(defended, key=lambda row: not row.undefended))
    return Group(attack, tuning, origin, metric, ordered)


def _prevented(compared: Comparison | None) -> Difference | None:
    """By how much fewer of the harmful prompts are complied with."""
    if compared is None or not compared.harmful:
        return None
    change = compared.complied
    value, low, high = (None if end is None else -end for end in (change.value, change.ci_high, change.ci_low))
    return Difference(value, low, high)


def pivot(groups: Sequence[Group]) -> list[tuple[Defended, list[Defended | None]]]:
    """A defence and its rows in every group, None where it has none; as table 3 of arXiv 2402.05162."""
    found = [{row.about.defence: row for row in group.rows} for group in groups]
    names = dict.fromkeys(name for rows in found for name in rows)
    return [(next(rows[name] for rows in found if name in rows), [rows.get(name) for rows in found]) for name in names]


def _best(groups: Sequence[Group]) -> Defended | None:
    """The defence of the first group that prevents most; no defence where there is none."""
    rows = groups[0].rows if groups else ()
    kept = [row for row in rows if not row.undefended and not row.about.control and _known(row.prevented)]
    best = max(kept, key=lambda row: (row.prevented and row.prevented.value) or 0.0, default=None)
    return best or next(iter(rows), None)


def _known(value: Rate | Difference | None) -> bool:
    return value is not None and value.value is not None


def headline(groups: Sequence[Group]) -> str:
    """The result in one sentence: what the first attack does, and the frozen region that prevents most of it."""
    if not groups or not groups[0].rows or not _known(groups[0].rows[0].end):
        return ""
    group, best = groups[0], _best(groups)
    came = f"from {spoken(group.start)} " if _known(group.start) else ""
    sentence = f"Fine-tuning ({group.label}) raised attack success {came}to {spoken(group.rows[0].end)}"
    sentence += broken_words(group.origin, group.rows[0].row, group.metric)
    if best is None or best.undefended:
        return sentence
    sentence += f"; of the defences {best.about.defence} left {spoken(best.end)}"
    random = next((row for row in group.rows if row.row.group == best.row.control), None)
    if random is None:
        return f"{sentence}, without a random control"
    return f"{sentence}, its random control {spoken(random.end)}"


def _figures(groups: Sequence[Group]) -> list[Drawing]:
    figures = []
    for index, group in enumerate(groups):
        none = [*(row for row in group.rows if row.undefended), *harmless(groups, group)]
        for place, region in enumerate(group.regions or [""]):
            rows = [*none, *(row for row in group.rows if not row.undefended and row.about.region == region)]
            figures.append(plots.curves(f"curves-{index}-{place}", rows))
            if read := [row for row in rows if len(row.utility) > 1]:
                figures.append(plots.utility(f"utility-{index}-{place}", read))
        compared = [row for row in group.rows if not row.undefended and _known(row.prevented)]
        if compared:
            figures.append(plots.differences(f"differences-{index}", compared))
    return figures


def harmless(groups: Sequence[Group], group: Group) -> list[Defended]:
    """The undefended run of as many steps on harmless rows, asked alike: the control of one on others; none without."""
    if any(row.harmless for row in group.rows):
        return []
    ends = {row.about.step for row in group.rows if row.undefended}
    alike = [other for other in groups if (other.tuning, other.metric) == (group.tuning, group.metric)]
    return [row for other in alike for row in other.rows if row.harmless and row.about.step in ends]


def _scan(scan: LayerScan) -> tuple[str, int, list[tuple[str, int]]]:
    """The range in words, refusals without scaling, and (range in words, refusals) of all that were tried."""
    tried = [(f"layers {LayerRange(end.first, end.stop)}", end.refused) for end in (*scan.upper, *scan.lower)]
    return str(LayerRange(scan.first, scan.stop)), scan.dense, tried
