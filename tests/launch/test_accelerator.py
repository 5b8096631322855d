"""An accelerator that JAX leaves alone is named, with what to install; what the user asked for is meant."""

import pytest

from launch import command, common
from launch.accelerator import Evidence, evidence, unused

GPU, TPU = Evidence(frozenset({"gpu"})), Evidence(frozenset({"tpu"}))


@pytest.mark.parametrize(("seen", "extra"), [(GPU, "gpu"), (TPU, "tpu")])
def test_what_is_not_installed_is_named(seen, extra):
    line = unused("cpu", "", seen)
    assert f'pip install "jaxsafe[{extra}]"' in line and "\n" not in line


def test_a_plugin_that_does_not_start_is_not_installed_again():
    line = unused("cpu", "", Evidence(frozenset({"gpu"}), frozenset({"gpu"})))
    assert "pip install" not in line and "nvidia-smi" in line


@pytest.mark.parametrize("case", [("gpu", "", GPU), ("tpu", "", TPU), ("cpu", "cpu", GPU), ("cpu", "", Evidence())])
def test_silence_where_all_is_as_it_should_be(case):
    assert unused(*case) is None


@pytest.mark.parametrize(
    ("files", "variables", "program", "packages", "wanted"),
    [
        ((), {}, None, (), Evidence()),
        (("/dev/nvidia0",), {}, None, (), GPU),
        (("/proc/driver/nvidia",), {}, None, (), GPU),
        ((), {}, "/usr/bin/nvidia-smi", ("libtpu",), Evidence(frozenset({"gpu"}), frozenset({"tpu"}))),
        (("/dev/accel0",), {}, None, (), TPU),
        (("/dev/vfio/0",), {}, None, (), Evidence()),
        (("/dev/vfio/0",), {"TPU_NAME": "x"}, None, ("libtpu",), Evidence(frozenset({"tpu"}), frozenset({"tpu"}))),
    ],
)
def test_what_the_machine_shows(files, variables, program, packages, wanted):
    assert evidence(files.__contains__, variables, lambda name: program, packages.__contains__) == wanted


def test_a_run_begins_with_it(monkeypatch):
    said = []
    monkeypatch.setattr(command, "say", said.append)
    monkeypatch.setattr(common, "unused_here", lambda: "a line")
    common.greet()
    assert said[1:] == ["a line"] and "cpu" in said[0]
