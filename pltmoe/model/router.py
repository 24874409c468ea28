"""The router of a looped layer: Megatron's top-k router, run once per loop.

It differs from ``TopKRouter`` in three ways. Scores and weights are computed in at least float32
*and* in float64 when the model is (Megatron rounds them to float32, which would hide errors below
1e-7 from the tests). The aux-loss-free expert bias works with softmax scores. And it knows its
loop, for the statistics; the losses of all loops are averaged by their coefficients
(megatron_config.py), and ``local_tokens_per_expert`` collects the counts of all loops.
"""

from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from pltmoe.model.loop_stats import LoopStats
from pltmoe.model.reference import at_least_float32


class LoopRouter(TopKRouter):
    """Softmax top-k with renormalised weights, chosen by score + expert bias."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.loop = 1
        self.stats: LoopStats | None = None
        self._first_map: Tensor | None = None

    def enter_loop(self, loop: int, stats: LoopStats) -> None:
        """Name the loop that the next forward pass belongs to, and where to record it."""
        self.loop = loop
        # Not a submodule of the router: the layer owns it.
        object.__setattr__(self, "stats", stats)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts.

        Args:
            logits: [s, b, e].
            padding_mask: [s, b], true for padding that is left out of losses and counts.

        Returns:
            Weights [s * b, e], zero where not chosen, and the routing map [s * b, e].
        """
        logits = logits.view(-1, self.config.num_moe_experts)
        padding = None if padding_mask is None else padding_mask.reshape(-1)
        logits = self.apply_z_loss(logits, padding_mask=padding)
        scores = at_least_float32(logits).softmax(-1)
        choice = scores if self.expert_bias is None else scores + self.expert_bias
        experts = choice.topk(self.topk, dim=-1).indices
        weights = scores.gather(-1, experts)
        weights = (weights / weights.sum(-1, keepdim=True)).type_as(logits)
        probs = torch.zeros_like(logits).scatter(1, experts, weights)
        routing_map = torch.zeros_like(logits, dtype=torch.bool).scatter(1, experts, True)
        if self.training and torch.is_grad_enabled():
            self._record(logits, scores, routing_map)
            counted = routing_map if padding is None else routing_map & ~padding.unsqueeze(-1)
            visible = scores if padding is None else scores * ~padding.unsqueeze(-1)
            probs = self._apply_aux_loss(
                probs, visible, counted, with_padding_mask=padding is not None
            )
        self._apply_expert_bias(routing_map, padding_mask=padding)
        return probs, routing_map

    def _record(self, logits: Tensor, scores: Tensor, routing_map: Tensor) -> None:
        if self.loop == 1:
            self._first_map = routing_map
        if self.stats is not None:
            assert self._first_map is not None, "loop 1 comes first"
            self.stats.add_routing(self.loop, logits, scores, routing_map, self._first_map)
