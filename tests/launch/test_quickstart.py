"""The quickstart: what it tells of the model that it made, and of the cache."""

from types import SimpleNamespace

import pytest

from configs.scans.smollm2_135m import get_config
from jaxsafe.chat.model import load_chat_model
from jaxsafe.records.run import read_run
from launch import quickstart
from launch.progress import Clock


def test_the_cache_is_measured(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/a").write_bytes(b"x" * 1_500_000)
    (tmp_path / "b").write_bytes(b"x" * 600_000)
    assert quickstart.cache_size(tmp_path) == f"{tmp_path} (2 MB, may be deleted)"
    assert quickstart.cache_size(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'} (0 MB, may be deleted)"


@pytest.mark.slow
def test_the_tuned_model_is_named_by_where_it_can_be_loaded(folder, tmp_path, monkeypatch, capsys):
    config = get_config()
    config.batch_size, config.max_new_tokens, config.calibration_tokens, config.passages = 8, 4, 3, 2
    config.anchors = ("builtin:harmful/anchor#4", "builtin:plain/anchor#4")
    config.calibration = ("builtin:harmful/calibration#4", "builtin:plain/calibration#4")
    config.evaluation, config.kl_limit = ("builtin:lookalike/test#6", "builtin:harmful/test#6"), 100.0
    for name, value in {"TASK": "scans", "EVAL_DATA": "", "SEED": 0}.items():
        monkeypatch.setattr(quickstart, name, SimpleNamespace(value=value), raising=False)
    monkeypatch.setattr(quickstart, "tuned_model", lambda settings, dtype, clock: load_chat_model(folder))
    monkeypatch.setenv("JAXSAFE_CACHE", str(tmp_path / "cache"))
    quickstart.run(config, tmp_path / "out", Clock())
    said = capsys.readouterr().err.splitlines()
    assert said[-2:] == [
        f"the safety-tuned model: {folder}",
        f"models and compiled programs: {tmp_path / 'cache'} (0 MB, may be deleted)",
    ]
    assert load_chat_model(read_run(tmp_path / "out").config["model"]).config.layers
