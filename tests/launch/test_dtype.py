"""Which dtype a launcher loads a model in."""

import pytest

from configs.scans.smollm2_135m import get_config
from jaxsafe import devices
from launch import common


@pytest.mark.parametrize(
    ("asked", "native", "dtype"),
    [("auto", True, None), ("auto", False, "float32"), ("bfloat16", False, "bfloat16"), ("float32", True, "float32")],
)
def test_auto_is_the_checkpoints_own_where_devices_multiply_it(asked, native, dtype, monkeypatch):
    monkeypatch.setattr(common, "multiplies_bfloat16", lambda: native)
    config = get_config()
    config.dtype = asked
    assert common.dtype_of(config) == dtype


@pytest.mark.parametrize(
    ("about", "native"),
    [("flags : fpu avx512f avx512_bf16", True), ("Features : fp asimd bf16 i8mm", True), ("flags : fpu avx2", False)],
)
def test_a_cpu_tells_by_its_flags(about, native, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(about)
    monkeypatch.setattr(devices, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(devices.jax, "default_backend", lambda: "cpu")
    assert devices.multiplies_bfloat16() == native
