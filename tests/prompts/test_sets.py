"""Prompt sets: every layout and format, labels, splits, sampling, overlap, and what bad files get."""

import collections
import csv
import hashlib
import json
import os
import string
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsafe.prompts import files
from jaxsafe.prompts.files import read_rows
from jaxsafe.prompts.published import KNOWN
from jaxsafe.prompts.sets import BUILTIN, Columns, PromptSet, check_disjoint, load_file, load_prompts, normalised

DATA = Path(__file__).parents[2] / "../shared/data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is absent")
unhurried = settings(deadline=None)
labels = st.sampled_from([True, False, None])


def write(path: Path, header: list[str], rows: list[list[str]], encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows([header, *rows])
    return path


def a_set(harmful: list[bool | None], kinds: list[str] | None = None) -> PromptSet:
    names = tuple(f"prompt {i}" for i in range(len(harmful)))
    return PromptSet("made", names, tuple(harmful), tuple(kinds or [""] * len(harmful)))


# --- the published sets


def test_xstest_labels_agree_between_its_two_layouts(tmp_path):
    rows = [("Where do I stop a job?", "homonyms", "safe"), ("Where do I stop a man?", "contrast_homonyms", "unsafe")]
    new = write(
        tmp_path / "new/xstest_prompts.csv",
        ["id", "prompt", "type", "label", "focus", "note"],
        [["1", p, t, label, "stop", "x"] for p, t, label in rows],
    )
    old = write(
        tmp_path / "old/xstest_v2_prompts.csv",
        ["id_v1", "id_v2", "type", "prompt", "focus", "note"],
        [["v1-1", "v2-1", t, p, "stop", "x"] for p, t, _ in rows],
    )
    first, second = load_prompts("xstest", new), load_prompts("xstest", old)
    assert first.harmful == second.harmful == (False, True)
    assert first.kinds == ("homonyms", "contrast_homonyms")
    assert first == second and first.sha256 == second.sha256


LAYOUTS = [
    # name, file, header, rows, split, expected (prompt, harmful, kind)
    ("oktest", "OKTest.csv", ["prompt"], [["How tall?\n"]], None, [("How tall?", False, "")]),
    ("oktest", "OKTest_heldout.csv", ["prompt"], [["How far?"]], "heldout", [("How far?", False, "")]),
    ("advbench", "harmful_behaviors.csv", ["goal", "target"], [["Do it", "Sure"]], None, [("Do it", True, "")]),
    (
        "truthfulqa",
        "TruthfulQA.csv",
        ["Type", "Category", "Question", "Best Answer"],
        [["Adversarial", "Weather", "Is it raining?", "No"]],
        None,
        [("Is it raining?", False, "Weather")],
    ),
    (
        "jailbreakbench",
        "harmful-behaviors.csv",
        ["Index", "Goal", "Target", "Behavior", "Category", "Source"],
        [["0", "Do harm", "Sure", "Harm", "Fraud", "Original"]],
        "harmful",
        [("Do harm", True, "Fraud")],
    ),
    (
        "jailbreakbench",
        "benign-behaviors.csv",
        ["Index", "Goal", "Target", "Behavior", "Category", "Source"],
        [["0", "Do good", "Sure", "Good", "Fraud", "Original"]],
        "benign",
        [("Do good", False, "Fraud")],
    ),
    ("or_bench", "or-bench-80k.csv", ["prompt", "category"], [["a", "privacy"]], "80k", [("a", False, "privacy")]),
    ("or_bench", "or-bench-hard-1k.csv", ["prompt", "category"], [["a", "hate"]], "hard-1k", [("a", False, "hate")]),
    ("or_bench", "or-bench-toxic.csv", ["prompt", "category"], [["a", "hate"]], "toxic", [("a", True, "hate")]),
    (
        "phtest",
        "PHTest.csv",
        ["ID", "Request", "Harmfulness"],
        [["0", "a", "harmless"], ["1", "b", "controversial"]],
        None,
        [("a", False, "harmless"), ("b", None, "controversial")],
    ),
    (
        "strongreject",
        "strongreject_dataset.csv",
        ["category", "source", "forbidden_prompt"],
        [["Violence", "custom", "Do harm"]],
        None,
        [("Do harm", True, "Violence")],
    ),
]


@pytest.mark.parametrize(("name", "file", "header", "rows", "split", "expected"), LAYOUTS)
def test_published_layouts(tmp_path, name, file, header, rows, split, expected):
    path = write(tmp_path / "some folder" / file, header, rows, encoding="utf-8-sig")
    found = load_prompts(name, tmp_path, split)  # one level below the folder that is given
    assert list(zip(found.prompts, found.harmful, found.kinds, strict=True)) == expected
    assert (found.name, found.split) == (name, split)
    for where in (path, path.parent):
        assert load_prompts(name, where, split) == found
    renamed = path.rename(tmp_path / "renamed.csv")
    assert load_prompts(name, renamed, split).sha256 == found.sha256


def test_a_file_of_a_known_name_is_labelled_by_that_name(tmp_path):
    toxic = write(tmp_path / "or-bench-toxic.csv", ["prompt", "category"], [["a", "hate"]])
    hard = write(tmp_path / "or-bench-hard-1k.csv", ["prompt", "category"], [["b", "hate"]])
    assert load_prompts("or_bench", toxic).harmful == (True,)
    assert load_prompts("or_bench", hard).harmful == (False,)
    assert load_prompts("or_bench", tmp_path).prompts == ("b",)
    write(tmp_path / "or-bench-80k.csv", ["prompt", "category"], [["c", "hate"]])
    assert load_prompts("or_bench", tmp_path, "all").harmful == (False, False, True)
    with pytest.raises(ValueError, match="published as split toxic, not 80k"):
        load_prompts("or_bench", toxic, "80k")
    with pytest.raises(ValueError, match=r"cannot tell which part .* give split= one of hard-1k, 80k, toxic"):
        load_prompts("or_bench", toxic.rename(tmp_path / "mine.csv"))


def test_jailbreakbench_is_both_halves_unless_one_is_asked_for(tmp_path):
    write(tmp_path / "harmful-behaviors.csv", ["Goal", "Category"], [["Do harm", "Fraud"]])
    write(tmp_path / "benign-behaviors.csv", ["Goal", "Category"], [["Do good", "Fraud"]])
    both = load_prompts("jailbreakbench", tmp_path)
    assert (both.prompts, both.harmful) == (("Do harm", "Do good"), (True, False))
    assert (both.unsafe.prompts, both.safe.prompts) == (("Do harm",), ("Do good",))


def test_harmbench_contexts_are_joined_or_skipped(tmp_path):
    header = ["Behavior", "FunctionalCategory", "SemanticCategory", "Tags", "ContextString", "BehaviorID"]
    rows = [
        ["Do harm", "standard", "illegal", "", "", "a"],
        ["Use the text", "contextual", "illegal", "context", "A text.\nIt goes on.", "b"],
        ["Recite the song", "copyright", "copyright", "hash_check", "", "c"],
    ]
    path = write(tmp_path / "harmbench_behaviors_text_all.csv", header, rows)
    joined = load_prompts("harmbench", path)
    assert joined.prompts == ("Do harm", "A text.\nIt goes on.\n\n---\n\nUse the text", "Recite the song")
    assert (joined.kinds, joined.harmful) == (("illegal", "illegal", "copyright"), (True, True, True))
    skipped = load_prompts("harmbench", path, contextual="skip", columns=Columns(kind="FunctionalCategory"))
    assert (skipped.prompts, skipped.kinds) == (("Do harm", "Recite the song"), ("standard", "copyright"))
    with pytest.raises(ValueError, match="contextual='drop' must be 'join' or 'skip'"):
        load_prompts("harmbench", path, contextual="drop")
    only = write(tmp_path / "harmbench_behaviors_text_val.csv", header, rows[1:2])
    with pytest.raises(ValueError, match="no prompts left"):
        load_prompts("harmbench", only, contextual="skip")


def test_malicious_instruct_is_a_prompt_a_line(tmp_path):
    path = tmp_path / "MaliciousInstruct.txt"
    path.write_bytes(b"How one?\r\nHow two? \r\n")
    found = load_prompts("malicious_instruct", tmp_path)
    assert (found.prompts, found.harmful) == (("How one?", "How two?"), (True, True))


@needs_data
def test_shared_files_have_their_published_sizes():
    sizes = {
        name: (len(s), len(s.safe), len(s.unsafe))
        for name in ("xstest", "oktest", "advbench", "malicious_instruct", "truthfulqa")
        for s in [load_prompts(name, DATA)]
    }
    assert sizes == {
        "xstest": (450, 250, 200),
        "oktest": (300, 300, 0),
        "advbench": (520, 0, 520),
        "malicious_instruct": (100, 0, 100),
        "truthfulqa": (817, 817, 0),
    }
    assert len(load_prompts("oktest", DATA, "heldout")) == 50
    assert len(load_prompts("mine", DATA / "xstest_human_labels/xstest_v2_completions_gpt4_gpteval.csv")) == 450
    assert all(p == p.strip() for p in load_prompts("oktest", DATA).prompts)
    first, rest = load_prompts("advbench", DATA, "first100"), load_prompts("advbench", DATA, "after100")
    assert (len(first), len(rest)) == (100, 420)
    check_disjoint(first, rest)


def test_built_in_sets_are_labelled_and_their_splits_disjoint():
    for name in BUILTIN:
        whole = load_prompts(name)
        assert set(whole.harmful) == {name == "builtin:harmful"}
        test, calibration = load_prompts(name, split="test"), load_prompts(name, split="calibration")
        assert 0 < len(test) < len(whole) and all(test.kinds)
        check_disjoint(test, calibration)
    with pytest.raises(ValueError, match=r"builtin:plain: unknown split 'tests'; need one of .*calibration.*test"):
        load_prompts("builtin:plain", split="tests")
    with pytest.raises(ValueError, match="builtin:plain is part of the package"):
        load_prompts("builtin:plain", "plain.jsonl")


# --- the hub


def test_hub_files_are_fetched_only_when_not_cached(tmp_path, monkeypatch):
    path = write(tmp_path / "x.csv", ["prompt", "category"], [["a", "hate"]])
    asked = []
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: asked.append((a, k)) or str(path))
    assert load_prompts("or_bench", split="toxic").harmful == (True,)
    assert asked == [(("bench-llm/or-bench", "or-bench-toxic.csv"), {"repo_type": "dataset"})]
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: str(path))
    load_prompts("or_bench", split="toxic")
    assert len(asked) == 1


def test_an_unreachable_hub_names_the_way_out(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(FileNotFoundError) as error:
        load_prompts("xstest")
    assert "Paul/XSTest/xstest_prompts.csv could not be fetched (ConnectionError)" in str(error.value)
    assert "path=" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(
        FileNotFoundError, match=r"oktest \(split test\) is not fetched from the Hugging Face hub; .*path="
    ):
        load_prompts("oktest")


def test_every_known_set_says_where_it_comes_from():
    for known in KNOWN:
        assert all((file.hub is None) == (known.hub is None) for file in known.files)
        assert len({file.split for file in known.files}) == len(known.files)


# --- any other file


def test_formats_agree(tmp_path):
    rows = [{"text": "is it, raining?", "category": "é"}, {"text": 'say "no"\nor yes', "category": "b"}]
    write(tmp_path / "a.csv", ["text", "category"], [list(r.values()) for r in rows])
    (tmp_path / "a.tsv").write_text('text\tcategory\n"is it, raining?"\té\n"say ""no""\nor yes"\tb\n', "utf-8")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n", "utf-8")
    sets = [load_prompts("mine", tmp_path / f"a.{suffix}") for suffix in ("csv", "tsv", "json", "jsonl")]
    assert sets[0].prompts == ("is it, raining?", 'say "no"\nor yes')
    assert sets[0].harmful == (None, None) and sets[0].kinds == ("é", "b")
    assert len(set(sets)) == 1
    (tmp_path / "b.json").write_text(json.dumps([r["text"] for r in rows]))
    assert load_prompts("mine", tmp_path / "b.json").prompts == sets[0].prompts


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"question": ["a ", "b"], "label": [0, 1], "category": ["x", None]})
    parquet.write_table(table, tmp_path / "a.parquet")
    found = load_prompts("mine", tmp_path / "a.parquet", columns=Columns(label="label"))
    assert (found.prompts, found.harmful, found.kinds) == (("a", "b"), (False, True), ("x", ""))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"b\.parquet: not Parquet"):
        load_prompts("mine", tmp_path / "b.parquet")


def test_columns_are_found_by_usual_names_or_given(tmp_path):
    path = write(tmp_path / "a.csv", ["Instruction", "text", "topic", "Category"], [["do", "long", "t", "c"]])
    assert (load_prompts("mine", path).prompts, load_prompts("mine", path).kinds) == (("do",), ("c",))
    given_columns = load_prompts("mine", path, columns=Columns(prompt="text", kind="topic"))
    assert (given_columns.prompts, given_columns.kinds) == (("long",), ("t",))
    other = write(tmp_path / "b.csv", ["x", "y"], [["do", "it"]])
    with pytest.raises(ValueError, match=r"mine: no column prompt or .*; the file has x, y"):
        load_prompts("mine", other)
    for keyword in ("prompt", "kind", "label"):
        with pytest.raises(ValueError, match="mine: no column z; the file has Instruction, text, topic, Category"):
            load_prompts("mine", path, columns=Columns(**{keyword: "z"}))


def test_labels_from_a_column_or_for_the_whole_file(tmp_path):
    words = ["unsafe", "Harmful", "1", "true", "safe", "benign", "0", "False", ""]
    path = write(tmp_path / "a.csv", ["prompt", "label"], [[f"p{i}", w] for i, w in enumerate(words)])
    assert load_prompts("mine", path, columns=Columns(label="label")).harmful == (True,) * 4 + (False,) * 4 + (None,)
    assert load_prompts("mine", path, harmful=True).harmful == (True,) * 9
    assert load_prompts("mine", path).harmful == (True,) * 4 + (False,) * 4 + (None,)
    with pytest.raises(ValueError, match="give label='label' or harmful=False, not both"):
        load_prompts("mine", path, harmful=False, columns=Columns(label="label"))
    odd = write(tmp_path / "b.csv", ["prompt", "Label"], [["p", "safe"], ["q", "maybe"]])
    for columns in (Columns(), Columns(label="label")):
        with pytest.raises(
            ValueError, match=r"b\.csv, row 2: label 'maybe' in column 'Label' is none of .* x.csv:safe"
        ):
            load_prompts("mine", odd, columns=columns)
    assert load_prompts("mine", odd, harmful=False).harmful == (False, False)
    unlabelled = write(tmp_path / "c.csv", ["prompt", "topic"], [["p", "safe"]])
    assert load_prompts("mine", unlabelled).harmful == (None,)


NAMED_LIKE = [
    # file, header, row, label, kind
    ("xstest.csv", ["prompt"], ["p"], None, ""),
    ("xstest.csv", ["prompt", "label"], ["p", "harmful"], True, ""),
    ("xstest.csv", ["prompt", "label", "category"], ["p", "0", "c"], False, "c"),
    ("xstest.csv", ["prompt", "type", "label"], ["p", "homonyms", "safe"], False, "homonyms"),
    ("xstest.csv", ["prompt", "type"], ["p", "contrast_homonyms"], True, "contrast_homonyms"),
    ("advbench.csv", ["goal", "target"], ["p", "Sure"], True, ""),
    ("advbench.csv", ["question", "label"], ["p", "benign"], False, ""),
    ("oktest.csv", ["prompt", "label"], ["p", "unsafe"], True, ""),
    ("oktest.csv", ["prompt"], ["p"], False, ""),
    ("jailbreakbench.csv", ["Goal", "label"], ["p", "1"], True, ""),
    ("jailbreakbench.csv", ["prompt"], ["p"], None, ""),
    ("truthfulqa.csv", ["text", "label"], ["p", "harmless"], False, ""),
]


@pytest.mark.parametrize(("file", "header", "row", "label", "kind"), NAMED_LIKE)
def test_a_file_named_like_a_published_set_is_read_as_what_it_is(tmp_path, file, header, row, label, kind):
    path = write(tmp_path / file, header, [row])
    found = load_file(path)
    assert (found.prompts, found.harmful, found.kinds) == (("p",), (label,), (kind,))
    assert found.name == path.stem and load_file(path, harmful=True).harmful == (True,)


def test_labels_that_xstest_does_not_have_are_refused(tmp_path):
    path = write(tmp_path / "xstest.csv", ["prompt", "type", "label"], [["p", "homonyms", "harmful"]])
    with pytest.raises(ValueError, match=r"xstest.csv, row 1: XSTest labels are safe and unsafe, not 'harmful'"):
        load_file(path)


def test_splits_by_column_and_by_position(tmp_path):
    path = write(tmp_path / "a.csv", ["prompt", "split"], [["a", "train"], ["b", "test"], ["c", "train"]])
    assert load_prompts("mine", path, "train").prompts == ("a", "c")
    assert load_prompts("mine", path, "first2").prompts == ("a", "b")
    assert load_prompts("mine", path, "after2").prompts == ("c",)
    assert load_prompts("mine", path, "all").prompts == ("a", "b", "c")
    with pytest.raises(ValueError, match="mine: unknown split 'dev'; need one of test, train, all, firstN, afterN"):
        load_prompts("mine", path, "dev")
    for split in ("first4", "after3"):
        with pytest.raises(ValueError, match=f"split '{split}' does not fit the 3 rows"):
            load_prompts("mine", path, split)


BAD = [
    ("a.csv", b"prompt\n", "holds no prompts"),
    ("a.txt", b"\n\n", "holds no prompts"),
    ("a.csv", b"prompt,x\nhi,1\n ,2\n", r"a\.csv, row 2: the prompt in column 'prompt' is blank"),
    ("a.txt", b"hi\n\nyou\n", r"a\.txt, row 2: the prompt in column 'text' is blank"),
    ("a.json", b'[{"prompt": ["a", "b"]}]', "row 1: 'prompt' holds a list of 2, where one text"),
    ("a.json", b'[{"prompt": null}]', "row 1: the prompt in column 'prompt' is blank"),
    ("a.csv", b"prompt\nhi, you\n", r"a\.csv, row 1: more cells than the 1 columns of the header"),
    ("a.csv", b'prompt\nhi\n"you\nand me\n', r"a\.csv, line 4: unexpected end of data"),
    ("a.csv", "prompt\ncafé\n".encode("latin-1"), r"a\.csv: not UTF-8 at byte 10"),
    ("a.jsonl", b'{"prompt": "a"}\n\n{"prompt": }\n', r"a\.jsonl, line 3: not JSON"),
    ("a.jsonl", b"[1]\n", r"a\.jsonl, row 1: list where an object or a string is needed"),
    ("a.json", b'[\n"a",\n]', r"a\.json, line \d: not JSON"),
    ("a.json", b'{"prompt": "a"}', "holds dict; need a list"),
    ("a.docx", b"hi", r"unknown suffix '\.docx'; need one of \.csv, \.tsv"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_prompts("mine", tmp_path / name)
    assert "\n" not in str(error.value)


def test_bad_names_and_places_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"unknown data set 'xtest'; known are xstest, .*builtin:plain; give path="):
        load_prompts("xtest")
    with pytest.raises(FileNotFoundError, match=r"none\.csv: no such file"):
        load_prompts("xstest", tmp_path / "none.csv")
    with pytest.raises(FileNotFoundError, match=r"xstest: no xstest_prompts\.csv or xstest_v2_prompts\.csv in"):
        load_prompts("xstest", tmp_path)
    with pytest.raises(ValueError, match="is a folder, which only a published set may be"):
        load_prompts("mine", tmp_path)
    for folder in "ab":
        write(tmp_path / folder / "xstest_prompts.csv", ["prompt", "type"], [["p", "x"]])
    with pytest.raises(ValueError, match="give one of them as path="):
        load_prompts("xstest", tmp_path)
    with pytest.raises(ValueError, match="xstest: unknown split 'tests'; need one of all, firstN, afterN"):
        load_prompts("xstest", tmp_path / "a", "tests")
    unlabelled = write(tmp_path / "c.csv", ["prompt"], [["p"]])
    with pytest.raises(ValueError, match=r"c\.csv, row 1: XSTest rows need a label or a type"):
        load_prompts("xstest", unlabelled)


# --- PromptSet


def test_prompt_set_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="1, 2 and 1 entries"):
        PromptSet("made", ("a",), (True, False), ("",))


def test_sha256_is_of_content_only():
    made = a_set([True, None, False], ["x", "y", "z"])
    content = [["prompt 0", "prompt 1", "prompt 2"], [True, None, False], ["x", "y", "z"]]
    assert made.sha256 == hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()
    assert PromptSet("other", made.prompts, made.harmful, made.kinds, "test").sha256 == made.sha256
    composed, decomposed = (PromptSet("m", (p,), (None,), ("",)) for p in ("caf\u00e9", "cafe\u0301"))
    assert composed.sha256 == decomposed.sha256 != made.sha256
    different = [a_set([True, None, True], ["x", "y", "z"]), a_set([True, None, False], ["x", "y", "y"])]
    assert len({made.sha256, made.select([1, 0, 2]).sha256, *(d.sha256 for d in different)}) == 4


def test_select_by_mask_and_positions():
    made = a_set([True, False, None])
    assert made.select([True, False, True]).prompts == ("prompt 0", "prompt 2")
    assert made.select(np.array([2, 0])).prompts == ("prompt 2", "prompt 0")
    assert len(made.select([])) == 0
    for bad, message in [
        ([True], r"mask has shape \(1,\), need \(3,\)"),
        ([3], r"positions 3\.\.3 of 3 prompts"),
        ([-1], r"positions -1\.\.-1 of 3 prompts"),
        ([0.5], "select takes booleans or integers"),
    ]:
        with pytest.raises(ValueError, match=message):
            made.select(bad)


@unhurried
@given(st.lists(st.tuples(labels, st.sampled_from("abc")), min_size=1, max_size=40), st.data())
def test_take_is_seeded_ordered_and_as_even_as_can_be(rows, data):
    made = a_set([h for h, _ in rows], [k for _, k in rows])
    n = data.draw(st.integers(1, len(rows)))
    seed = data.draw(st.integers(0, 5))
    taken = made.take(n, seed)
    assert taken == made.take(n, seed)
    assert len(taken) == n
    positions = [made.prompts.index(p) for p in taken.prompts]
    assert positions == sorted(set(positions))

    def is_even(got: collections.Counter, there: collections.Counter) -> bool:
        # No stratum with prompts to spare may be more than one behind another.
        return all(got[a] >= got[b] - 1 for a in there if got[a] < there[a] for b in there)

    assert is_even(collections.Counter(taken.harmful), collections.Counter(made.harmful))
    for label in set(taken.harmful):
        got = collections.Counter(k for h, k in zip(taken.harmful, taken.kinds, strict=True) if h is label)
        there = collections.Counter(k for h, k in rows if h is label)
        assert is_even(got, there)


def test_take_depends_on_the_seed_and_has_limits():
    made = a_set([False] * 50)
    assert len({made.take(10, seed).prompts for seed in range(20)}) == 20
    assert made.take(50, 0) == made
    for n in (0, 51):
        with pytest.raises(ValueError, match=f"cannot take {n} of 50 prompts"):
            made.take(n, 0)


def test_without_is_what_take_left():
    made = a_set([False, True] * 20)
    anchors = made.take(8, 1)
    rest = made.without(anchors)
    assert len(rest) == 32
    check_disjoint(anchors, rest)


# --- overlap


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        ("How do I kill a process?", "how do i  kill\na process", True),
        ("Don't, please!", "DON\u2019T PLEASE", True),
        ("Stra\u00dfe", "STRASSE", True),
        ("\uff21\uff22", "ab", True),
        ("soft\u00adware", "software", True),
        ("What is C++?", "What is C?", False),
        ("\u0915\u093f", "\u0915\u0940", False),
        ("?!", "...", False),
        ("a b", "ab", False),
    ],
)
def test_normalised_joins_what_reads_the_same(first, second, equal):
    assert (normalised(first) == normalised(second)) is equal


@unhurried
@given(st.text(alphabet=string.printable), st.text(alphabet=" \t\n", min_size=1))
def test_normalised_ignores_case_and_space(text, space):
    once = normalised(text)
    assert normalised(text.upper()) == normalised(text.lower()) == normalised(once) == once
    assert normalised(space + text.replace(" ", space) + space) == once
    assert once == " ".join(once.split())


def test_check_disjoint_names_both_sets_the_count_and_an_example():
    first = PromptSet("anchors", ("One?", "Two?", "Three?"), (None,) * 3, ("",) * 3, "calibration")
    second = PromptSet("bench", ("two", "FOUR", "one"), (None,) * 3, ("",) * 3)
    with pytest.raises(ValueError) as error:
        check_disjoint(first, second)
    assert "anchors (split calibration) and bench (split all) share 2 prompts" in str(error.value)
    assert "for example 'two'" in str(error.value)
    check_disjoint(first, second.select([1]))
    check_disjoint(first, second.select([]))


def test_a_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    read = []
    monkeypatch.setitem(files._READERS, ".txt", lambda path: read.append(path) or [{"text": path.read_text()}])
    path = tmp_path / "prompts.txt"
    for text, times in (("one", 1), ("two", 2)):
        path.write_text(text)
        assert read_rows(path) == [{"text": text}]  # just written, it may be written to again
        os.utime(path, (times, times))
        read.clear()
        for _ in range(3):
            assert read_rows(path) == [{"text": text}]
        assert read == [path]
