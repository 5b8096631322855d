"""Eight simulated devices, exact matrix products, strict dtypes and shapes."""

import os

import jax

os.environ.setdefault("HF_HUB_OFFLINE", "1")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "allow")
