"""The shape of a model."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base `theta` and, by `kind`, the numbers that stretch it to longer contexts.

    `partial` is the share of a head's features that are turned, the first ones; cosines and sines are multiplied by
    `magnitude`; `divisors` are those of each frequency (longrope).
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    partial: float = 1.0
    magnitude: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    divisors: tuple[float, ...] = ()

    def rotary_dim(self, head_dim: int) -> int:
        """How many features of a head are turned."""
        return int(head_dim * self.partial)


UNTURNED = Rope(kind="none")
"""Of layers that know no positions."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama kind; `families.py` says what sets each family apart.

    Sizes are counts; `context` and `window` are tokens (`window=None`: every earlier token is seen);
    `dtype` is that of parameters and of the sides of their products, "float32" or "bfloat16".

    stream:       dtype of the residual stream and of what maps give, "float32"; None: `dtype`
    sliding:      by layer, whether it sees the window alone; empty: all layers do
    turned:       by layer, whether it has rotary embeddings; empty: all layers do
    local_rope:   those of layers that see the window alone; None: as all others
    pre_norm:     a norm before attention and MLP; `post_norm`: one behind each, before the residual stream
    qk_norm:      of queries and keys before rotation: "none", of each "head", or of the whole "projection"
    norm:         how norms round: "rounded" weight * cast(x / rms), "float32" cast(weight * x / rms), or
                  "plus_one" cast((1 + weight) * x / rms)
    activation:   "silu" or "gelu_tanh"
    embed_scaled: embeddings times the root of their width
    query_scalar: attention scores are divided by its root; None: the head's size
    softcap:      s becomes c tanh(s / c), of attention scores; `final_softcap` of logits
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
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    sliding: tuple[bool, ...] = ()
    turned: tuple[bool, ...] = ()
    local_rope: Rope | None = None
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: str = "none"
    norm: str = "rounded"
    activation: str = "silu"
    embed_scaled: bool = False
    query_scalar: float | None = None
    softcap: float | None = None
    final_softcap: float | None = None
    context: int = 2048
    family: str = "llama"
    dtype: str = "float32"
    stream: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype {self.dtype!r} is not supported; use 'float32' or 'bfloat16'")
        if self.stream not in (None, "float32", self.dtype):
            raise ValueError(f"stream {self.stream!r} is not supported; use 'float32' or None")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} attention heads cannot share {self.kv_heads} key/value heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embeddings need an even one")
        if self.rope.rotary_dim(self.head_dim) % 2:
            raise ValueError(f"{self.rope.partial} of head_dim {self.head_dim} is odd; rotary embeddings need pairs")
        for name in ("sliding", "turned"):
            if 0 < len(getattr(self, name)) < self.layers:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {self.layers} layers")

    @property
    def stream_dtype(self) -> str:
        """The dtype of the residual stream and of what maps give."""
        return self.stream or self.dtype

    @property
    def wide(self) -> bool:
        """Whether that is a wider one than the parameters'."""
        return self.stream_dtype != self.dtype

    @property
    def untied(self) -> bool:
        """Whether the unembedding is a matrix of its own."""
        return not self.tied

    @property
    def groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    @property
    def lone_pre_norm(self) -> bool:
        """Whether the norms before attention and MLP are the only ones of a layer."""
        return self.pre_norm and not self.post_norm

    @property
    def sandwich(self) -> bool:
        """Whether norms stand before and behind attention and MLP."""
        return self.pre_norm and self.post_norm

    @property
    def head_norm(self) -> bool:
        """Whether each head's queries and keys are normed."""
        return self.qk_norm == "head"

    @property
    def projection_norm(self) -> bool:
        """Whether queries and keys are normed over all heads."""
        return self.qk_norm == "projection"

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many positions each layer sees; None for all."""
        slides = self.sliding[: self.layers] or (True,) * self.layers
        return tuple(self.window if sliding else None for sliding in slides)

    @property
    def layer_ropes(self) -> tuple[Rope, ...]:
        """The rotary embedding of each layer."""
        turned = self.turned[: self.layers] or (True,) * self.layers
        local = self.local_rope or self.rope
        places = [self.rope if window is None else local for window in self.windows]
        return tuple(
            place if turns else dataclasses.replace(UNTURNED, partial=place.partial)
            for place, turns in zip(places, turned, strict=True)
        )
