"""Ranges of layers, which print themselves."""

import dataclasses
import operator
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, order=True)
class LayerRange:
    """The layers `first` <= layer < `stop`, counted from 0. Raises ValueError for an empty range and a negative one."""

    first: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.stop:
            raise ValueError(f"layers {self.first} to {self.stop} (exclusive) are no range; need 0 <= first < stop")

    @classmethod
    def parse(cls, value: Sequence[int], name: str = "layers") -> "LayerRange":
        """The range of two numbers, first and stop. Raises ValueError, which names `name`, for anything else."""
        try:
            first, stop = map(operator.index, value)
        except (TypeError, ValueError):
            raise ValueError(f"{name} must be two layer numbers, first and stop (exclusive); got {value!r}") from None
        return cls(first, stop)

    def __len__(self) -> int:
        return self.stop - self.first

    def __str__(self) -> str:
        """Both ends inclusive, as "10 to 19"."""
        return f"{self.first}" if len(self) == 1 else f"{self.first} to {self.stop - 1}"

    @property
    def slice(self) -> slice:
        """What takes these layers out of an array with a leading axis of layers."""
        return slice(self.first, self.stop)

    def within(self, layers: int) -> "LayerRange":
        """The range itself. Raises ValueError where a model of so many layers does not have it."""
        if self.stop > layers:
            raise ValueError(f"layers {self} are no range of this model, which has layers 0 to {layers - 1}")
        return self

    def mask(self, layers: int) -> np.ndarray:
        """True for the layers of the range, bool [layers]. Raises ValueError as `within` does."""
        self.within(layers)
        index = np.arange(layers)
        return (index >= self.first) & (index < self.stop)
