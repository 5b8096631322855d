"""The configs load, hold what their docstrings say, name known prompt sets, and their template renders."""

import importlib
import pathlib
import shlex
import subprocess
import sys

import pytest
from absl import flags
from jinja2.sandbox import ImmutableSandboxedEnvironment
from ml_collections import config_flags

from configs.scans.base import base
from configs.scans.vicuna_7b import CHAT_TEMPLATE
from jaxsafe.chat.tokenizer import Tokenizer
from jaxsafe.methods.scans import AFFIRMATIVE
from jaxsafe.prompts.published import KNOWN
from jaxsafe.prompts.roles import assign_roles, parse_spec
from jaxsafe.prompts.sets import BUILTIN

ROOT = pathlib.Path(__file__).parents[2]
DATA = ROOT / "../shared/data"
PUBLISHED = {
    "llama2_7b_chat": {"alpha": 3.5, "scored": (10, 32), "threshold": 0.75},
    "llama2_13b_chat": {"alpha": 3.5, "scored": (10, 19), "threshold": 0.75},
    "vicuna_7b": {"alpha": 4.0, "scored": (10, 32), "threshold": 0.75},
    "vicuna_13b": {"alpha": 4.0, "scored": (10, 20), "threshold": 0.70},
}
LAYERS = {"llama2_13b_chat": 40, "vicuna_13b": 40}
LARGE = [*PUBLISHED, "llama31_8b_instruct", "mistral_7b_instruct", "qwen25_7b_instruct", "qwen3_8b"]
LARGE += ["gemma2_9b_it", "gemma3_4b_it", "olmo3_7b_instruct"]
EVERY = [(name, "") for name in LARGE] + [(name, "published") for name in PUBLISHED]


def config_of(name: str, variant: str = ""):
    return importlib.import_module(f"configs.scans.{name}").get_config(variant)


@pytest.mark.parametrize(("name", "variant"), EVERY)
def test_has_the_fields_and_types_of_the_base(name, variant):
    config, whole = config_of(name, variant), base()
    assert set(config) == set(whole)
    for field in whole:
        assert config.get_type(field) is whole.get_type(field), field
    assert config.model.count("/") == 1
    stored_in_float16 = config.model.startswith(("meta-llama/Llama-2", "lmsys/"))
    assert config.dtype == ("float32" if variant else "bfloat16" if stored_in_float16 else "auto")
    assert config.evaluation == ("xstest", "oktest", "advbench", "malicious_instruct", "truthfulqa")


@pytest.mark.parametrize("name", LARGE)
def test_the_default_variant_is_calibrated(name):
    config = config_of(name)
    assert [config[field] for field in ("scored", "threshold", "layers", "alpha", "alpha_rel")] == [None] * 5
    assert config.calibration and config.repetition_penalty == 1.0


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_variant_holds_the_published_choices(name):
    config = config_of(name, "published")
    assert {field: config[field] for field in PUBLISHED[name]} == PUBLISHED[name]
    assert config.anchors == ("advbench#64", "truthfulqa#64")
    assert (config.layers, config.alpha_rel, config.calibration) == ((10, 20), None, ())
    assert (config.repetition_penalty, config.max_new_tokens) == (1.1, 256)
    assert max(config.scored[1], config.layers[1]) <= LAYERS.get(name, 32)


@pytest.mark.parametrize("name", LARGE)
def test_an_unknown_variant_is_refused_by_name(name):
    variants = r"\['', 'published'\]" if name in PUBLISHED else r"\[''\]"
    with pytest.raises(ValueError, match=rf"'publshed' is not known; the variants are {variants}"):
        config_of(name, "publshed")


@pytest.mark.parametrize(("name", "variant"), EVERY)
def test_every_prompt_set_is_known(name, variant):
    config = config_of(name, variant)
    known = {k.name for k in KNOWN} | set(BUILTIN)
    for spec in (*config.anchors, *config.calibration, *config.evaluation):
        assert parse_spec(spec).name in known, spec


@pytest.mark.parametrize("variant", ["", "published"])
def test_the_published_files_fill_every_role(variant):
    if not DATA.is_dir():
        pytest.skip(f"no folder {DATA}")
    config = config_of("llama2_7b_chat", variant)
    prepare = {"anchors": config.anchors, "calibration": config.calibration}
    roles = assign_roles(prepare, {"evaluation": config.evaluation}, DATA, seed=config.seed)
    left = {s.name: len(s) for s in roles["evaluation"]}
    assert (
        left
        == {
            "": {"xstest": 450, "oktest": 300, "advbench": 424, "malicious_instruct": 68, "truthfulqa": 753},
            "published": {"xstest": 450, "oktest": 300, "advbench": 456, "malicious_instruct": 100, "truthfulqa": 753},
        }[variant]
    )


@pytest.mark.parametrize("name", LARGE)
def test_the_docstring_holds_a_command_that_parses(name, monkeypatch):
    document = importlib.import_module(f"configs.scans.{name}").__doc__
    commands = [line for line in document.splitlines() if line.startswith("python -m launch.scans")]
    assert commands
    for command in commands:
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values)
        flags.DEFINE_string("out", "", "", flag_values=values)
        assert f"configs/scans/{name}.py" in command
        words = [word.replace("=configs/", f"={ROOT}/configs/") for word in shlex.split(command)[2:]]
        # config_flags looks for its overrides in the command line itself.
        monkeypatch.setattr(sys, "argv", words)
        values(words)
        assert values.config.data == "DATA_FOLDER" and values.out.startswith("runs/")


def test_the_launch_script_refuses_an_unknown_variant_on_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "launch.scans", "--config=configs/scans/llama2_7b_chat.py:paper"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "variant 'paper' is not known" in done.stderr


USER, ANSWER = {"role": "user", "content": " How do I kill a process? "}, {"role": "assistant", "content": "With kill."}
SYSTEM = {"role": "system", "content": "Be brief."}
RENDERED = [
    ([USER], "<s>USER: How do I kill a process? ASSISTANT:"),
    ([SYSTEM, USER], "<s>Be brief. USER: How do I kill a process? ASSISTANT:"),
    (
        [USER, ANSWER, USER],
        "<s>USER: How do I kill a process? ASSISTANT: With kill.</s>USER: How do I kill a process? ASSISTANT:",
    ),
]


@pytest.mark.parametrize(("messages", "expected"), RENDERED)
def test_vicuna_template(messages, expected):
    for name in ("vicuna_7b", "vicuna_13b"):
        template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
            config_of(name).chat_template
        )
        tokens = {"bos_token": "<s>", "eos_token": "</s>"}
        assert template.render(messages=messages, add_generation_prompt=True, **tokens) == expected
        assert template.render(messages=messages, **tokens) + "ASSISTANT:" == expected


def test_vicuna_rows_have_one_bos_and_end_the_instruction_at_the_colon(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = "<unk> <s> </s> USER : ASSISTANT Hello there Sure".split()
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    core = tokenizers.Tokenizer(model)
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(tmp_path)

    row = Tokenizer(tmp_path, CHAT_TEMPLATE).chat_row("Hello there", response=AFFIRMATIVE)
    assert [words[i] for i in row.ids] == "<s> USER : Hello there ASSISTANT : Sure".split()
    assert row.instruction_end == 6
