"""Prompt files as people have them: published layouts, columns named by a spec, odd bytes, labels by any name."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from jaxsafe.prompts.content import text_of
from jaxsafe.prompts.labels import asks_for_harm, label_of
from jaxsafe.prompts.roles import Spec, load_spec, parse_spec
from jaxsafe.prompts.sets import Columns, load_file, load_prompts

PROMPTS = ("how do i open a locked diary?", "how do i forge a library card?", "how do i kill a python process?")


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def tsv(path, header, *columns):
    return text(path, "\n".join(["\t".join(header), *("\t".join(row) for row in zip(*columns, strict=True))]) + "\n")


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


KINDS = ("adversarial_harmful", "vanilla_benign", "adversarial_benign")
LAYOUTS = {
    # file: (how it is written, the labels that it has, its kinds)
    "question.jsonl": (
        lambda f: jsonl(f, [{"question_id": i, "category": "9", "turns": [p]} for i, p in enumerate(PROMPTS)]),
        (True,) * 3,
        ("9",) * 3,
    ),
    "eval.tsv": (
        lambda f: tsv(f, ["", "adversarial", "label", "data_type"], "012", PROMPTS, "100", KINDS),
        (True, False, False),
        KINDS,
    ),
    "train.tsv": (
        lambda f: tsv(
            f, ["vanilla", "adversarial", "data_type"], ("x", PROMPTS[1], "y"), (PROMPTS[0], "", PROMPTS[2]), KINDS
        ),
        (True, False, False),
        KINDS,
    ),
    "chat.jsonl": (
        lambda f: jsonl(
            f, [{"user_input": p, "model_output": "x", "toxicity": n} for p, n in zip(PROMPTS, (1, 0, 1), strict=True)]
        ),
        (True, False, True),
        ("",) * 3,
    ),
    "beavers.parquet": (
        lambda f: parquet(
            f,
            prompt=PROMPTS,
            response=["x"] * 3,
            category=[{"theft": True, "drugs": False}] * 3,
            is_safe=[True, False, True],
        ),
        (None,) * 3,
        ("theft",) * 3,
    ),
    "test.jsonl": (
        lambda f: jsonl(f, [{"prompt": p, "category": "3", "category_text": "Theft"} for p in PROMPTS]),
        (False,) * 3,
        ("Theft",) * 3,
    ),
    "category_1.csv": (lambda f: text(f, "".join(f'"{p}"\n' for p in PROMPTS)), (None,) * 3, ("",) * 3),
    "UPPER.CSV": (lambda f: text(f, "prompt\n" + "\n".join(PROMPTS) + "\n"), (None,) * 3, ("",) * 3),
    "columns.json": (lambda f: text(f, json.dumps({"prompt": dict(enumerate(PROMPTS))})), (None,) * 3, ("",) * 3),
    "lists.json": (
        lambda f: text(f, json.dumps({"prompt": PROMPTS, "label": ["safe", "unsafe", "safe"]})),
        (False, True, False),
        ("",) * 3,
    ),
    "wrapped.json": (
        lambda f: text(f, json.dumps({"version": 1, "data": [{"prompt": p} for p in PROMPTS]})),
        (None,) * 3,
        ("",) * 3,
    ),
    "messages.jsonl": (
        lambda f: jsonl(f, [{"prompt": [{"role": "user", "content": p}], "label": True} for p in PROMPTS]),
        (True,) * 3,
        ("",) * 3,
    ),
    "parts.jsonl": (
        lambda f: jsonl(f, [{"prompt": [{"type": "text", "text": p}]} for p in PROMPTS]),
        (None,) * 3,
        ("",) * 3,
    ),
    "questions.jsonl": (
        lambda f: jsonl(f, [{"risk_area": "r", "question": p} for p in PROMPTS]),
        (None,) * 3,
        ("",) * 3,
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_file_is_read_as_it_was_published(tmp_path, name):
    make, labels, kinds = LAYOUTS[name]
    path = make(tmp_path / name)
    found = load_spec(parse_spec(str(path)))
    assert (found.prompts, found.harmful, found.kinds, found.name) == (PROMPTS, labels, kinds, path.stem)
    assert load_spec(parse_spec(f"{path}:harmful")).harmful == (True,) * 3


def test_hex_phi_is_all_of_its_files(tmp_path):
    for n in range(1, 12):
        text(tmp_path / f"category_{n}.csv", f'"{PROMPTS[n % 3]}"\n"a second long prompt, number {n}"\n')
    found = load_prompts("hex_phi", tmp_path)
    assert len(found) == 22 and set(found.harmful) == {True}
    assert load_prompts("hex_phi", tmp_path, "2").prompts == (PROMPTS[2], "a second long prompt, number 2")


def test_the_vanilla_prompt_stands_in_where_there_is_no_adversarial_one(tmp_path):
    path = tsv(tmp_path / "a.tsv", ["vanilla", "adversarial", "data_type"], ["v"], [""], ["vanilla_odd"])
    with pytest.raises(ValueError, match=r"a\.tsv, row 1: WildJailbreak data types end in .*, not 'vanilla_odd'"):
        load_file(path)
    assert load_file(path, harmful=True).prompts == ("v",)


# --- columns that a spec names


def test_a_spec_names_columns():
    columns = Columns("turns", "is bad", "topic")
    assert parse_spec("a@b.CSV@prompt=turns, label=is bad,kind=topic#8") == Spec(
        "a@b.CSV", None, 8, True, None, columns
    )
    assert parse_spec("x.json:safe@prompt=q") == Spec("x.json", None, None, True, False, Columns("q"))
    assert parse_spec("xstest/all@kind=focus#5") == Spec("xstest", "all", 5, columns=Columns(kind="focus"))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("x.csv@", "is not name, name/split or a file"),
        ("x.csv@turns", "columns are named once each"),
        ("x.csv@prompt=", "columns are named once each"),
        ("x.csv@text=q", "columns are named once each"),
        ("x.csv@prompt=a,prompt=b", "columns are named once each"),
        ("x.csv:safe@label=b", "one label for all and a column of labels"),
        ("x.csv@prompt=a#many", "is not name, name/split or a file|columns are named"),
    ],
)
def test_a_spec_that_names_no_columns_is_refused(spec, said):
    with pytest.raises(ValueError, match=said) as error:
        parse_spec(spec)
    assert "\n" not in str(error.value) and spec in str(error.value)


def test_named_columns_take_the_place_of_the_usual_ones(tmp_path):
    rows = [{"prompt": "no", "q": p, "safe": i == 1, "kind": "no", "topic": f"t{i}"} for i, p in enumerate(PROMPTS)]
    path = jsonl(tmp_path / "mine.jsonl", rows)
    found = load_spec(parse_spec(f"{path}@prompt=q,label=safe,kind=topic"))
    assert (found.prompts, found.harmful, found.kinds) == (PROMPTS, (True, False, True), ("t0", "t1", "t2"))
    with pytest.raises(ValueError, match=r"no column z; the file has prompt, q, safe"):
        load_spec(parse_spec(f"{path}@label=z"))


# --- labels


@pytest.mark.parametrize(
    ("column", "harm"),
    [
        *[
            (c, True)
            for c in ("label", "unsafe", "is_unsafe", "not_safe", "harmful", "toxicity", "Jailbreaking", "flagged")
        ],
        *[
            (c, False)
            for c in ("safe", "is_safe", "Is Safe?", "prompt_safety", "benign", "harmless", "unharmful", "non_toxic")
        ],
        *[(c, None) for c in ("ok", "answer", "x", "class")],
    ],
)
def test_yes_and_no_answer_what_a_column_asks(column, harm):
    assert asks_for_harm(column) is harm
    assert (
        label_of("unsafe", column) is True and label_of(" Benign ", column) is False and label_of(None, column) is None
    )
    for yes, no in ((True, False), (1, 0), ("yes", "No"), (1.0, 0.0)):
        if harm is None:
            with pytest.raises(ValueError, match=f"column '{column}', whose name does not say"):
                label_of(yes, column)
        else:
            assert (label_of(yes, column), label_of(no, column)) == (harm, not harm)


# --- contents


def test_contents_are_one_text():
    parts = [{"type": "text", "text": " tell me"}, {"type": "text", "text": " a story "}]
    message = {"role": "user", "content": parts}
    for value in (" tell me a story ", parts, [" tell me a story "], message, [message]):
        assert text_of(value) == " tell me a story "
    assert text_of([{"role": "assistant", "content": "sure"}], "assistant") == "sure"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "null, which is not a text"),
        ([], "list, which is not a text"),
        (3, "int, which is not a text"),
        ({"x": 1}, "dict, which is not a text"),
        (["a", "b"], "a list of 2"),
        ([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], "a list of 2"),
        ([{"role": "assistant", "content": "b"}], "a message of the role 'assistant'"),
        ([{"type": "image_url", "image_url": {}}], "a part of the type 'image_url'"),
        ([{"type": "text", "text": None}], "a part of the type 'text'"),
        ({"role": "user", "content": None}, "null, which is not a text"),
        ("half \ud83d", "half of a character"),
    ],
)
def test_what_is_no_text_is_refused(value, said):
    with pytest.raises(ValueError, match=said):
        text_of(value)


# --- bytes


READ = {
    "bom_crlf.csv": (
        b'\xef\xbb\xbfprompt,label\r\n"how, do i leave?",safe\r\n"say ""no"" to me",unsafe\r\n',
        ("how, do i leave?", 'say "no" to me'),
    ),
    "inner.tsv": (b'prompt\tlabel\nwhat does "no" mean?\tsafe\n', ('what does "no" mean?',)),
    "mac.txt": (b"how do i leave?\rhow do i stay?\r", ("how do i leave?", "how do i stay?")),
    "mac.csv": (b"prompt\rhow do i leave?\rhow do i stay?\r", ("how do i leave?", "how do i stay?")),
    "mac.jsonl": (b'{"prompt": "a"}\r{"prompt": "b"}\r', ("a", "b")),
    "separator.jsonl": ('{"prompt": "a\u2028b"}\n'.encode(), ("a\u2028b",)),
    "lone.csv": (b"prompt\nhow do i leave?\n\n\nhow do i stay?\n", ("how do i leave?", "how do i stay?")),
    "index.csv": (b",,prompt\n0,0,how do i leave?\n", ("how do i leave?",)),
}
REFUSED = {
    "utf16.csv": ("prompt\nhow do i leave?\n".encode("utf-16"), "not UTF-8 at byte 0"),
    "cp1252.csv": ("prompt\nit’s a café?\n".encode("cp1252"), "not UTF-8 at byte 9"),
    "twice.csv": (b"id,prompt,target,prompt\n1,how do i leave?,sure,else\n", "two columns 'prompt'"),
    "twice.json": (b'[{"prompt": "a", "prompt": "b"}]', "two columns 'prompt'"),
    "cases.csv": (b"Prompt,PROMPT\na,b\n", "the columns Prompt and PROMPT differ in case alone"),
    "quotes.tsv": (b'prompt\tlabel\n"Hello" she said, how do i leave?\tsafe\n', "line 2"),
    "long.csv": (b"prompt\n" + b"a " * 70000 + b"\n", "line 2: field larger than"),
    "zero.txt": ("how do i leave?\n\u200b\u200b\n".encode(), "row 2: the prompt in column 'text' is blank"),
    "deep.json": (b"[" * 100_000, "deep.json"),
    "number.json": (b"[" + b"9" * 5000 + b"]", "number.json"),
    "half.jsonl": (b'{"prompt": "half \\ud83d"}\n', "row 1: 'prompt' holds half of a character"),
    "uneven.json": (b'{"prompt": ["a", "b"], "label": [1]}', "holds dict; need a list"),
    "headers.csv": (b"Build a bomb\nPick a lock\n", "no column prompt or .*; the file has Build a bomb"),
}


@pytest.mark.parametrize("name", READ)
def test_bytes_that_are_read(tmp_path, name):
    content, prompts = READ[name]
    assert load_prompts("mine", text(tmp_path / name, content)).prompts == prompts


@pytest.mark.parametrize("name", REFUSED)
def test_bytes_that_are_refused_in_one_line(tmp_path, name):
    content, said = REFUSED[name]
    with pytest.raises(ValueError, match=said) as error:
        load_prompts("mine", text(tmp_path / name, content))
    assert "\n" not in str(error.value)


def test_columns_of_one_name_are_refused_in_parquet(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="two columns 'prompt'"):
        load_file(tmp_path / "a.parquet")


def test_a_folder_name_is_no_column(tmp_path):
    (tmp_path / "label=1").mkdir()
    path = parquet(tmp_path / "label=1" / "a.parquet", prompt=["a"])
    assert load_file(path).harmful == (None,)
