"""What a report of attacks that leave the weights alone has of its own."""

import dataclasses

import pytest
from pages import Page
from runs import new_run, rate, row, sample

from jaxsafe.records.jailbreak import About, Begun, Details, Tries
from jaxsafe.report.write import render

SWEEP = Tries("decoding", False, 3, 1, rate(0.2, 180), rate(0.5, 60), rate(0.1), rate(0.1), rate(0.3, 40), rate(0.05))
DRAWS = Tries("decoding", True, 3, 1, rate(0.15, 180), rate(0.4, 60), rate(0.0), rate(0.1), rate(0.2, 40), rate(0.0))
DETAILS = Details(
    {"prefill": "arXiv 2406.05946", "decoding": "arXiv 2310.06987"},
    (SWEEP, DRAWS),
    (Begun("prefill 'Sure'", "Sure", rate(0.7, 60), rate(0.6, 60)),),
    "direction after block 9",
    "built-in prose",
)


def rates(complied, broken=0.0):
    return {
        "asr_scans/jailbreak": rate(complied, 60),
        "unrefused_scans/jailbreak": rate(complied + broken, 60),
        "broken/jailbreak": rate(broken, 60),
        "refusal_scans/plain/safe": rate(0.1, 40),
    }


def attempt(name, complied, attack, control=None, **more):
    about = About(attack, more.pop("is_control", False))
    return row(
        name, rates(complied, more.pop("broken", 0.0)), about=about, control=control, baseline="plain request", **more
    )


TABLE = [
    row("plain request", rates(0.02), about=About("")),
    attempt("prefill 'Sure'", 0.7, "prefill", "neutral prefill", perplexity=None, broken=0.1),
    attempt("neutral prefill", 0.3, "prefill", is_control=True, perplexity=None),
    attempt("layers 1 x 0.5", 0.9, "scaling", perplexity=90.0),
    *(attempt(f"temperature {t}", 0.2, "decoding", perplexity=None) for t in range(3)),
]


def page_of(table=TABLE, details=DETAILS):
    run = new_run("jailbreak", table, details)
    read = [dataclasses.replace(r, perplexity_tokens=512 if r.perplexity is not None else 0) for r in run.results]
    text, figures = render(dataclasses.replace(run, results=tuple(read)), [sample("plain request")])
    return Page(text), {figure.name: figure for figure in figures}


@pytest.fixture(scope="module")
def usual():
    """The page of the usual table, and its figures."""
    return page_of()


def test_the_headline_is_about_the_strongest_model_that_is_whole_beside_its_control(usual):
    (result,) = usual[0].texts("p", **{"class": "result"})
    assert "most successful of 5 attempts (prefill 'Sure')" in result
    assert "from 2% (0–12%) to 70% (60–80%), with 10% of answers broken (before 0%)" in result
    assert "its control reached 30% (20–40%)" in result
    assert "worst of 3 tries of decoding reached 50% (40–60%), of 3 tries of its control 40% (30–50%)" in result


def test_the_figure_says_what_every_attempt_and_the_worst_of_all_tries_reach(usual):
    said = usual[1]["reached"].inline
    assert "prefill 'Sure' 70% complied, 10% broken; neutral prefill 30% complied" in said
    assert "temperature 2 20% complied, 0% broken; decoding, worst of 3 50% complied" in said
    assert "control, worst of 3 40% complied" in said


def test_a_long_sweep_is_drawn_as_its_worst_case_and_listed_in_the_table():
    table = TABLE[:4] + [attempt(f"top-k {k}", 0.2, "decoding", perplexity=None) for k in range(13)]
    page, figures = page_of(table)
    assert "top-k" not in figures["reached"].inline and "decoding, worst of 3" in figures["reached"].inline
    assert any("top-k 12" in text for text in page.texts("th"))


def test_what_is_judged_stands_apart_for_what_follows_and_the_whole(usual):
    page, _ = usual
    assert page.texts("h2")[1:4] != [] and "Answers with an opening" in page.texts("h2")
    cells = " ".join(page.texts("td"))
    assert "70.0%" in cells and "60.0%" in cells


def test_a_run_of_single_tries_has_no_such_sections():
    page, figures = page_of(TABLE[:3], Details({"prefill": "p"}, (), (), "", "built-in prose"))
    assert not {"Several tries at each prompt", "Answers with an opening"} & set(page.texts("h2"))
    assert "worst" not in figures["reached"].inline
