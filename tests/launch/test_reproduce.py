"""The list of tables: commands that parse, what they take by hand, and one line without --list."""

import importlib
import re
import shlex
import subprocess
import sys
import types

import pytest
from absl import flags
from launches import ROOT
from ml_collections import config_flags

from jaxsafe.configs import fields
from jaxsafe.configs.published import TABLES
from jaxsafe.configs.reproductions import BROUGHT, REPRODUCTIONS
from launch import common, reproduce
from launch.reproduce import MACHINES, described, needs, settings_of, works

H100, SLICE = MACHINES.values()
BY_TABLE = {table.table: table for table in REPRODUCTIONS}
WEIGHTS, LINEAR = 6_738_415_616, 32 * (4 * 4096**2 + 3 * 4096 * 11008)
"""Of Llama-2-7B, all and those of linear maps in blocks."""
names = pytest.mark.parametrize("name", BY_TABLE)


def memory(name, machine=H100):
    return needs(BY_TABLE[name], machine[1], machine[0])[0]


def test_every_published_table_is_listed_and_freezing():
    assert len(BY_TABLE) == len(REPRODUCTIONS)
    assert set(TABLES) | {"arXiv 2402.05162, table 3"} == set(BY_TABLE)


@names
def test_a_command_has_the_settings_that_are_planned(name, monkeypatch):
    table = BY_TABLE[name]
    words = [word.replace("=configs/", f"={ROOT}/configs/") for word in shlex.split(table.command)[2:]]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    flags.DEFINE_string("out", "", "", flag_values=values)
    monkeypatch.setattr(sys, "argv", words)  # where config_flags looks for its overrides
    values(words)
    config = settings_of(table)
    assert values.config.to_dict() == config.to_dict() and values.out.startswith("runs/")
    fields.check(importlib.import_module(f"jaxsafe.configs.{table.task}.base").FIELDS, config)
    # A table that the run is held against is the one that it makes.
    assert not config.get("expected") or table.table in {found.source for found in common.published(config)}


def test_commands_write_to_folders_of_their_own():
    assert len({table.command.rpartition("--out=")[2] for table in REPRODUCTIONS}) == len(REPRODUCTIONS)


def test_memory_is_that_of_weights_scores_caches_and_state():
    # Scores of both sides, in float32; a sum of them is divided over the chips as the weights are.
    assert memory("arXiv 2402.05162, table 6a") == pytest.approx(2 * WEIGHTS + 2 * 4 * LINEAR, rel=1e-3)
    assert memory("arXiv 2402.05162, table 6a", SLICE) == pytest.approx((2 * WEIGHTS + 8 * LINEAR) / 8, rel=1e-3)
    # Masters and two moments, in float32.
    assert memory("arXiv 2402.05162, table 3") == pytest.approx(12 * WEIGHTS, rel=1e-3)
    # In float32, 32 rows of 64 slots and 256 tokens, of which the last is not kept.
    cache = 2 * 32 * 32 * 128 * 4 * 32 * (64 + 256 - 1)
    assert memory("arXiv 2408.11491, table 2, Llama-2-7B") == pytest.approx(4 * WEIGHTS + cache, rel=1e-3)


def test_what_is_done_is_counted_by_hand():
    # The dense model, ten points and for each three controls of two kinds; a hundred prompts plain, with a suffix, and
    # five samples.
    answered, scored = works(BY_TABLE["arXiv 2402.05162, table 6a"])
    assert (answered[0], answered[2]) == ("generation", 71 * 22) and (scored[0], scored[2]) == ("snip", 2)
    # Each point is scored anew on both sides.
    assert works(BY_TABLE["arXiv 2402.05162, table 7a"])[1][::2] == ("act_svd", 10)
    # Two variants of 2,059 prompts in batches of 32.
    assert [each[2] for each in works(BY_TABLE["arXiv 2408.11491, table 2, Vicuna-7B"])] == [2 * 65]
    # Three seeds of the undefended run and of five regions with a control each; five epochs in batches of ten.
    attacks = [each for each in works(BY_TABLE["arXiv 2402.05162, table 3"]) if each[0] == "fine_tuning"]
    assert [(work.samples, work.sample_batch, times) for _, work, times in attacks] == [
        (5 * n, 10, 33) for n in (10, 50, 100)
    ]


@names
def test_eight_chips_hold_an_eighth_and_take_the_time_that_their_bandwidth_asks_for(name):
    (one, alone), (share, together) = (needs(BY_TABLE[name], lengths, chip) for chip, lengths in MACHINES.values())
    assert share == pytest.approx(one / 8, rel=0.02)
    # The slice moves 1.96 times as much a second and multiplies 1.59 times as fast.
    assert 1.5 < alone / together < 2


def test_a_table_that_does_not_fit_has_no_time():
    lines = described(BY_TABLE["arXiv 2402.05162, table 3"]).splitlines()
    assert lines[1].startswith("  python -m launch.attack --config=configs/attack/llama2_7b_chat.py ")
    assert BROUGHT["HARMFUL_FILE"] in lines[2]
    assert lines[3] == "  one H100: 80.9 GB of 80 GB a chip; does not fit"
    assert re.fullmatch(r"  v5e-8: 10\.1 GB of 16 GB a chip; roofline time [\d.]+ min", lines[4])


def test_without_list_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setattr(reproduce, "LIST", types.SimpleNamespace(value=False), raising=False)
    with pytest.raises(ValueError, match=r"^nothing to do; give --list, .*") as error:
        reproduce.main()
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_command_lists_every_table():
    command = [sys.executable, "-m", "launch.reproduce", "--list"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and [text.splitlines()[0] for text in done.stdout.split("\n\n")] == list(BY_TABLE)
    assert [line.strip() for line in done.stdout.splitlines() if " python " in line] == [
        table.command for table in REPRODUCTIONS
    ]
