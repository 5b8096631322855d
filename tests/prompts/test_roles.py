"""Who gets which prompts: disjoint draws, and refusals where roles would share one."""

import csv
import itertools
import pathlib
import types

import pytest

from jaxsafe.prompts import roles as roles_of
from jaxsafe.prompts.roles import Spec, labelled, load_spec, parse_spec
from jaxsafe.prompts.sets import PromptSet, normalised


def assign_roles(anchors, calibration, evaluation, *rest, **named):
    prepare = {"anchors": anchors, "calibration": calibration}
    return types.SimpleNamespace(**roles_of.assign_roles(prepare, {"evaluation": evaluation}, *rest, **named))


def texts(sets):
    return [p for s in sets for p in s.prompts]


def write_csv(path, prompts):
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["prompt"])
        rows.writerows([p] for p in prompts)
    return str(path)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("xstest", Spec("xstest")),
        (" xstest/safe ", Spec("xstest", "safe")),
        ("xstest#12", Spec("xstest", n=12)),
        ("builtin:plain/anchor#3", Spec("builtin:plain", "anchor", 3)),
        ("my/prompts.csv", Spec("my/prompts.csv", is_file=True)),
        ("my/prompts.jsonl:harmful", Spec("my/prompts.jsonl", is_file=True, harmful=True)),
        ("prompts.txt:safe#7", Spec("prompts.txt", n=7, is_file=True, harmful=False)),
    ],
)
def test_a_line_names_a_set(text, spec):
    assert parse_spec(text) == spec


@pytest.mark.parametrize("text", ["", "xstest#", "xstest#many", "#3", "/train", "xstest/"])
def test_what_names_no_set_is_refused(text):
    with pytest.raises(ValueError, match=r"prompt set .* is not name, name/split or a file"):
        parse_spec(text)


def test_a_file_is_labelled_as_its_spec_says(tmp_path):
    path = write_csv(tmp_path / "mine.csv", ["one?", "two?"])
    assert load_spec(parse_spec(path)).harmful == (None, None)
    assert load_spec(parse_spec(path + ":harmful")).harmful == (True, True)
    safe = load_spec(parse_spec(path + ":safe#1"))
    assert (safe.name, safe.prompts, safe.harmful) == ("mine", ("one?", "two?"), (False, False))


def test_draws_from_one_set_never_meet():
    specs = ["builtin:harmful/train#20", "builtin:harmful/train#30"]
    roles = assign_roles(specs[:1], specs[1:], ["builtin:harmful/train#10", "builtin:harmful/train#5"])
    drawn = [{normalised(p) for p in s.prompts} for s in (*roles.anchors, *roles.calibration, *roles.evaluation)]
    assert [len(d) for d in drawn] == [20, 30, 10, 5]
    for one, two in itertools.combinations(drawn, 2):
        assert not one & two


def test_a_set_without_a_number_gives_what_is_left(tmp_path):
    path = write_csv(tmp_path / "mine.csv", [f"question {i}?" for i in range(9)])
    roles = assign_roles([path + "#2"], [path + "#3"], [path])
    assert [len(texts(sets)) for sets in (roles.anchors, roles.calibration, roles.evaluation)] == [2, 3, 4]
    assert sorted(texts((*roles.anchors, *roles.calibration, *roles.evaluation))) == [
        f"question {i}?" for i in range(9)
    ]


def test_the_seed_decides_the_draw():
    def anchors(seed):
        return texts(assign_roles(["builtin:plain#25"], [], [], seed=seed).anchors)

    assert anchors(3) == anchors(3) != anchors(4)


@pytest.mark.parametrize("n", [4, 100])
def test_more_than_there_is_cannot_be_drawn(tmp_path, n):
    path = write_csv(tmp_path / "mine.csv", [f"question {i}?" for i in range(5)])
    with pytest.raises(ValueError, match=rf"mine.csv#{n}' has 3 prompts left to draw from; {n} are asked"):
        assign_roles([path + "#2"], [f"{path}#{n}"], [])
    with pytest.raises(ValueError, match="has 0 prompts left to draw from; some are asked"):
        assign_roles([path], [], [path])


def test_sets_of_other_names_that_share_a_prompt_across_roles_are_refused(tmp_path):
    one = write_csv(tmp_path / "one.csv", ["Where is the key?", "What is a kite?"])
    two = write_csv(tmp_path / "two.csv", ["what is a KITE", "How tall is a fir?"])
    for sets in ([[one], [two], []], [[one], [], [two]], [[], [one], [two]]):
        with pytest.raises(ValueError, match=r"one .* and two .* share 1 prompts, for example 'what is a KITE'"):
            assign_roles(*sets)
    # Within one role nothing is held against them.
    assert len(texts(assign_roles([one, two], [], []).anchors)) == 4


def test_a_whole_set_and_its_split_cannot_have_two_roles():
    with pytest.raises(ValueError, match="they must not overlap"):
        assign_roles(["builtin:harmful"], [], ["builtin:harmful/train"])


def test_further_evaluation_sets_must_not_overlap_either():
    extra = PromptSet("mine", ("What is a kite?",), (False,), ("",))
    roles = assign_roles(["builtin:plain#5"], [], ["builtin:harmful#5"], extra=[extra])
    assert [s.name for s in roles.evaluation] == ["builtin:harmful", "mine"]
    shared = PromptSet("mine", roles.anchors[0].prompts[:1], (False,), ("",))
    with pytest.raises(ValueError, match=r"builtin:plain .* and mine .* share 1 prompts"):
        assign_roles(["builtin:plain"], [], [], extra=[shared])


def test_draws_avoid_what_evaluation_sets_of_other_names_hold(tmp_path):
    questions = [f"question {i}?" for i in range(12)]
    pool = write_csv(tmp_path / "pool.csv", questions)
    measured = [write_csv(tmp_path / f"{name}.csv", questions[i : i + 2]) for i, name in enumerate("abc")]
    extra = PromptSet("mine", (questions[11].upper(),), (False,), ("",))
    roles = assign_roles([pool + "#4"], [pool + "#3"], [measured[0], measured[2]], extra=[extra])
    assert sorted(texts(roles.anchors + roles.calibration)) == sorted(questions[4:11])
    with pytest.raises(ValueError, match=r"pool.csv#8' has 7 prompts left"):
        assign_roles([pool + "#8"], [], [measured[0], measured[2]], extra=[extra])


def test_draws_avoid_several_sets_of_one_name():
    whole = load_spec(parse_spec("builtin:plain"))
    extra = [PromptSet("mine", (prompt,), (False,), ("",)) for prompt in whole.prompts[:2]]
    drawn = assign_roles([f"builtin:plain#{len(whole) - 2}"], [], [], extra=extra)
    assert set(texts(drawn.anchors)) == set(whole.prompts[2:])


def test_published_sets_come_from_the_folder():
    folder = pathlib.Path(__file__).parents[2] / "../shared/data"
    if not folder.is_dir():
        pytest.skip("no folder of published prompt sets beside the repository")
    roles = assign_roles(["advbench#8"], ["advbench#8"], ["builtin:plain#8"], folder)
    assert len(set(texts(roles.anchors + roles.calibration))) == 16
    assert roles.evaluation[0].name == "builtin:plain"


def test_labels_of_several_sets_in_order():
    harmful = PromptSet("a", ("x", "y"), (True, True), ("", ""))
    safe = PromptSet("b", ("z",), (False,), ("",))
    assert labelled([harmful, safe]) == (["x", "y", "z"], [True, True, False])


def test_prompts_without_a_label_and_no_prompts_are_refused():
    unknown = PromptSet("mine", ("x", "y"), (True, None), ("", ""))
    with pytest.raises(ValueError, match="mine has prompts labelled neither harmful nor safe"):
        labelled([unknown])
    with pytest.raises(ValueError, match="no prompts: give at least one prompt set"):
        labelled([])
