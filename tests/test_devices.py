"""What processors can do."""

from jaxsafe.devices import compiling_sooner


def test_a_cpu_compiles_sooner_unless_told_how_much_to_optimise():
    level = "--xla_backend_optimization_level="
    assert compiling_sooner("", (0, 12, 0)) == f"{level}1"
    assert compiling_sooner("--xla_dump_to=here", (0, 12, 1)) == f"--xla_dump_to=here {level}1"
    assert compiling_sooner(f"{level}3", (0, 12, 0)) == f"{level}3"
    assert compiling_sooner("", (0, 11, 2)) == ""
