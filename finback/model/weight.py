"""The one place a weight matrix lives: dense now; packed, quantised or disk-resident forms behind the same call."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Weight(nn.Module, ABC):
    """A weight matrix, or a stack of them, in some storage form."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The whole matrix as an ordinary tensor."""


class DenseWeight(Weight):
    """A plain parameter of any floating dtype; `shape` is [out, in] or [E, out, in]."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.empty(*shape))

    def dense(self) -> Tensor:
        return self.value
