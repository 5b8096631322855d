"""What the report of fine-tuning attacks has of its own: defences by attack, curves over steps, differences, layers."""

import dataclasses

import pytest
from pages import Page
from runs import LABEL, NOTHING, RANKS, WEIGHTS, attack_run, attack_samples, replace

from jaxsafe.records.attack import Details
from jaxsafe.records.run import Difference, plain
from jaxsafe.report import attack, plots_attack
from jaxsafe.report.write import render


@pytest.fixture
def run():
    return attack_run()


def page_of(run, samples=()):
    return Page(render(run, samples)[0])


def kept(run, keep):
    return dataclasses.replace(run, table=tuple(row for row in run.table if keep(row)))


def test_whole_report(run):
    page = page_of(run, attack_samples())
    assert page.texts("h1") == ["Fine-tuning attacks on tiny-chat"]
    assert page.texts("h2") == [
        "What fine-tuning does",
        "Attack success by defence",
        "How fast safety goes",
        "What freezing is worth",
        "The frozen range of layers",
        "Answers side by side",
        "Settings",
    ]
    assert page.texts("p", **{"class": "result"}) == [
        "Fine-tuning (identity_shift n=10, full) raised attack success from 2% (0–12%) to 95% (85–100%), "
        "with 3% of answers broken (before 0%); "
        "of the defences freeze ranks k=100 left 40% (30–50%), its random control 93% (83–100%)."
    ]
    lines = page.texts("tr")
    assert any(line.startswith("before the attack 2.0%") for line in lines)
    frozen = next(line for line in lines if line.startswith(f"{LABEL}, full, freeze ranks k=100"))
    assert "17.0% kept; step 25 2 seeds" in frozen and "seeds 40%, 40%" in frozen and "110 +2.2%" in frozen
    assert "+55 (+43 to +67)" in frozen and "+53 (+41 to +65)" in frozen and "p " not in frozen.split("+55")[1]
    assert f"baseline: {LABEL}, full, none" in frozen
    pivot = next(line for line in lines if line.startswith("freeze ranks k=100"))
    assert "broken 3.0% answers 4.5 repeated 5%" in pivot, "beside every rate"
    assert any(text.startswith("Means over 2 seeds, each with one draw") for text in page.texts("p"))
    assert "17.0% kept" in pivot and "40.0%" in pivot and pivot.endswith("–")
    assert any("at random" in line and line.startswith("rewind random ranks") for line in lines)
    assert "layers 6 to 8 11" in lines and "layers 6 3" in lines
    assert "Layers 6 to 8, at which most" in " ".join(page.texts("p"))
    assert f"{LABEL}, full, none, seed 0 0.25" in lines, "the loss of what was trained"
    assert page.texts("p", **{"class": "text"}) == ["At once.", "I am sorry."]
    assert not any("step 5" in line for line in page.texts("tr")[: len(run.table)])
    # Two regions and one, each with its curves, and the differences of one way of training.
    assert len(page.all("svg")) == 2 * (2 + 1) + 1 + 1


def test_one_way_of_training_has_no_table_of_several(run):
    page = page_of(kept(run, lambda row: row.about["tuning"] != "lora"))
    assert "Attack success by defence" not in page.texts("h2") and page.texts("h3") == []


def test_parts_that_are_absent(run):
    nothing = dataclasses.replace(run, details=plain(Details((), {})))
    page = page_of(nothing)
    assert "The frozen range of layers" not in page.texts("h2") and "Training loss" not in page.texts("summary")
    start = kept(run, lambda row: row.about["tuning"] is None)
    assert page_of(start).texts("h2") == ["What fine-tuning does", "The frozen range of layers", "Settings"]


def test_unmeasured_numbers_are_dashes(run):
    none = Difference(None, None, None)
    unscored = {"asr_scans/persona": NOTHING, "refusal_scans/plain/safe": NOTHING}
    rows = [
        dataclasses.replace(
            row,
            perplexity=None,
            answer_perplexity=None,
            repetition=None,
            rates=unscored,
            seeds=dict.fromkeys(unscored, (None, None)),
            against_baseline=tuple(
                dataclasses.replace(c, difference=none, complied=none) for c in row.against_baseline
            ),
        )
        for row in run.table
    ]
    page = page_of(dataclasses.replace(run, table=tuple(rows)))
    assert page.texts("p", **{"class": "result"}) == [] and "– 40 unscored seeds –, –" in page.texts("td")
    assert "What freezing is worth" not in page.texts("h2")


def test_headline_without_control_or_defence(run):
    alone = kept(run, lambda row: row.about["defence"] == "none" and row.about["tuning"] is not None)
    said = attack.headline(attack.grouped(alone))
    assert (
        said
        == "Fine-tuning (identity_shift n=10, full) raised attack success to 95% (85–100%), with 3% of answers broken"
    )
    said = attack.headline(attack.grouped(kept(run, lambda row: not row.about["control"])))
    assert said.endswith("freeze ranks k=100 left 40% (30–50%), without a random control")


def test_figures_name_what_they_show(run):
    group = attack.grouped(run)[0]
    assert group.regions == [WEIGHTS, RANKS] and group.rows[0].undefended
    chosen = [row for row in group.rows if row.undefended or row.about.region == RANKS]
    page = Page(plots_attack.curves("x", chosen).inline)
    label = page.all("svg")[0][0]["aria-label"]
    assert "no defence: 2% at 0, 19% at 5, 95% at 25" in label and "random, rewound: 93% at 25" in label
    wanted = {"no defence", "frozen", "random, frozen", "rewound", "random, rewound", "training steps"}
    assert wanted <= set(page.texts("text"))
    page = Page(plots_attack.utility("z", chosen).inline)
    label = page.all("svg")[0][0]["aria-label"]
    assert "no defence: 108 at 0, 110 at 5, 110 at 25" in label and "rewound: 108 at 0, 110 at 25" in label
    assert {"perplexity", "training steps", "rewound"} <= set(page.texts("text"))
    page = Page(plots_attack.differences("y", group.rows[1:]).inline)
    assert {RANKS, WEIGHTS, "points of attack success prevented"} <= set(page.texts("text"))
    assert "freeze ranks k=100 56%" in page.all("svg")[0][0]["aria-label"]


def test_columns_of_no_record_are_refused(run):
    with pytest.raises(ValueError, match="no About: Object missing required field `attack`"):
        render(replace(run, f"before {LABEL}", about={}), [])


def test_each_attack_has_the_rate_of_its_own_setting(run):
    other = [
        dataclasses.replace(
            row,
            group=row.group.replace(LABEL, "benign n=10"),
            about=row.about | {"attack": "benign n=10"},
            rates={name.replace("persona", "vanilla"): found for name, found in row.rates.items()},
        )
        for row in run.table
    ]
    both = dataclasses.replace(run, table=(*run.table, *other))
    first, second = (group for group in attack.grouped(both) if group.tuning == "full")
    assert (first.metric, second.metric) == ("asr_scans/persona", "asr_scans/vanilla")
    assert first.start == second.start == run.table[0].rates["asr_scans/persona"]
    assert [row.end for row in first.rows] == [row.end for row in second.rows]
    label = next(figure for figure in render(both, [])[1] if figure.name == "outcomes").inline
    assert label.count("complied,") == 2 * sum(row.about["last"] is not False for row in run.table)
