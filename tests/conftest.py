"""Eight simulated devices, exact matrix products, no array widened in rank or type unasked."""

import os
import pathlib
from collections.abc import Iterator

import jax
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The programs are tiny: less time goes to running than to optimising them.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


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
