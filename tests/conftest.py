"""Eight simulated devices, exact matrix products, no array widened in rank or type unasked."""

import atexit
import os
import pathlib
import shutil
import signal
import tempfile
from collections.abc import Iterator

import jax
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The programs are tiny: less time goes to running than to optimising them.
QUICK = """
--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1
"""
if jax.__version_info__ < (0, 11):  # a flag that newer versions do not know, and refuse
    QUICK += "--xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {' '.join(QUICK.split())}"
# A program that one file of tests compiled is read by the others, in every process of a run; a folder that is named
# serves the next run, too.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="programs-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it to what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
    """Unloads the programs of a finished file: thousands of them would use up the memory maps of a process."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A tiny chat model as a Hugging Face folder."""
    from tiny import tiny_config, tiny_params, tiny_tokenizer

    from jaxsafe.io.hf import save_hf

    tokenizer = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(tokenizer)
    config = tiny_config(context=600)
    return save_hf(tmp_path_factory.mktemp("models") / "tiny", config, tiny_params(config), like=tokenizer)
