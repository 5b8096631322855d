"""Tables of two papers, as runs of this library."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxsafe.configs.published import ORTHOGONAL, SCANS, SET_DIFFERENCE
from jaxsafe.evaluation.zero_shot import LM_EVAL_03, PUBLISHED, PUBLISHED_ORTHOGONAL

BROUGHT = {
    "DATA_FOLDER": "the published prompt files",
    "SAFETY_FILE": "prompts with refusals",
    "UTILITY_FILE": "prompts with answers",
    "SUFFIX_FILE": "adversarial suffixes, one a line",
    "HARMFUL_FILE": "100 harmful examples",
    "CONVERTED_FOLDER": "the weights as safetensors, see the configuration",
}
"""What stands for it in a command -> what the user has to bring."""
PAIRS = {
    "data": "DATA_FOLDER",
    "safety_pairs": "SAFETY_FILE",
    "utility_pairs": "UTILITY_FILE",
    "suffixes": "SUFFIX_FILE",
}
ASKED = {"settings": ("vanilla", "suffix", "decoding"), "zero_shot_order": LM_EVAL_03}
ASKED |= {"top": (), "top_ranks": (), "by_row": ()}
WEIGHTS = ASKED | {"zero_shot": PUBLISHED, "orthogonal": (), "sequential": ()}
RANKS = ASKED | {"set_difference": (), "sequential": ("orthogonal",)}
RANKS |= {"zero_shot": PUBLISHED_ORTHOGONAL, "zero_shot_limit": 1000}
FREEZING = {
    "attacks": ("poisoned#10", "poisoned#50", "poisoned#100"),
    "wording": "pure_bad",
    "settings": ("vanilla",),
    "tunings": ("full",),
    "freeze_ranks": (),
    "evaluate_every": 0,
}
FIVE_SETS = 450 + 300 + 456 + 100 + 753
"""Prompts of XSTest, OKTest, AdvBench, MaliciousInstruct and TruthfulQA, less those that directions are made from."""


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """A table of a paper, as a run of this library.

    shape: the preset that has the model's shape; changes: settings in place of the configuration's; brings: settings
    that name what the user has to bring; prompts: how many are asked; slots: of a prompt or a sample.
    """

    table: str
    task: str
    config: str
    shape: str
    changes: Mapping[str, Any]
    brings: Mapping[str, str]
    prompts: int = 100
    slots: int = 256

    @property
    def command(self) -> str:
        """The line that makes the table."""
        settings = {**self.brings, **self.changes}
        texts = {name: f'"{value}"' if isinstance(value, tuple) else value for name, value in settings.items()}
        name, number = pathlib.Path(self.config).stem, self.table.split(", ")[1].replace(" ", "_")
        words = [f"--config={self.config}", *(f"--config.{field}={text}" for field, text in texts.items())]
        return " ".join(["python", "-m", f"launch.{self.task}", *words, f"--out=runs/{name}_{number}"])


def of_brittleness(source: str, size: str, changes: Mapping[str, Any]) -> Reproduction:
    """A table of brittleness for Llama-2-chat of this size."""
    config = f"configs/brittleness/llama2_{size}_chat.py:published"
    changes = {**changes, "expected": (source,)}
    return Reproduction(source, "brittleness", config, f"llama2-{size}", changes, PAIRS)


def of_scans(title: str, name: str, **brings: str) -> Reproduction:
    """Table 2 of SCANS for the model of this title, whose configuration has this name."""
    shape, config = f"llama2-{name.split('_')[1]}", f"configs/scans/{name}.py:published"
    brings = {**brings, "data": "DATA_FOLDER"}
    return Reproduction(f"{SCANS}, {title}", "scans", config, shape, {}, brings, FIVE_SETS, 64)


REPRODUCTIONS = (
    of_brittleness(SET_DIFFERENCE, "7b", WEIGHTS),
    of_brittleness(f"{ORTHOGONAL}a", "7b", RANKS),
    of_brittleness(f"{ORTHOGONAL}b", "13b", RANKS),
    Reproduction(
        "arXiv 2402.05162, table 3",
        "attack",
        "configs/attack/llama2_7b_chat.py",
        "llama2-7b",
        FREEZING,
        {"data": "DATA_FOLDER", "poison": "HARMFUL_FILE"},
    ),
    of_scans("Llama-2-7B", "llama2_7b_chat"),
    of_scans("Llama-2-13B", "llama2_13b_chat"),
    of_scans("Vicuna-7B", "vicuna_7b", model="CONVERTED_FOLDER"),
    of_scans("Vicuna-13B", "vicuna_13b", model="CONVERTED_FOLDER"),
)
