"""What loop 1 lends to later loops on a stage, between its forward pass and its backward pass.

Each (stage, loop) is an autograd graph of its own, run by Megatron's schedule. Later loops compute
with detached leaves of loop 1's tensors and leave their gradients on them; ``lend`` puts a node on
loop 1's output whose backward, which the schedule runs last, hands them back.

    loop 1   forward   K, V, E --detach--> leaves                 released
    loop l   forward              leaves ...
    loop l   backward             leaves.grad += ...
    loop 1   backward  K, V, E <--grad---- leaves            ->
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

HandBack = Callable[[], Sequence[Tensor | None]]


class Lending:
    """The leaves of all micro batches that are under way on this rank."""

    def __init__(self) -> None:
        self._leaves: dict[Hashable, list[Tensor]] = {}
        self.most = 0
        """Most entries that were lent at a time."""

    def __len__(self) -> int:
        return len(self._leaves)

    def lend(self, key: Hashable, tensors: Sequence[Tensor]) -> None:
        """Keep leaves of ``tensors`` (shared memory, no copy) under ``key``."""
        learns = torch.is_grad_enabled()
        self._leaves[key] = [t.detach().requires_grad_(learns and t.requires_grad) for t in tensors]
        self.most = max(self.most, len(self._leaves))

    def borrowed(self, key: Hashable) -> list[Tensor]:
        """Return the leaves under ``key``."""
        return self._leaves[key]

    def release(self, key: Hashable) -> list[Tensor | None]:
        """Forget the leaves under ``key``; returns the gradients that later loops left on them."""
        return [leaf.grad for leaf in self._leaves.pop(key)]

    def clear(self) -> None:
        """Forget everything, after a step that failed."""
        self._leaves.clear()


def on_backward(output: Tensor, hand_back: HandBack, tensors: Sequence[Tensor] = ()) -> Tensor:
    """Return ``output``; when backward reaches it, ``hand_back`` gives the tensors' gradients."""
    return _OnBackward.apply(hand_back, output, *tensors)


class _OnBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hand_back: HandBack, output: Tensor, *tensors: Tensor) -> Tensor:
        ctx.hand_back = hand_back
        # The same memory, and not a view to autograd: Megatron frees what it has sent by its
        # storage, and refuses views.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, gradients[0], *ctx.hand_back()
