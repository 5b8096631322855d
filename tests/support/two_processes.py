"""One of two processes of four devices each: `python two_processes.py INDEX PORT FOLDER OUT`.

Loads the model in FOLDER on a 4 x 2 mesh of all devices and writes what it computed and read to OUT.npz.
"""

import sys

import jax
import numpy as np
from decoders import padded
from jax.experimental.multihost_utils import process_allgather

from jaxsafe.io.hf import SafetensorsFolder, read_config
from jaxsafe.io.tensors import load_params
from jaxsafe.kernels.forward import capture
from jaxsafe.model.transformer import forward
from jaxsafe.parallel import banner, parse_mesh, put_rows

LENGTHS = [48, 5, 0, 17]


class Counting(SafetensorsFolder):
    """A folder of tensors that notes how many bytes were read of each."""

    def __init__(self, folder):
        super().__init__(folder)
        self.bytes = {}

    def read(self, name, index):
        part = super().read(name, index)
        self.bytes[name] = self.bytes.get(name, 0) + part.nbytes
        return part


def main(index, port, folder, out):
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    mesh = parse_mesh("data:-1,model:2")
    config, source = read_config(folder), Counting(folder)
    params = load_params(config, source, mesh)
    tokens, valid = put_rows(padded(config, LENGTHS), mesh)
    logits = jax.jit(forward, static_argnums=0)(config, params, tokens, valid)
    resid = jax.jit(capture, static_argnums=0)(config, params, tokens, valid)["resid"]
    np.savez(
        out,
        banner=banner(),
        logits=process_allgather(logits, tiled=True),
        resid=process_allgather(resid, tiled=True),
        names=list(source.bytes),
        bytes=list(source.bytes.values()),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
