"""Eight simulated devices, exact matrix products, strict dtypes and shapes."""

import os

import jax

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The programs are tiny: less time goes to running than to optimising them.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "allow")
