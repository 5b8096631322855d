"""One of two processes of four devices each: `python processes.py INDEX PORT FOLDER OUT`; alone, what they do.

Every kernel on the model in FOLDER, on a 4 x 2 mesh of all devices; the numbers go to OUT/INDEX.npz and the trained
model to OUT/export.
"""

import pathlib
import sys

import jax
import numpy as np
from tiny import decoding, random_rows

from jaxsafe.chat.model import ChatModel
from jaxsafe.chat.tokenizer import Tokenizer
from jaxsafe.io.hf import save_hf
from jaxsafe.io.hub import load_hf
from jaxsafe.io.store import Store
from jaxsafe.io.sums import sums_once
from jaxsafe.kernels.sums import Scoring, gather
from jaxsafe.methods.trainer import FineTuning, train
from jaxsafe.model.layers import LayerRange
from jaxsafe.model.weights import flatten
from jaxsafe.parallel import banner, fetch, parse_mesh

ROWS = random_rows([40, 35, 44, 33, 9, 12, 10, 11], behind=[9, 12, 11, 10, 2, 3, 5, 4])
NEW_TOKENS = 6


def numbers(folder, out, mesh):
    """{name: array} of the sums, the answers, the loss and the weights after a step of training."""
    config, params = load_hf(folder, mesh=mesh)
    model = ChatModel("tiny", config, params, Tokenizer(folder), mesh)
    found = {}
    for kind in ("wanda", "snip", "gram"):
        scoring = Scoring(kind, batch_size=4)
        sums = gather(scoring, config, params, ROWS, mesh).sums
        kept, again = (sums_once(Store(out), scoring, model, ROWS, every=1) for _ in range(2))
        for name, tree in (("sums", sums), ("kept", kept.sums), ("again", again.sums)):
            found |= {f"{kind}/{name}/{path}": leaf for path, leaf in flatten(fetch(tree)).items()}
    for kind in ("snip", "gram"):
        some = gather(Scoring(kind, batch_size=4, layers=LayerRange(1, 3)), config, params, ROWS, mesh).sums
        found |= {f"{kind}/some/{path}": leaf for path, leaf in flatten(fetch(some)).items()}
    answers = model.answers(ROWS, decoding(NEW_TOKENS), 4)
    found |= {"tokens": answers.tokens, "lengths": answers.lengths}
    settings = FineTuning(steps=1, batch_size=8, learning_rate=1e-2)
    _, step = train(config, params, ROWS, settings, mesh=mesh)
    save_hf(out.parent / "export", config, step.weights())
    return found | {"loss": np.array([step.loss])}


def main(index, port, folder, out):
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    own = pathlib.Path(out) / f"process{index}"
    own.mkdir(parents=True)
    np.savez(f"{out}/{index}.npz", banner=banner(), **numbers(folder, own, parse_mesh("data:4,model:2")))


if __name__ == "__main__":
    main(*sys.argv[1:])
