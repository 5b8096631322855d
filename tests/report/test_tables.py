"""The tables of a run as CSV, as LaTeX and in the terminal."""

import csv
import dataclasses
import io

import pytest
from rich.console import Console
from runs import BEST, NOTHING, RUNS, brittleness_run, other_run, rate, replace, scans_run

from jaxsafe.records.run import Scored
from jaxsafe.report import tables
from jaxsafe.report.terminal import percent, result_table, scored_lines


def rows_of(run, name):
    return list(csv.DictReader(io.StringIO(tables.files(run)[name])))


def test_results_as_csv():
    rows = rows_of(brittleness_run(), "results.csv")
    assert [row["group"] for row in rows] == [row.group for row in brittleness_run().table]
    best = next(row for row in rows if row["group"] == BEST)
    assert float(best["asr_scans/vanilla.value"]) == 0.62 and best["asr_scans/vanilla.n"] == "100"
    assert best["about.sparsity"] == "0.0062" and best["about.parameters"] == '{"q":0.01,"p":0.002}'
    assert best["baseline"] == "dense" and best["perplexity"] == "10.9" and best["about.ranks"] == ""


def test_comparisons_as_csv():
    rows = rows_of(other_run(), "comparisons.csv")
    assert [(row["group"], row["against"], row["first"]) for row in rows] == [
        ("ablated 0", "baseline", "plain"),
        ("ablated 0", "control", "random 0"),
        ("random 0", "baseline", "plain"),
    ]
    assert float(rows[0]["difference.value"]) == pytest.approx(-0.55) and rows[1]["p_value"] == "0.5"
    assert rows_of(dataclasses.replace(other_run(), table=()), "comparisons.csv") == []


@pytest.mark.parametrize("task", list(RUNS))
def test_every_row_of_a_latex_table_has_its_columns(task):
    for name in ("results.tex", "comparisons.tex"):
        first, *lines, last, end = tables.files(RUNS[task]())[name].split("\n")
        columns = len(first.removeprefix(r"\begin{tabular}{").removesuffix("}"))
        assert last == r"\end{tabular}" and end == ""
        rows = [line for line in lines if line != r"\hline"]
        assert rows and {row.replace(r"\&", "").count(" & ") for row in rows} == {columns - 1}
        assert all(row.endswith(r" \\") for row in rows)


def test_latex_escapes_names():
    run = scans_run()
    nasty = "a_b & 50% $x$ #1 {y} \\input{z} ~ ^ < >\n"
    run = dataclasses.replace(run, table=(dataclasses.replace(run.table[0], group=nasty),))
    line = next(line for line in tables.files(run)["results.tex"].split("\n") if line.startswith("a b"))
    escaped = r"a b \& 50\% \$x\$ \#1 \{y\} \textbackslash{}input\{z\} \textasciitilde{} \textasciicircum{} "
    assert line.startswith(escaped + r"\textless{} \textgreater{}  & 1.0 {[}0.0, 11.0]")


def test_percent():
    assert percent(rate(0.12)) == "12% [2, 22]" and percent(rate(0.125), 1) == "12.5% [2, 22]"
    assert percent(NOTHING) == percent(None) == "-"


def shown(run, *about):
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(result_table(run, about or None))
    return console.export_text()


@pytest.mark.parametrize("task", list(RUNS))
def test_terminal_table_is_80_wide_and_whole(task):
    text = shown(RUNS[task]())
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text and "tiny-chat" in text


def test_terminal_table_of_one_pair():
    text = shown(scans_run())
    assert "31.0% [21, 41]" in text and "3e-07" in text and "10.5 (+5.0%)" in text


def test_terminal_table_of_many_groups():
    text = shown(brittleness_run())
    assert "(0.62%)" in text and "(56.5" in text and "62% [52, 72]" in text and "−57, p<0.001" in text
    line = next(line for line in shown(other_run(2), "rank").splitlines() if line.strip().startswith("ablated 1"))
    assert line.split() == ["ablated", "1", "2", "70%", "[60,", "80]", "11.0", "−65,", "p=0.021"]


@pytest.mark.parametrize("task", ["brittleness", "attack"])
def test_terminal_table_has_three_lines_a_variant_at_most_and_controls_below_what_they_belong_to(task):
    run = RUNS[task]()
    lines = shown(run).splitlines()
    numbers = [line for line in lines if "% [" in line]
    assert len(numbers) > 5 and len(lines) <= 6 + 3 * len(numbers)
    assert not any("random" in line for line in lines if "  random control" not in line and "random 0." not in line)


def test_terminal_table_leaves_out_steps_before_the_last():
    assert "step 5" not in shown(RUNS["attack"]())


def test_rows_left_out_are_told_by_side():
    sides = (Scored("safety", 60, 41, 32, "scans"), Scored("utility", 50, 48, 48, "scans"))
    run = dataclasses.replace(brittleness_run(), scored=sides)
    assert scored_lines(run) == [
        "  safety: scores of 32 rows; 19 of 60 prompts left out, whose answer does not refuse (scans)",
        "  utility: scores of 48 rows; 2 of 50 prompts left out, whose answer refuses or is blank (scans)",
    ]
    assert scored_lines(brittleness_run()) == []


def test_terminal_table_of_unmeasured_numbers():
    run = replace(other_run(3), "ablated 1", rates={}, perplexity=None, against_baseline=())
    line = next(line for line in shown(run).splitlines() if line.strip().startswith("ablated 1"))
    assert line.split() == ["ablated", "1", "(2%)", "-", "-", "-"]


def test_judge_tokens_and_draws_are_beside_every_rate():
    run = RUNS["attack"]()
    rows = rows_of(run, "results.csv")
    assert {(row["judge"], row["new_tokens"]) for row in rows} == {(run.judge.name, str(run.new_tokens))}
    assert [row["variants"] for row in rows] == [str(len(row.variants)) for row in run.table]
    head = next(line for line in tables.files(run)["results.tex"].split("\n") if line.startswith("Variant"))
    assert head.startswith(f"Variant (judge {run.judge.name}, {run.new_tokens} new tokens) & ") and "& Seeds" in head
