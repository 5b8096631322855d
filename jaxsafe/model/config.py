"""The shape of a model."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base `theta` and, by `kind`, the numbers that stretch it to longer contexts."""

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama or Mistral family.

    Sizes are counts; `context` and `window` are tokens (`window=None`: every earlier token is seen);
    `dtype` is that of parameters and of the residual stream, "float32" or "bfloat16".
    """

    vocab: int
    layers: int
    embed: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float = 1e-5
    rope: Rope = Rope()
    window: int | None = None
    tied: bool = False
    attn_bias: bool = False
    mlp_bias: bool = False
    context: int = 2048
    family: str = "llama"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype {self.dtype!r} is not supported; use 'float32' or 'bfloat16'")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} attention heads cannot share {self.kv_heads} key/value heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embeddings need an even one")

    @property
    def untied(self) -> bool:
        """Whether the unembedding is a matrix of its own."""
        return not self.tied

    @property
    def groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads
