"""Published prompt sets: how their files are called and labelled, and where those lie."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxsafe.prompts.files import Row
from jaxsafe.prompts.labels import label_of

Label = Callable[[Row], bool | None]
"""row -> True (harmful), False (safe) or None (no label); ValueError where the row lacks what it looks at."""


@dataclass(frozen=True)
class KnownFile:
    """One published file of a prompt set.

    split: its name within the set; names: the file names it is published under; hub: its path in the set's
    hub repository, None where it is not there; label: the label of its rows.
    """

    split: str
    names: tuple[str, ...]
    hub: str | None
    label: Label


@dataclass(frozen=True)
class KnownSet:
    """A published prompt set.

    columns, kinds: columns that may hold the prompt (a row's first that does) and its category; hub: data-set
    repository on the Hugging Face hub; files: its files, the split of the first being the default;
    joined: whether the default is all files together instead; context: column of a text to put before the prompt;
    marks: columns, in lower case, one of which tells a published file from another of its name; layout: columns, in
    lower case, that together no other file has, whatever it is called.
    """

    name: str
    columns: tuple[str, ...]
    kinds: tuple[str, ...]
    hub: str | None
    files: tuple[KnownFile, ...]
    joined: bool = False
    context: str | None = None
    marks: tuple[str, ...] = ()
    layout: tuple[str, ...] = ()


def has_columns(known: KnownSet, rows: Sequence[Row]) -> bool:
    """Whether `rows` are those of a file of `known` by their columns; a file with labels of its own is none."""
    seen = {column.lower() for row in rows for column in row}
    if len({file.label for file in known.files}) > 1 or not seen & {column.lower() for column in known.columns}:
        return False
    return bool(seen & set(known.marks)) if known.marks else "label" not in seen


def recognised(path: Path, rows: Sequence[Row]) -> KnownSet | None:
    """The set that the file of these rows is of: by its name and columns, or by columns alone."""
    seen = {column.lower() for row in rows for column in row}
    named = (known for known in KNOWN if known.name == path.stem and has_columns(known, rows))
    alike = (known for known in KNOWN if known.layout and seen.issuperset(known.layout))
    return next(named, None) or next(alike, None)


def _harmful(row: Row) -> bool | None:
    return True


def _safe(row: Row) -> bool | None:
    return False


def _xstest(row: Row) -> bool | None:
    # Older layouts have no label column and mark the unsafe half in the prompt type.
    if word := str(row.get("label") or "").strip().lower():
        if word not in ("safe", "unsafe"):
            raise ValueError(f"XSTest labels are safe and unsafe, not {word!r}")
        return word == "unsafe"
    if row.get("type"):
        return "contrast_" in str(row["type"])
    raise ValueError("XSTest rows need a label or a type")


def _phtest(row: Row) -> bool | None:
    # Controversial prompts are those its authors would not call harmless or harmful: no label.
    if not row.get("Harmfulness"):
        raise ValueError("PHTest rows need a Harmfulness")
    return False if str(row["Harmfulness"]).strip().lower() == "harmless" else None


def _wildjailbreak(row: Row) -> bool | None:
    kind = str(row.get("data_type")).strip().lower()
    if not kind.endswith(("_harmful", "_benign")):
        raise ValueError(f"WildJailbreak data types end in _harmful or _benign, not {kind!r}")
    return kind.endswith("_harmful")


def _toxic_chat(row: Row) -> bool | None:
    return label_of(row.get("toxicity"), "toxicity")


def _unlabelled(row: Row) -> bool | None:
    return None


_TRAIN = "data/train-00000-of-00001.parquet"
_TRUTHFUL = "generation/validation-00000-of-00001.parquet"
_DIRECT = "DirectRequest/{}-00000-of-00001.parquet"

KNOWN = (
    KnownSet(  # arXiv 2308.01263
        "xstest",
        ("prompt",),
        ("type",),
        "Paul/XSTest",
        (KnownFile("all", ("xstest_prompts.csv", "xstest_v2_prompts.csv"), "xstest_prompts.csv", _xstest),),
        marks=("type",),
    ),
    KnownSet(  # arXiv 2401.17633
        "oktest",
        ("prompt",),
        (),
        None,
        (
            KnownFile("test", ("OKTest.csv",), None, _safe),
            KnownFile("heldout", ("OKTest_heldout.csv",), None, _safe),
        ),
    ),
    KnownSet(  # arXiv 2307.15043
        "advbench",
        ("goal", "prompt"),
        (),
        "walledai/AdvBench",
        (KnownFile("all", ("advbench.csv", "AdvBench.csv", "harmful_behaviors.csv"), _TRAIN, _harmful),),
    ),
    KnownSet(  # arXiv 2310.06987
        "malicious_instruct",
        ("prompt", "text"),
        (),
        "walledai/MaliciousInstruct",
        (KnownFile("all", ("MaliciousInstruct.txt",), _TRAIN, _harmful),),
    ),
    KnownSet(  # arXiv 2109.07958
        "truthfulqa",
        ("Question",),
        ("Category",),
        "truthfulqa/truthful_qa",
        (KnownFile("all", ("TruthfulQA.csv", "TruthfulQA_v0.csv"), _TRUTHFUL, _safe),),
    ),
    KnownSet(  # arXiv 2402.04249
        "harmbench",
        ("Behavior", "prompt"),
        ("SemanticCategory", "category"),
        "swiss-ai/harmbench",
        (
            KnownFile("all", ("harmbench_behaviors_text_all.csv",), "metadata.csv", _harmful),
            KnownFile("val", ("harmbench_behaviors_text_val.csv",), _DIRECT.format("val"), _harmful),
            KnownFile("test", ("harmbench_behaviors_text_test.csv",), _DIRECT.format("test"), _harmful),
        ),
        context="ContextString",
    ),
    KnownSet(  # arXiv 2404.01318
        "jailbreakbench",
        ("Goal",),
        ("Category",),
        "JailbreakBench/JBB-Behaviors",
        (
            KnownFile("harmful", ("harmful-behaviors.csv",), "data/harmful-behaviors.csv", _harmful),
            KnownFile("benign", ("benign-behaviors.csv",), "data/benign-behaviors.csv", _safe),
        ),
        joined=True,
    ),
    KnownSet(  # arXiv 2405.20947
        "or_bench",
        ("prompt",),
        ("category",),
        "bench-llm/or-bench",
        (
            KnownFile("hard-1k", ("or-bench-hard-1k.csv",), "or-bench-hard-1k.csv", _safe),
            KnownFile("80k", ("or-bench-80k.csv",), "or-bench-80k.csv", _safe),
            KnownFile("toxic", ("or-bench-toxic.csv",), "or-bench-toxic.csv", _harmful),
        ),
    ),
    KnownSet(  # arXiv 2409.00598
        "phtest",
        ("Request",),
        ("Harmfulness",),
        "furonghuang-lab/PHTest",
        (KnownFile("all", ("PHTest.csv",), "PHTest.csv", _phtest),),
        marks=("harmfulness",),
    ),
    KnownSet(  # arXiv 2402.10260
        "strongreject",
        ("forbidden_prompt", "prompt"),
        ("category",),
        "walledai/StrongREJECT",
        (KnownFile("all", ("strongreject_dataset.csv",), _TRAIN, _harmful),),
    ),
    KnownSet(  # arXiv 2406.14598
        "sorry_bench",
        ("turns", "prompt"),
        ("category",),
        None,
        (KnownFile("all", ("question.jsonl",), None, _harmful),),
        layout=("question_id", "turns", "category"),
    ),
    KnownSet(  # arXiv 2406.18510
        "wildjailbreak",
        ("adversarial", "vanilla"),
        ("data_type",),
        None,
        (
            KnownFile("eval", ("eval.tsv",), None, _wildjailbreak),
            KnownFile("train", ("train.tsv",), None, _wildjailbreak),
        ),
        layout=("adversarial", "data_type"),
    ),
    KnownSet(  # arXiv 2310.17389
        "toxic_chat",
        ("user_input",),
        (),
        None,
        (
            KnownFile("test", ("toxic-chat_annotation_test.csv",), None, _toxic_chat),
            KnownFile("train", ("toxic-chat_annotation_train.csv",), None, _toxic_chat),
        ),
        layout=("user_input", "toxicity"),
    ),
    KnownSet(  # arXiv 2307.04657; is_safe is said of the response
        "beavertails",
        ("prompt",),
        ("category",),
        None,
        (
            KnownFile("test", ("test.jsonl",), None, _unlabelled),
            KnownFile("train", ("train.jsonl",), None, _unlabelled),
        ),
        layout=("prompt", "response", "category", "is_safe"),
    ),
    KnownSet(  # arXiv 2505.08054
        "falsereject",
        ("prompt",),
        ("category_text", "category"),
        None,
        (KnownFile("test", ("test.jsonl",), None, _safe), KnownFile("train", ("train.jsonl",), None, _safe)),
        layout=("prompt", "category", "category_text"),
    ),
    KnownSet(  # arXiv 2310.03693; its files have no header
        "hex_phi",
        ("text",),
        (),
        None,
        tuple(KnownFile(str(n), (f"category_{n}.csv",), None, _harmful) for n in range(1, 12)),
        joined=True,
    ),
)


def locate(known: KnownSet, file: KnownFile, folder: Path | None) -> Path:
    """Path of a published file: in `folder` or one level below it; without a folder, from the hub or its cache.

    Raises FileNotFoundError where it is in neither, ValueError where two folders hold it.
    """
    if folder is None:
        return _from_hub(known, file)
    for name in file.names:
        found = [p for p in (folder / name, *sorted(folder.glob(f"*/{name}"))) if p.is_file()]
        if len(found) > 1:
            raise ValueError(f"{known.name}: both {found[0]} and {found[1]} exist; give one of them as path=")
        if found:
            return found[0]
    raise FileNotFoundError(
        f"{known.name}: no {' or '.join(file.names)} in {folder} or one level below; give the file as path="
    )


def _from_hub(known: KnownSet, file: KnownFile) -> Path:
    wanted = f"{known.name} (split {file.split})"
    way_out = f"give the file or its folder as path= (published as {' or '.join(file.names)})"
    if known.hub is None or file.hub is None:
        raise FileNotFoundError(f"{wanted} is not fetched from the Hugging Face hub; {way_out}")
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(known.hub, file.hub, repo_type="dataset")
    if isinstance(cached, str):
        return Path(cached)
    try:
        return Path(huggingface_hub.hf_hub_download(known.hub, file.hub, repo_type="dataset"))
    except Exception as error:  # offline, gated, renamed: unrelated exception families, one way out
        raise FileNotFoundError(
            f"{wanted}: {known.hub}/{file.hub} could not be fetched ({type(error).__name__}); {way_out}"
        ) from error
