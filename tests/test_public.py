"""The public names: one list, which programs import from and type checkers read."""

import ast
import pathlib
import subprocess
import sys

import pytest
from launches import ROOT

import jaxsafe

SCRIPT = """
import jaxsafe as js

reveal_type(js.load_chat_model)
reveal_type(js.load_chat_model("x").answers(["a"]).texts)
js.load_chat_modle("x")
js.load_chat_model(5.0)
"""


def test_type_checkers_read_what_is_imported():
    tree = ast.parse(pathlib.Path(jaxsafe.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    read = {alias.asname: node.module for node in block.body for alias in node.names}
    assert all(alias.name == alias.asname for node in block.body for alias in node.names)
    assert read == jaxsafe._WHERE
    assert jaxsafe.__all__ == ["__version__", *jaxsafe._WHERE] and len(set(jaxsafe.__all__)) == len(jaxsafe.__all__)


@pytest.mark.parametrize("name", jaxsafe.__all__)
def test_every_name_is_there(name):
    assert getattr(jaxsafe, name) is not None and name in dir(jaxsafe)


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="'load_chat_modle'"):
        _ = jaxsafe.load_chat_modle


@pytest.mark.slow
def test_a_script_of_a_user_sees_real_types(tmp_path):
    (tmp_path / "mine.py").write_text(SCRIPT)
    flags = ["--follow-imports=silent", "--ignore-missing-imports", f"--cache-dir={tmp_path / 'cache'}"]
    command = [sys.executable, "-m", "mypy", *flags, "mine.py"]
    environment = {"MYPYPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    found = dict(line.split(": ", 1) for line in done.stdout.splitlines()[:-1])
    assert found.keys() == {f"mine.py:{line}" for line in (4, 5, 6, 7)}, done.stdout + done.stderr
    assert found["mine.py:4"].endswith('-> jaxsafe.chat.model.ChatModel"')
    assert found["mine.py:5"] == 'note: Revealed type is "tuple[str, ...]"'
    assert 'no attribute "load_chat_modle"' in found["mine.py:6"] and "[arg-type]" in found["mine.py:7"]
