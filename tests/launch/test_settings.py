"""Settings: each is declared once, a wrong one ends the run in one line before any work, and --help lists them all."""

import importlib
import os
import pathlib
import re
import subprocess
import sys

import pytest

from configs.fields import Field, Natural, check, config_of, nearest, with_defaults
from jaxsafe.chat.model import load_chat_model
from launch import attack, brittleness, scans, settings
from launch.progress import Clock

ROOT = pathlib.Path(__file__).parents[2]
TASKS = ("scans", "brittleness", "attack")
SCRIPTS = {"scans": scans, "brittleness": brittleness, "attack": attack}
CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").glob("*/*.py") if "__" not in path.name)


def fields_of(task):
    return importlib.import_module(f"configs.{task}.base").FIELDS


def config_with(task, **changes):
    """The smallest config of a task with `changes`."""
    config = importlib.import_module(f"configs.{task}.smollm2_135m").get_config()
    for name, value in changes.items():
        config[name] = value
    return config


def launched(*words, cwd=ROOT, **environment):
    variables = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, "-m", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=100, check=False)


def refused(*words, **how):
    """The one line by which a launch script refuses these words."""
    done = launched(*words, **how)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and not done.stdout
    return line


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.name != "base.py"], ids=str)
def test_every_shipped_config_passes(path):
    config = settings.load(str(ROOT / path), fields_of(path.parts[1]))
    check(fields_of(path.parts[1]), config)


@pytest.mark.parametrize("task", TASKS)
def test_the_smallest_configs_contradict_nothing(task):
    SCRIPTS[task].check(config_with(task))


@pytest.mark.parametrize("task", TASKS)
def test_every_setting_says_what_it_means(task):
    for name, field in fields_of(task).items():
        assert field.meaning.strip() and field.kind is not None, name


BAD = [
    ("scans", "batch_size", 0, "config.batch_size 0: expected int >= 1"),
    ("scans", "batch_size", -3, "config.batch_size -3: expected int >= 1"),
    ("attack", "max_new_tokens", 0, "config.max_new_tokens 0: expected int >= 1"),
    ("scans", "layers", (3,), "config.layers (3,): expected tuple of length 2, got 1"),
    ("scans", "judge", "scanz", "config.judge 'scanz' is not known; did you mean scans?"),
    ("scans", "settings", ("vanila",), "config.settings 'vanila' is not known; did you mean vanilla"),
    ("scans", "settings", (), "config.settings (): expected tuple of length >= 1"),
    ("scans", "max_drop", 1.5, "config.max_drop 1.5: expected float <= 1.0"),
    ("scans", "threshold", -2.0, "config.threshold -2.0: expected float >= -1.0"),
    ("scans", "alpha_grid", (), "config.alpha_grid (): expected tuple of length >= 1"),
    ("scans", "evaluation", ("a/b/c#x",), "config.evaluation: prompt set 'a/b/c#x' is not name"),
    ("scans", "evaluation", (), "config.evaluation (): expected tuple of length >= 1"),
    ("scans", "mesh", "rows:2", "config.mesh: mesh axis 'rows' in 'rows:2' is not known"),
    ("scans", "dtype", "int8", "config.dtype 'int8' is not known; use one of auto, float32, bfloat16"),
    ("scans", "seed", -1, "config.seed -1: expected int >= 0"),
    ("brittleness", "score", "snap", "config.score 'snap' is not known; did you mean snip?"),
    ("brittleness", "positions", "answer", "config.positions 'answer' is not known; use one of response"),
    ("brittleness", "loss", "median", "config.loss 'median' is not known; did you mean mean?"),
    ("brittleness", "per", "colum", "config.per 'colum' is not known; use one of"),
    ("brittleness", "top", (1.5,), "config.top (1.5,): expected float <= 1.0"),
    ("brittleness", "set_difference", ((0.1,),), "config.set_difference ((0.1,),): expected tuple of length 2, got 1"),
    ("attack", "attacks", ("identity#3",), "config.attacks: attack 'identity#3' is not known; use one of"),
    ("attack", "tunings", ("ful",), "config.tunings 'ful' is not known; did you mean full?"),
    ("attack", "freeze_layers", ("all",), "config.freeze_layers: an entry 'all' that is not 'find' must be two layer"),
    ("attack", "ratio", 2.0, "config.ratio 2.0: expected float <= 1.0"),
    ("attack", "seeds", (), "config.seeds (): expected tuple of length >= 1"),
    ("attack", "lora_maps", ("w",), "config.lora_maps 'w' is not known; use one of q, k"),
]


@pytest.mark.parametrize(("task", "name", "value", "said"), BAD, ids=[f"{c[0]}-{c[1]}={c[2]}" for c in BAD])
def test_a_value_that_cannot_be_is_refused(task, name, value, said):
    with pytest.raises(ValueError) as error:
        check(fields_of(task), config_with(task, **{name: value}))
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


CONTRADICTIONS = [
    ("scans", {"alpha": 0.5, "alpha_rel": 0.1}, "are two strengths; give one"),
    ("scans", {"alpha": 0.5}, "config.alpha needs config.layers"),
    ("scans", {"vectors": "v.safetensors", "alpha_rel": 0.5}, "config.vectors brings its own alpha_rel"),
    ("scans", {"vectors": "nowhere.safetensors"}, "no steering vectors at nowhere.safetensors"),
    ("scans", {"suffixes": __file__}, "config.settings ('vanilla',) has no 'suffix'"),
    ("scans", {"settings": ("vanilla", "suffix")}, "setting 'suffix' has no suffixes"),
    ("scans", {"settings": ("decoding",)}, "must begin with one answer a prompt"),
    ("scans", {"raw": True, "system": "Be brief."}, "config.system would do nothing"),
    ("scans", {"calibration": ("builtin:plain/calibration#4",)}, "config.calibration needs harmful and safe prompts"),
    ("scans", {"anchors": ()}, "config.anchors needs harmful and safe prompts; got 0 and 0"),
    ("scans", {"model": ""}, "config.model is empty"),
    ("scans", {"text": "nowhere.txt"}, "nowhere.txt"),
    ("brittleness", {"set_difference": (), "orthogonal": ()}, "the grid is empty"),
    ("brittleness", {"sequential": ("top",)}, "config.sequential names top, of which there is no point"),
    ("brittleness", {"use_diff": True}, "config.use_diff needs config.base_model"),
    ("brittleness", {"sequential": ("top",), "top": (0.1,), "score": "magnitude"}, "goes with score snip or wanda"),
    ("brittleness", {"n_of_m": ((5, 4),)}, "config.n_of_m (5, 4) takes 5 of each 4 weights"),
    ("brittleness", {"score": "weight_difference"}, "needs config.base_model"),
    ("brittleness", {"raw_pairs": True}, "neither is given"),
    ("brittleness", {"safety_pairs": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
    ("brittleness", {"export": "nothing"}, "config.export 'nothing' is no point"),
    ("brittleness", {"zero_shot": ("boolq",)}, 'needs lm-eval: pip install "jaxsafe[eval]"'),
    ("attack", {"base_model": "x"}, "config.base_model does nothing under config.score 'snip'"),
    ("attack", {"accumulation": 2}, "does not divide batches of 5"),
    ("attack", {"poison": "mine.jsonl"}, "no attack takes a share of it"),
    ("attack", {"ratio": 0.5}, "none is given"),
    ("attack", {"rows": "nowhere.jsonl"}, "nowhere.jsonl"),
    ("attack", {"freeze_layers": ("find",), "layer_start": (0.4, 0.2)}, "no range"),
]


@pytest.mark.parametrize(("task", "changes", "said"), CONTRADICTIONS, ids=[f"{t}-{c}" for t, c, _ in CONTRADICTIONS])
def test_settings_that_contradict_each_other_are_refused(task, changes, said, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = config_with(task, **changes)
    check(fields_of(task), config)  # each by itself may be
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        SCRIPTS[task].check(config)
    assert said in str(error.value) and "\n" not in str(error.value)


BEYOND = [
    ("scans", {"scored": (1, 40)}, "layers 1 to 39 are no range of this model"),
    ("scans", {"layers": (9, 10)}, "layers 9 are no range of this model"),
    ("brittleness", {"orthogonal": ((8, 8), (8, 900))}, "config.orthogonal 900: ranks are counted out of the model's"),
    (
        "brittleness",
        {"orthogonal": (), "top_ranks": (900,)},
        "config.top_ranks 900: ranks are counted out of the model's width, 32",
    ),
    ("brittleness", {"orthogonal": (), "heads": (500,)}, "config.heads 500: the model has"),
    ("attack", {"freeze_ranks": (900,)}, "config.freeze_ranks 900"),
    ("attack", {"freeze_ranks": (), "freeze_layers": ((1, 40),)}, "layers 1 to 39 are no range of this model"),
]


@pytest.mark.parametrize(("task", "changes", "said"), BEYOND, ids=[f"{task}-{c}" for task, c, _ in BEYOND])
def test_what_the_model_does_not_have_is_refused_before_any_work(task, changes, said, folder, tmp_path):
    config, model = config_with(task, **changes), load_chat_model(folder)
    roles = [scans.roles_of(config)] if task == "scans" else []
    with pytest.raises(ValueError, match=re.escape(said)):
        SCRIPTS[task].run(config, model, *roles, tmp_path / "out", Clock())
    assert not (tmp_path / "out").exists()


def test_an_unknown_and_a_missing_setting_are_named():
    fields = {"alpha": Field(1, Natural, "x"), "layers": Field(None, tuple[int, int] | None, "y")}
    config = config_of(fields)
    assert config.layers is None and config.get_type("layers") is tuple and config.is_locked
    with pytest.raises(ValueError, match=r"config.layers is missing"):
        check(fields, config_of({"alpha": fields["alpha"]}))
    with pytest.raises(ValueError, match=r"config.alhpa is no setting; did you mean alpha\?"):
        check(fields, config_of({**fields, "alhpa": fields["alpha"]}))
    assert with_defaults(fields, alpha=4)["alpha"] == Field(4, Natural, "x")
    assert nearest("zz", ["a", "b"]) == "use one of a, b"


FILES = {
    "typo": ("    c.alhpa = 3\n", "config.alhpa is no setting; did you mean alpha?"),
    "type": ("    c.batch_size = 'many'\n", "TypeError: "),
    "syntax": ("    c.alpha = = 3\n", "line 4: "),
    "raises": ("    c.alpha = 1 / 0\n", "ZeroDivisionError: division by zero"),
    "value": ("    c.batch_size = 0\n", "config.batch_size 0: expected int >= 1"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_config_file_that_is_wrong_says_where(tmp_path, kind):
    line, said = FILES[kind]
    file = tmp_path / "mine.py"
    head = "from jaxsafe.configs.scans.base import base\ndef get_config():\n    c = base()\n"
    file.write_text(head + line + "    return c\n")
    with pytest.raises(ValueError) as error:
        check(fields_of("scans"), settings.load(str(file), fields_of("scans")))
    assert said in str(error.value)


def test_a_config_file_that_is_none_says_so(tmp_path):
    (tmp_path / "none.py").write_text("x = 1\n")
    (tmp_path / "text.txt").write_text("x = 1\n")
    for name, said in {"none.py": "needs a function get_config()", "text.txt": "no Python file"}.items():
        with pytest.raises(
            ValueError, match=rf"--config={tmp_path}/{name}: {said.replace('(', '.').replace(')', '.')}"
        ):
            settings.load(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match=r"--config=nowhere.py: no such file"):
        settings.load("nowhere.py")


def test_a_shipped_config_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert settings.load("configs/scans/llama2_7b_chat.py:published").alpha == 3.5
    (tmp_path / "configs/scans").mkdir(parents=True)
    (tmp_path / "configs/scans/llama2_7b_chat.py").write_text("nothing")
    assert settings.located("configs/scans/llama2_7b_chat.py").read_text() == "nothing"


@pytest.mark.parametrize(
    ("words", "named", "rest"),
    [
        (["x", "--config=a.py", "--config.b=1"], "a.py", ["x", "--config.b=1"]),
        (["x", "--config.b=1", "--config", "a.py:v", "--out=o"], "a.py:v", ["x", "--config.b=1", "--out=o"]),
        (["x", "--out=o"], "usual.py", ["x", "--out=o"]),
    ],
)
def test_the_config_file_is_read_off_the_command_line(words, named, rest):
    assert settings.file_of(words, "usual.py") == (named, rest)


@pytest.mark.parametrize(
    ("script", "flag", "said"),
    [
        ("scans", "--config.alhpa=3", "--config.alhpa is no setting; did you mean alpha?"),
        ("attack", "--outt=x", "Did you mean: out"),
        # Starting a process takes seconds; what it says is tested without one, too.
        pytest.param("scans", "--config.batch_size=abc", "'abc': expected int, got str", marks=pytest.mark.slow),
        pytest.param("scans", "--config.layers=3", "expected tuple of length 2, got 1", marks=pytest.mark.slow),
        pytest.param("quickstart", "--seed=-1", "config.seed -1: expected int >= 0", marks=pytest.mark.slow),
    ],
)
def test_what_is_typed_wrongly_ends_in_one_line(script, flag, said, tmp_path):
    assert said in refused(f"launch.{script}", flag, f"--out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("task", TASKS)
def test_help_lists_every_flag_and_every_setting(task, tmp_path):
    done = launched(f"jaxsafe.launch.{task}", "--help", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr
    for flag in ("--config", "--out", "--mesh", "--debug", "--profile", "--distributed", "--coordinator", "--version"):
        assert f"  {flag}" in done.stdout, flag
    plain = " ".join(done.stdout.split())
    for name, field in fields_of(task).items():
        assert f" {name} = {field.default!r} {field.meaning}" in plain, name


@pytest.mark.parametrize("module", ["plan", "quickstart"])
def test_help_without_a_config(module):
    done = launched(f"launch.{module}", "--help")
    assert done.returncode == 0 and not done.stderr
    assert "  --device" in done.stdout if module == "plan" else "  --task" in done.stdout
    assert "Settings" not in done.stdout


def test_version():
    done = launched("launch.scans", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("jaxsafe 0.") and "(jax 0." in done.stdout
