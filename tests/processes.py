"""One of two processes of four devices each: `python processes.py INDEX PORT FOLDER OUT`; alone, what they do.

Every kernel on the model in FOLDER, on a 4 x 2 mesh of all devices; the numbers go to OUT/INDEX.npz and the trained
model to OUT/export.
"""

import pathlib
import sys

import jax
import numpy as np
from tiny import random_rows

from jaxsafe.io.hf import save_hf
from jaxsafe.io.hub import load_hf
from jaxsafe.kernels.generate import generate_rows
from jaxsafe.methods.fine_tuning import FineTuning, fine_tune_run
from jaxsafe.methods.statistics import gather, gather_once
from jaxsafe.model.weights import flatten
from jaxsafe.parallel import banner, fetch, parse_mesh

ROWS = random_rows([40, 35, 44, 33, 9, 12, 10, 11], behind=[9, 12, 11, 10, 2, 3, 5, 4])
NEW_TOKENS = 6


def numbers(folder, out, mesh):
    """{name: array} of the sums, the answers, the loss and the weights after a step of training."""
    config, params = load_hf(folder, mesh=mesh)
    found = {}
    for kind in ("wanda", "snip", "gram"):
        sums = gather(kind, config, params, ROWS, batch_size=4, mesh=mesh).sums
        kept = gather_once(out / f"{kind}.safetensors", kind, config, params, ROWS, "model", 4, mesh=mesh, every=1)
        again = gather_once(out / f"{kind}.safetensors", kind, config, params, ROWS, "model", 4, mesh=mesh)
        for name, tree in (("sums", sums), ("kept", kept.sums), ("again", again.sums)):
            found |= {f"{kind}/{name}/{path}": leaf for path, leaf in flatten(fetch(tree)).items()}
    answers = generate_rows(config, params, ROWS, 4, NEW_TOKENS, mesh=mesh)
    found |= {"tokens": answers.tokens, "lengths": answers.lengths}
    losses = []
    settings = FineTuning(steps=1, batch_size=8, learning_rate=1e-2)
    tuned = fine_tune_run(config, params, ROWS, settings, on_step=lambda step, loss: losses.append(loss), mesh=mesh)
    save_hf(out.parent / "export", config, tuned)
    return found | {"loss": np.array(losses)}


def main(index, port, folder, out):
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    own = pathlib.Path(out) / f"process{index}"
    own.mkdir(parents=True)
    np.savez(f"{out}/{index}.npz", banner=banner(), **numbers(folder, own, parse_mesh("data:4,model:2")))


if __name__ == "__main__":
    main(*sys.argv[1:])
