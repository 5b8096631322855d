"""Operations of a pass, from the configuration: the compiler's own count takes a loop over layers for one turn.

Two operations for a multiplication and an addition; norms, softmax and rotations are left out, as is usual.
"""

import math

from jax.sharding import Mesh

from jaxsafe.model.config import ModelConfig
from jaxsafe.model.weights import layer_shape, partition_spec, weights


def flops(
    config: ModelConfig,
    mesh: Mesh,
    rows: int,
    queries: int,
    keys: int,
    unembedded: int,
) -> float:
    """Operations of one device in a forward pass of `rows` rows of `queries` tokens that see `keys` slots each.

    `unembedded` positions in all get logits. Rows are split over the data axis, and each map over the model axis
    where its heads or features divide; what does not divide is computed by every device of that axis.
    """
    table = weights(config)
    model = mesh.shape["model"]

    def one(path: str, tokens: float) -> float:
        spec = partition_spec(config, table[path], mesh)
        return 2.0 * tokens * math.prod(layer_shape(config, table[path])) / (model if "model" in spec else 1)

    tokens = rows * queries
    linear = sum(one(path, tokens) for path, w in table.items() if w.linear and w.stacked)
    seen = sum(min(keys, window or keys) for window in config.windows) / config.layers
    heads = config.heads / (model if config.kv_heads % model == 0 else 1)
    attention = 4.0 * tokens * seen * heads * config.head_dim
    logits = one("unembed" if "unembed" in table else "embed", unembedded)
    return (config.layers * (linear + attention) + logits) / mesh.shape["data"]


def decomposition_flops(inputs: int, outputs: int, of_inputs: bool = True) -> float:
    """Operations of the basis of one map: its products, and 9 M^3 for eigenvalues and eigenvectors.

    Without `of_inputs` the outer products are those of the outputs, and need no products any more.
    M = min(inputs, outputs). Source of the second: Golub and Van Loan, Matrix Computations, section 8.3; a TPU's
    own algorithm takes several times as many. A wide map first finds its row space, another such decomposition.
    """
    I, O, M = inputs, outputs, min(inputs, outputs)
    if not of_inputs:
        return 9.0 * O**3
    inner = 2.0 * (I * I * M + I * M * M) + 9.0 * M**3
    if outputs <= inputs:
        return inner
    row_space = 2.0 * (I * I * O + I * I * O) + 9.0 * I**3 + 3 * 4.0 * O * I * I
    return inner + row_space + 2.0 * (I * O * I) + 2.0 * O * I * I
