"""The report of any run: self-contained, escaped, whole or absent, and true to the run it was made from."""

import base64
import dataclasses
import functools
import hashlib
import json
import re

import matplotlib
import pytest
from pages import NASTY, Page
from runs import RUNS, SAMPLES, brittleness_run, other_run, other_samples, replace, row, sample, save, scans_run

from jaxsafe.records.run import Run, Sample, Scored, from_json, plain
from jaxsafe.report import plots, write
from jaxsafe.report.style import DARK, LIGHT
from jaxsafe.report.write import render, write_report

TASKS = tuple(RUNS)


def page_of(run, samples=()):
    return Page(render(run, samples)[0])


@functools.cache
def rendered(task):
    return render(RUNS[task](), SAMPLES[task]())


def renamed(record, names, kind):
    """`record` with every string and key that is in `names` replaced."""

    def walk(value):
        if isinstance(value, dict):
            return {names.get(key, key): walk(item) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item) for item in value]
        return names.get(value, value) if isinstance(value, str) else value

    return from_json(walk(plain(record)), kind)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_files_of_a_run(tmp_path, task):
    path = write_report(str(save(tmp_path, RUNS[task](), SAMPLES[task]())))
    assert path == tmp_path / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    figures = sorted(file.name for file in (tmp_path / "figures").iterdir())
    names = sorted(attributes["id"].removeprefix("fig-") for attributes, _ in page.all("figure"))
    assert figures == sorted(f"{name}.{end}" for name in names for end in ("svg", "pdf"))
    for name in names:
        assert "var(" not in (tmp_path / "figures" / f"{name}.svg").read_text(), "a file of its own needs real colours"
        assert (tmp_path / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    tables = ["comparisons.csv", "comparisons.tex", "results.csv", "results.tex"]
    assert sorted(file.name for file in (tmp_path / "tables").iterdir()) == tables
    write_report(tmp_path)
    assert sorted(file.name for file in (tmp_path / "figures").iterdir()) == figures


def test_page_of_a_task_that_no_page_knows():
    page = page_of(other_run(), other_samples())
    assert page.texts("h1") == ["Ablation on tiny-chat"]
    assert page.texts("h2") == [
        "Refusals of the same prompts",
        "What each variant does",
        "Answers side by side",
        "Settings",
    ]
    assert page.texts("p", **{"class": "result"}) == [
        "Refusals of harmful prompts fell from 95% to 40% (n = 100, p = 0.021); "
        "broken answers 0% → 1%; perplexity went from 10 to 11 (+10.0%); "
        "its random control refused 93% (83–100%) of harmful prompts, p = 0.5."
    ]
    facts = dict(zip(page.texts("dt"), page.texts("dd"), strict=True))
    assert facts["Device"] == "8 x TPU v4" and facts["Judge"] == "scans 1"
    assert facts["Date"] == "2025-03-01 12:30 UTC" and facts["Model"] == "bfloat16, 32 layers"
    heads = ["Variant", "Perplexity", "Attack success, vanilla", "Accuracy, boolq", "harm score"]
    tests = ["Refusal less baseline’s, points", "Refusal less control’s, points"]
    assert page.texts("th", scope="col")[4:11] == heads + tests
    lines = page.texts("tr")
    assert any(
        line.startswith("ablated 0 of the headline rank 1; 2% of the weights removed 11 +10.0%") for line in lines
    )
    assert any(line.startswith("random 0 control; rank 1") for line in lines)
    assert "−55 (−67 to −43) p = 0.021 57 stopped, 2 started refusing" in page.texts("td")
    assert "efefef" in "".join(page.texts("small")) and "scores.n" in page.texts("th")
    assert "prompts as they are, greedy answers" in page.texts("dd")


def test_rows_left_out_are_told_by_side():
    run = dataclasses.replace(brittleness_run(), scored=(Scored("safety", 60, 41, 32, "scans"),))
    assert "safety601932scans" in page_of(run).texts("tr")


def test_a_run_of_a_single_variant():
    run = dataclasses.replace(other_run(), table=other_run().table[:1], results=other_run().results[:1])
    page = page_of(run, [sample("plain")])
    assert page.texts("h2") == ["What each variant does", "Answers side by side", "Settings"]
    assert page.texts("p", **{"class": "result"}) == [] and page.all("svg") == []


def test_a_run_of_nothing():
    run = dataclasses.replace(other_run(), table=(), results=(), config={}, datasets=(), timings={}, files={})
    assert page_of(run).texts("h2") == ["Settings"]


def test_many_groups_are_compared_in_numbers_alone():
    few, many = page_of(other_run(3)), page_of(other_run(4))
    assert few.texts("h3") == ["ablated 0", "ablated 1", "ablated 2"] and len(few.all("svg")) == 3
    assert many.all("svg") == [] and "All comparisons" in many.texts("summary")
    assert many.texts("p", **{"class": "result"})[0].startswith("ablated 3: refusals of harmful prompts fell from 95%")


def test_comparisons_beyond_the_limit_are_left_to_the_table(monkeypatch):
    monkeypatch.setattr(write, "LISTED", 5)
    assert "5 of 12 are shown here, all are in tables/comparisons.csv." in page_of(other_run(4)).texts("p")


def test_seeds_and_damaged_models_are_said_in_words():
    run = brittleness_run()
    rates = run.table[1].rates
    seeds = row("x", rates, ("x 0", "x 1"), perplexity=900.0, baseline="dense")
    page = page_of(dataclasses.replace(run, table=(*run.table[:1], seeds)))
    assert any(line.startswith("x damaged 2 seeds 900 90 times") for line in page.texts("tr"))
    assert "99.0% 89.0–100.0% seeds 99%, 99%" in page.texts("td")


def test_unmeasured_numbers_are_dashes():
    nothing = {"perplexity": None, "answer_perplexity": None, "repetition": None, "rates": {}, "seeds": {}}
    run = replace(other_run(), "ablated 0", **nothing)
    run = dataclasses.replace(run, results=tuple(dataclasses.replace(r, perplexity_tokens=0) for r in run.results))
    page = page_of(run)
    assert any(line.startswith("ablated 0 of the headline") and " – – – – " in line for line in page.texts("tr"))


@pytest.mark.parametrize("task", TASKS)
def test_untrusted_text_stays_text(task):
    run, samples, text = RUNS[task](), SAMPLES[task](), " ".join(NASTY)
    plain_page = Page(rendered(task)[0])
    names = dict.fromkeys(("tiny-chat", "8 x TPU v4", "lookalike", "scans 1", "safe_targets", "builtin prose"), text)
    groups = {name: f"{i} {text}" for i, row in enumerate(run.table) for name in (row.group, *row.variants)}
    names |= groups | {"harmful (harmful)": text, "lookalike (safe)": text, "asr_scans/vanilla": f"asr_scans/{text}"}
    names["broken/vanilla"] = f"broken/{text}"
    names |= {"ranks k=100": text, "set difference (snip)": text, "q": text, " reject": text, "middle": text}
    page = page_of(renamed(run, names, Run), [renamed(one, names, Sample) for one in samples])
    assert page.all("title")[0][1].endswith(text)
    assert not page.all("img")
    assert not [name for _, attributes, _ in page.elements for name in attributes if name.startswith("on")]
    for tag in ("svg", "b", "style", "tr", "section", "table", "script", "details"):
        assert len(page.all(tag)) == len(plain_page.all(tag)), tag


def test_untrusted_answers_stay_text():
    samples = [
        sample(name, nasty, True, prompt=nasty, kind=nasty, set=nasty, setting=nasty)
        for nasty in NASTY
        for name in ("plain", "ablated 0", "random 0")
    ]
    page = page_of(other_run(), samples)
    assert [found for _, found in page.all("p", **{"class": "prompt"})] == NASTY
    assert [found for _, found in page.all("p", **{"class": "text"})][::2] == NASTY
    for field in ("kind", "set", "setting"):
        assert {a[f"data-{field}"] for a, _ in page.all("tr") if f"data-{field}" in a} == set(NASTY)
    assert [attributes.get("type") for attributes, _ in page.all("script")] == ["application/json", None]
    data = json.loads(page.all("script")[0][1])
    assert [[cell[0] for cell in answered] for answered in data["answers"]] == [[nasty] * 3 for nasty in NASTY]


def test_lone_surrogate_is_written(tmp_path):
    run = dataclasses.replace(other_run(), config={"note \ud83d": "half \ud83d"})
    save(tmp_path, run, [sample("plain", prompt="half \ud83d a pair", text="all of \U0001f600")])
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "half \ufffd a pair" in text and "all of \U0001f600" in text and "note \ufffd" in text


@pytest.mark.parametrize("task", TASKS)
def test_self_contained(task):
    text, _ = rendered(task)
    page = Page(text)
    for tag, attributes, _ in page.elements:
        for name in {"src", "href", "action", "data", "poster", "srcset", "xlink:href"} & set(attributes):
            assert attributes[name].startswith("#") or attributes[name] == "data:,", (tag, attributes)
    assert set(re.findall(r"url\((.)", text)) <= {"#"} and "@import" not in text and "@font-face" not in text
    (policy,) = (a["content"] for a, _ in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    (script,) = (found for attributes, found in page.all("script") if "type" not in attributes)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none';") and f"script-src 'sha256-{digest}';" in policy


@pytest.mark.parametrize("task", TASKS)
def test_ids_are_unique_and_resolve(task):
    text, figures = rendered(task)
    page = Page(text)
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    inside = re.findall(r'(?:href="#|url\(#|aria-labelledby="|for=")([^")]+)', text)
    assert len(page.all("svg")) == len(figures) and len(inside) > 5 and set(inside) <= set(ids)
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes, _ in page.all("svg"))
    targets = [attributes["href"].removeprefix("#") for attributes, _ in page.all("a")]
    assert targets == [attributes["id"] for attributes, _ in page.all("section")]
    assert len(page.all("style")) == 1


def test_script_finds_what_it_looks_for():
    page = page_of(other_run(), other_samples())
    ids = {attributes["id"] for _, attributes, _ in page.elements if "id" in attributes}
    wanted = set(re.findall(r'getElementById\("(\w+)"\)', page.all("script")[1][1]))
    assert wanted == {"samples", "filter", "more", "order", "tried", "answers"} <= ids and {"first", "second"} <= ids


@pytest.mark.parametrize("task", TASKS)
def test_same_run_same_report(task):
    assert rendered(task) == render(RUNS[task](), SAMPLES[task]())


@pytest.mark.parametrize("task", TASKS)
def test_figures_follow_the_colour_scheme(task):
    text, _ = rendered(task)
    svgs = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    rest = re.sub(r"var\(--\w+, #[0-9a-f]{6}\)|url\(#[^)]*\)|href=\"#[^\"]*\"", "", svgs)
    assert svgs and re.findall(r"#[0-9a-f]{6}\b", rest) == []


def test_figures_leave_the_settings_of_matplotlib():
    before = dict(matplotlib.rcParams)
    svg = plots.rate_bars("rates", scans_run().table[1].against_baseline).inline
    assert dict(matplotlib.rcParams) == before
    assert f"fill: var(--safe, {LIGHT['safe']})" in svg
    assert LIGHT.keys() == DARK.keys() and len(set(LIGHT.values())) == len(LIGHT)


@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_contrast_of_text(palette):
    def luminance(color):
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    paper = luminance(palette["paper"])
    for role in ("ink", "muted", "safe", "harmful"):
        low, high = sorted((luminance(palette[role]), paper))
        assert (high + 0.05) / (low + 0.05) >= 4.5, role


def test_failed_writing_leaves_the_old_report(tmp_path, monkeypatch):
    folder = save(tmp_path / "run", other_run(), other_samples())
    path = write_report(folder)
    path.write_text("old")
    names = sorted(file.name for file in folder.rglob("*"))

    def full_disk(*_, **__):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", full_disk)
        with pytest.raises(OSError, match="no space"):
            write_report(folder)
    assert path.read_text() == "old" and sorted(file.name for file in folder.rglob("*")) == names
    write_report(folder)
    assert path.read_text() != "old" and sorted(file.name for file in folder.rglob("*")) == names


@pytest.mark.parametrize("task", ["scans", "brittleness", "attack"])
def test_details_of_another_task_are_refused(tmp_path, task):
    save(tmp_path, dataclasses.replace(other_run(), task=task))
    with pytest.raises(ValueError, match="these details are no Details"):
        write_report(tmp_path)
    assert [file.name for file in tmp_path.iterdir() if file.name == "report.html"] == []


def test_bad_run_and_bad_sample_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run\.json is missing"):
        write_report(tmp_path)
    save(tmp_path, other_run(), [sample("plain")])
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write("\n{oops\n")
    with pytest.raises(ValueError, match=r"samples\.jsonl, line 3"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text('{"schema": 1}')
    with pytest.raises(ValueError, match="schema 1"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
