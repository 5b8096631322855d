"""The command `jaxsafe`, in a clone and from an installed wheel."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest
from launches import ROOT, scans

import jaxsafe
from launch import console

SCRIPTS = [path.stem for path in (ROOT / "launch").glob("*.py") if "command.run(main" in path.read_text()]


def test_every_launch_script_is_a_task():
    assert sorted(console.TASKS) == sorted(SCRIPTS)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_tasks_are_listed_one_a_line(words, capsys):
    console.main(words)
    lines = capsys.readouterr().out.splitlines()
    assert all(sum(line.startswith(f"  {task} ") for line in lines) == 1 for task in SCRIPTS)


def test_the_version(capsys):
    console.main(["--version"])
    assert capsys.readouterr().out == f"jaxsafe {jaxsafe.__version__}\n"


@pytest.mark.parametrize(("word", "said"), [("scnas", "did you mean 'scans'?"), ("7", "use one of quickstart, scans")])
def test_an_unknown_task_names_the_nearest(word, said, capsys):
    with pytest.raises(SystemExit) as end:
        console.main([word])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith(f"error: no task {word!r}; {said}") and error.count("\n") == 1


def test_a_task_gets_the_flags_behind_it():
    command = [sys.executable, "-m", "launch.console", "plan", "--model=llama2-7b", "--device=v9"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "device 'v9' is not known" in done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of programs of an environment with the wheel in it, and the libraries of this one."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    for room in ("jaxsafe", "launch", "configs"):
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source)
    (wheel,) = folder.glob("*.whl")
    assert "jaxsafe/py.typed" in zipfile.ZipFile(wheel).namelist()
    venv.create(folder / "env", with_pip=False)
    programs = folder / "env" / "bin"
    pip(f"--python={programs / 'python'}", "install", "--quiet", "--no-deps", "--no-index", wheel)
    (site,) = folder.glob("env/lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return programs


def pip(*words):
    command = [sys.executable, "-m", "pip", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def away(folder, *command):
    """What `command` did in `folder`, with no path to this clone."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    variables |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "JAXSAFE_CACHE": str(folder / "cache")}
    command = list(map(str, command))
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.slow
def test_an_installed_run_leaves_the_users_own_folders_alone(installed, folder, tmp_path):
    for room in ("launch", "configs"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text("raise RuntimeError('this is the folder of the user')\n")
    own = {path: path.read_text() for path in tmp_path.rglob("*.py")}
    config = pathlib.Path(
        next(installed.parent.glob("lib/python*/site-packages/jaxsafe/configs/scans/smollm2_135m.py"))
    )
    flags = [flag for flag in scans(folder) if flag.startswith("--config.")]
    done = away(tmp_path, installed / "jaxsafe", "scans", f"--config={config}", *flags, "--out=out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.html").is_file()
    table = done.stdout.splitlines()
    assert sum("%" in line for line in table) >= 2 and max(map(len, table)) <= 80
    said = done.stderr.splitlines()
    for stage in ("refusal directions", "classifier on calibration prompts", "layers and strength", "SCANS"):
        assert any(line.startswith(f"{stage}: 0/") for line in said) and any(
            re.match(rf"{stage}: (\d+)/\1 in 0:", line) for line in said
        ), (stage, said)
    assert not set(said) & set(table)
    assert {path: path.read_text() for path in tmp_path.rglob("*.py")} == own
