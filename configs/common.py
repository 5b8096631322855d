"""Settings that several tasks share."""

from jaxsafe.chat.tokenizer import template_arg
from jaxsafe.configs.fields import Count, Field, Fields, Natural, Positive, SomeTexts, Texts
from jaxsafe.configs.published import TABLES
from jaxsafe.evaluation.judges.keyword import JUDGES
from jaxsafe.evaluation.settings import SETTINGS
from jaxsafe.evaluation.windows import PROTOCOLS
from jaxsafe.evaluation.zero_shot import ORDERS
from jaxsafe.kernels.importance import LOSSES, POSITIONS
from jaxsafe.kernels.selection import PER
from jaxsafe.methods.brittleness import SCORES
from jaxsafe.parallel import mesh_lengths
from jaxsafe.prompts.roles import parse_spec

READINGS = ("auto", "halves", "whole", *PROTOCOLS)
# Prompt sets: "name", "name/split", a file "mine.csv", "mine.csv:safe" or ":harmful"; "#64" draws 64 by the seed,
# "#first64" takes the first.
MODEL: Fields = {
    "model": Field("", str, "a folder, a GGUF file, a hub name, or smollm2-135m-instruct"),
    "adapter": Field("", str, "a PEFT adapter (LoRA), a folder or a hub name, merged into the model"),
    "dtype": Field(
        "auto",
        str,
        "of weights and activations; auto: the checkpoint's own where the devices multiply it natively, else float32",
        ("auto", "float32", "bfloat16"),
    ),
    "mesh": Field(
        "", str, "devices by axis, as data:-1,model:4; empty: what suits", entry=mesh_lengths, identifies=False
    ),
    "chat_template": Field(None, str | None, "Jinja, for a model that ships none"),
    "template_args": Field(
        (), Texts, "what chat templates are called with, as ('enable_thinking=false',)", entry=template_arg
    ),
    "system": Field(None, str | None, "the system prompt; None: what the template does without one"),
    "raw": Field(False, bool, "ask prompts without any template"),
    "seed": Field(0, Natural, "of draws of prompts and of everything random"),
    "data": Field("", str, "folder of published prompt sets; empty: the hub"),
}
"""Which model it is, how it is asked, and where prompt sets lie."""

EXAM: Fields = {
    "evaluation": Field(
        ("advbench#100",), SomeTexts, "prompt sets to measure; without a label harmful", entry=parse_spec
    ),
    "harmless": Field(
        ("builtin:plain/test#50",),
        Texts,
        "prompt sets asked under the first setting; without a label safe",
        entry=parse_spec,
    ),
    "settings": Field(("vanilla",), SomeTexts, "ways of asking; suffix needs suffixes", SETTINGS),
    "suffixes": Field("", str, "text file of adversarial suffixes, one a line; none are shipped"),
    "judge": Field("wei2024", str, "the rule that tells refusals", tuple(judge.name for judge in JUDGES)),
    "batch_size": Field(32, Count, "prompts answered or read at a time", identifies=False),
    "max_new_tokens": Field(256, Count, "the most tokens of an answer"),
    "repetition_penalty": Field(1.0, Positive, "1: none"),
    "text": Field("", str, "text file whose passages perplexity is of; empty: the built-in prose"),
    "passages": Field(40, Natural, "how many passages, or windows, are read"),
    "reading": Field(
        "auto",
        str,
        "of the text: passages by halves or whole (auto: halves, but whole where a file is read by weights as they "
        "are), or windows as published, wei2024, scans or scans_vicuna",
        READINGS,
    ),
    "window": Field(0, Natural, "tokens of a window; 0: as published, the context or 2048 (wei2024, scans)"),
}
"""What every variant is put to."""

EXPECTED: Fields = {
    "expected": Field(
        (), Texts, "tables of a paper that the report holds the run against", tuple(TABLES), identifies=False
    ),
}
"""For tasks that a paper has tables of."""

TASKS: Fields = {
    "zero_shot": Field((), Texts, 'tasks of lm-eval, as ("boolq", "rte"); needs the extra "eval"'),
    "zero_shot_limit": Field(200, Count, "questions of each of these tasks"),
    "zero_shot_order": Field(
        "first", str, "which these are: the first, or the first as lm-eval 0.3 shuffles them (published)", ORDERS
    ),
}
"""lm-eval's tasks, for variants without a steering rule."""

SCORING: Fields = {
    "base_model": Field("", str, "removed weights are taken from this model; empty: they become zero"),
    "safety": Field(
        ("builtin:harmful/train",), Texts, "prompt sets whose refusals by the model are scored", entry=parse_spec
    ),
    "utility": Field(
        ("builtin:plain/train",), Texts, "prompt sets whose answers by the model are scored", entry=parse_spec
    ),
    "safety_pairs": Field("", str, "file with the columns prompt and response, in place of safety"),
    "utility_pairs": Field("", str, "file with the columns prompt and response, in place of utility"),
    "score_system": Field(
        True, bool, "scored prompts have the system prompt, too, unless their file holds the template"
    ),
    "raw_pairs": Field(False, bool, "prompts of these files hold the template already"),
    "samples": Field(128, Count, "rows of each side that are scored"),
    "answer_tokens": Field(32, Count, "the most tokens of an own answer"),
    "scoring_judge": Field(
        "scans", str, "the rule that tells which own answers refuse", tuple(judge.name for judge in JUDGES)
    ),
    "score": Field("snip", str, "of weights; weight_difference needs base_model", SCORES),
    "loss": Field("mean", str, "of a sample, over its tokens", LOSSES),
    "positions": Field("response", str, "tokens that count", POSITIONS),
    "per": Field("matrix", str, "group in which weights are compared", PER),
    "score_batch_size": Field(8, Count, "samples scored at a time", identifies=False),
}
"""What importance scores and directions are made from."""
