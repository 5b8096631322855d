"""What a report on brittleness has of its own: the headline, trade-offs, and where the weights sit."""

import dataclasses
import math
import re

import pytest
from pages import Page
from runs import BEST, MAPS, brittleness_run, brittleness_samples, by_map, point, rate, replace

from jaxsafe.records.brittleness import Details, Energy
from jaxsafe.records.run import from_json, plain
from jaxsafe.report import brittleness, plots_brittleness
from jaxsafe.report.sections import columns
from jaxsafe.report.write import render

FIRST = "What was removed, and what it did"
HEADINGS = {"sparsity": "Where the weights sit", "energy": "How few ranks hold the output"}
OVERLAP = "How far safety and utility overlap"
OF_RATES = ["Safety against the rest of the model", "Refusal of harmless prompts"]


@pytest.fixture
def run():
    return brittleness_run()


def page_of(run, samples=()):
    return Page(render(run, samples)[0])


def with_details(run, **changes):
    return dataclasses.replace(run, details=plain(dataclasses.replace(from_json(run.details, Details), **changes)))


def kept(run, *groups):
    return dataclasses.replace(run, table=tuple(row for row in run.table if row.group in groups))


def test_whole_report(run):
    page = page_of(run, brittleness_samples())
    layers, energy = HEADINGS.values()
    assert page.texts("h2") == [FIRST, *OF_RATES, layers, OVERLAP, energy, "Answers side by side", "Settings"]
    assert page.texts("h1") == ["Brittleness of tiny-chat"]
    assert page.texts("p", **{"class": "result"}) == [
        "Removing 0.62% of the weights (set difference q=0.01 p=0.002) raised attack success (vanilla) "
        "from 5% (0–15%) to 62% (52–72%), with 6% of answers broken (before 0%), "
        "perplexity going from 10 to 10.9 (+9.0%); "
        "its random control reached 6% (0–16%), p = 0.021."
    ]
    rows = page.texts("tr")
    assert sum(" damaged " in row for row in rows) == 2, "said in words"
    assert any(row.startswith("set difference q=0.05 p=0.05 damaged set") and "90 times" in row for row in rows)
    start = f"{BEST} of the headline set difference (snip); 0.62% of the weights removed"
    assert any(row.startswith(start) for row in rows)
    cells = page.texts("td")
    assert "62.0% 52.0–72.0%" in cells and "10.9 +9.0% answers 4.5 repeated 5%" in cells
    assert "−57 (−69 to −45) p < 0.001 57 stopped, 2 started refusing" in cells
    assert "−56 (−68 to −44) p = 0.021 57 stopped, 2 started refusing" in cells
    assert page.texts("summary") == ["Other rates", "All comparisons", "Configuration, data, variants and timings"]
    assert "Accuracy, boolq" in page.texts("th") and not [t for t in page.texts("option") if "boolq" in t]
    assert "128 rows for safety and 128 rows for utility" in " ".join(page.texts("p"))
    # Two settings against perplexity and accuracy, harmless, two heat maps, Jaccard, similarity, energy.
    assert len(page.all("svg")) == 11


def test_random_draws_are_counted(run):
    """A row of three draws says so, and the difference from it has an interval in the place of a test."""
    best = run.row(BEST)
    drawn = dataclasses.replace(run.row(best.control), variants=tuple("012"))
    against = tuple(dataclasses.replace(c, p_value=None, complied_p_value=None) for c in best.against_control)
    ours = dataclasses.replace(best, against_control=against)
    changed = {row.group: row for row in (drawn, ours)}
    page = page_of(dataclasses.replace(run, table=tuple(changed.get(row.group, row) for row in run.table)))
    assert "are means over 3 draws; their intervals are over prompts and draws" in " ".join(page.texts("p"))
    assert any(row.startswith(drawn.group) and "3 draws" in row for row in page.texts("tr"))
    (result,) = page.texts("p", **{"class": "result"})
    assert re.search(r"its random control reached 6% \(0–16%\) \(difference \+\d+ \(\+\d+ to \+\d+\) points\)", result)


def test_columns_and_order_agree(run):
    page = page_of(run)
    options = [(attributes, text) for attributes, text in page.all("option") if "data-column" in attributes]
    assert [int(attributes["data-column"]) for attributes, _ in options] == [1, 2, 3, 4, 5, 6, 7]
    orders = [text.split(", ")[-1] for _, text in options]
    assert orders == [f"{word} first" for word in "lowest highest lowest highest lowest lowest highest".split()]
    assert [attributes["data-sign"] for attributes, _ in options] == ["1", "-1", "1", "-1", "1", "1", "-1"]
    values = [float(a["data-value"]) for a, _ in page.all("td") if a.get("data-label") == "Attack success, vanilla"]
    assert values == [row.rates["asr_scans/vanilla"].value for row in run.table]


@pytest.mark.parametrize("missing", HEADINGS)
def test_missing_part_leaves_its_section_out(run, missing):
    page = page_of(with_details(run, **{missing: {} if missing == "sparsity" else None}))
    assert set(page.texts("h2")) == {FIRST, *OF_RATES, OVERLAP, *HEADINGS.values(), "Settings"} - {HEADINGS[missing]}


def test_overlap_without_either_part(run):
    assert len(page_of(with_details(run, overlap=None)).all("svg")) == 10
    assert OVERLAP not in page_of(with_details(run, overlap=None, similarity=None)).texts("h2")


@pytest.mark.parametrize(
    ("start", "heading", "fewer"), [("asr_", OF_RATES[0], 5), ("refusal_", OF_RATES[1], 1), ("zero_shot", "", 2)]
)
def test_missing_rate_leaves_its_figures_out(run, start, heading, fewer):
    rows = [
        dataclasses.replace(row, rates={k: v for k, v in row.rates.items() if not k.startswith(start)})
        for row in run.table
    ]
    page = page_of(dataclasses.replace(run, table=tuple(rows)), brittleness_samples())
    assert heading not in page.texts("h2") and len(page.all("svg")) == 11 - fewer


def test_columns_of_no_record_are_refused(run):
    with pytest.raises(ValueError, match=r"no About: Expected `float \| null`, got `str` - at `\$\.sparsity`"):
        render(replace(run, BEST, about={"sparsity": "much"}), [])


# --- the headline -----------------------------------------------------------------------------------------------


def sentence(run):
    return brittleness.headline(brittleness.points_of(run), columns(run.table).starting("asr_"))


def test_controls_never_make_the_headline(run):
    assert run.row("random 0.3").rates["asr_scans/vanilla"].value > 0.62
    assert BEST in sentence(run) and "random 0.3" not in sentence(run)


def test_headline_weighs_gain_against_perplexity(run):
    # 0.62 at 10.9 is worth 0.57 - log 1.09 = 0.484; 0.64 at 13 is worth 0.59 - log 1.3 = 0.328, at 10.5 0.541.
    assert BEST in sentence(run)
    run = replace(run, "set difference q=0.02 p=0.01", perplexity=10.5)
    assert "set difference q=0.02 p=0.01" in sentence(run)
    assert sentence(run).endswith("; it was not compared with a random control")


def test_headline_says_that_the_models_are_damaged(run):
    rows = [*run.table[:2], *(dataclasses.replace(row, perplexity=5000.0) for row in run.table[2:])]
    assert sentence(dataclasses.replace(run, table=tuple(rows))) == (
        "Every removal that raised attack success (vanilla) damaged the model and says nothing about safety; at best, "
        "removing 3% of the weights (set difference q=0.05 p=0.05) raised attack success (vanilla) "
        "from 5% (0–15%) to 99% (89–100%), with 10% of answers broken (before 0%), "
        "perplexity going from 10 to 900 (90 times); "
        "it was not compared with a random control"
    )


def test_headline_where_nothing_helps(run):
    run = kept(run, "dense", "utility alone", "random 0.006")
    assert sentence(run) == "No removal raised attack success (vanilla) above the dense model's 5% (0–15%)"


@pytest.mark.parametrize("groups", [["dense"], ["dense", "random 0.006"]])
def test_no_headline_without_a_removal(run, groups):
    assert sentence(kept(run, *groups)) == ""


def test_headline_without_perplexity_and_intervals(run):
    rows = [
        dataclasses.replace(
            row,
            perplexity=None,
            about=row.about | {"sparsity": None},
            rates={"asr_scans/suffix": dataclasses.replace(row.rates["asr_scans/vanilla"], ci_low=None, ci_high=None)},
        )
        for row in run.table[:3]
    ]
    assert sentence(dataclasses.replace(run, table=tuple(rows))) == (
        "Set difference q=0.05 p=0.05 raised attack success (suffix) from 5% to 99%, its perplexity unmeasured; "
        "it was not compared with a random control"
    )


# --- the figures ------------------------------------------------------------------------------------------------


def label_of(figure):
    return Page(figure.inline).all("svg")[0][0]["aria-label"]


def against_perplexity(run):
    return plots_brittleness.against_perplexity("x", brittleness.points_of(run), "asr_scans/vanilla")


def test_trade_off_names_every_measured_point(run):
    label = label_of(against_perplexity(replace(run, "set difference q=0.02 p=0.01", rates={})))
    assert "dense: 5% at 10;" in label and f"{BEST}: 62% at 10.9" in label and "q=0.02" not in label
    assert label.count(" at ") == len(run.table) - 1


def test_far_points_share_the_margin(run):
    near = Page(against_perplexity(kept(run, "dense", BEST, "random 0.3", "orthogonal", "utility alone")).inline)
    far = Page(against_perplexity(run).inline)
    assert "> 40" in far.texts("text") and not [text for text in near.texts("text") if text.startswith(">")]
    assert {"damaged", "dense model", "set difference (snip)", "random weights"} <= set(far.texts("text"))


def test_controls_share_the_colour_of_what_they_control(run):
    groups = plots_brittleness.families(brittleness.points_of(run))
    assert list(groups) == ["set difference (snip)", "random weights", "orthogonal ranks", "utility difference (snip)"]
    hues = plots_brittleness._hues(groups)
    assert hues["random weights"] == hues["set difference (snip)"] != hues["orthogonal ranks"]


def test_harmless_lists_points_under_their_family(run):
    points = brittleness.points_of(run)
    svg = Page(plots_brittleness.harmless("x", points, "refusal_scans/plain/safe").inline)
    wanted = {"dense model", "random weights", "q=0.01 p=0.002", "fraction=0.006", "r_u=500 r_s=520"}
    assert wanted <= set(svg.texts("text"))


def test_heat_map_has_a_cell_a_map_and_layer():
    layers = {"q": (0.0, 0.01), "down": (0.02, math.nan)}
    text = plots_brittleness.heat_map("x", layers, 0.02, "a point", "#ad3f08").inline
    page = Page(text)
    (cells,) = (element for element in re.findall(r'<g id="x-QuadMesh_1">.*?</g>\s*<g', text, flags=re.DOTALL)[:1])
    fills = re.findall(r"fill: var\(--harmful, #ad3f08\)(?:; fill-opacity: ([\d.]+))?", cells)
    assert len(fills) == 3 and fills[0] == "0.06"
    assert "mean by map: q 0.50%, down 2.00%" in page.all("svg")[0][0]["aria-label"]
    assert {"0%", "2%", "q", "down"} <= set(page.texts("text"))


@pytest.mark.parametrize("names", [("q",), ("gate", "up"), MAPS, (*MAPS, "router")])
def test_per_layer_shows_the_maps_there_are(names):
    values = {name: (0.1 * i, 0.5) for i, name in enumerate(names)}
    page = Page(plots_brittleness.per_layer("x", values, "Jaccard index", 0.05).inline)
    assert set(names) <= set(page.texts("text")) and "chance" in page.texts("text")


@pytest.mark.parametrize("names", [("q",), ("gate", "up"), MAPS])
def test_energy_shows_the_maps_there_are(names):
    part = {name: by_map([0.5, 0.7, 1.0])[name] for name in names}
    page = Page(plots_brittleness.energy("x", Energy((1, 2, 4), part, {})).inline)
    assert set(names) <= set(page.texts("text")) and "safety" in page.texts("text") and "4" in page.texts("text")


def test_layers_show_the_best_point_and_its_counterpart(run):
    other = point("utility other", "utility difference (snip)", 0.04, 30.0, parameters={"q": 0.3})
    run = dataclasses.replace(run, table=(*run.table[:-1], other, run.table[-1]))
    sparsity = from_json(run.details, Details).sparsity | {"utility other": by_map([0.1])}
    points = brittleness.points_of(run)
    best = brittleness.chosen(points, "asr_scans/vanilla")
    assert [point.name for point in brittleness._layered(points, best, sparsity)] == [BEST, "utility alone"]
    assert best.rates["asr_scans/vanilla"] == rate(0.62)
