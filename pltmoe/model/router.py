"""The router of a looped layer: Megatron's top-k router, run once per loop.

It differs from ``TopKRouter`` in four ways. Scores and weights are computed in at least float32
*and* in float64 when the model is (Megatron rounds them to float32, which would hide errors below
1e-7 from the tests). The aux-loss-free expert bias works with softmax scores. And it knows its
loop, for the statistics; the losses of all loops are averaged by their coefficients
(megatron_config.py), and ``local_tokens_per_expert`` collects the counts of all loops.

And its losses are the same number on every layout. For a micro batch of t tokens, n of them with a
loss, top-k of E experts, c_e the tokens that chose expert e, p and x a token's scores and logits:

    (a * E * sum_e c_e / (k t) * mean_t p_e  +  z * mean_t logsumexp(x)^2)  *  n

Each rank adds its own tokens' share of the means, so the sum over the ranks that share a sequence
(tensor x context parallel) is the whole, as it is for the token losses. The factor n makes up for
the division by the loss tokens of the global batch that follows. Megatron sets a global scale for
this at each forward pass, which in a pipeline belongs to another micro batch by the time of the
backward pass.
"""

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    get_tokens_per_expert_and_token_count,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from pltmoe.model.gated_attention import Pass
from pltmoe.model.loop_stats import LoopStats
from pltmoe.model.recompute import is_recomputing
from pltmoe.model.reference import at_least_float32


class LoopRouter(TopKRouter):
    """Softmax top-k with renormalised weights, chosen by score + expert bias."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.chosen: Tensor | None = None
        """Routing map [t, e] of the last forward pass."""
        self._at: Pass | None = None
        self._first_map: Tensor | None = None
        self._stats: list[LoopStats] = []  # in a list: not a submodule, the layer owns it

    def enter(self, at: Pass, first_map: Tensor | None, stats: LoopStats) -> None:
        """Say what the next forward pass belongs to.

        Args:
            at: loop and micro batch.
            first_map: loop 1's routing map [t, e] of the same tokens, or None in loop 1.
            stats: where to record it.
        """
        self._at, self._first_map, self._stats = at, first_map, [stats]

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts.

        Args:
            logits: [s, b, e].
            padding_mask: must be None; sequences are packed.

        Returns:
            Weights [s * b, e], zero where not chosen, and the routing map [s * b, e].
        """
        assert padding_mask is None, "sequences are packed, never padded"
        logits = logits.view(-1, self.config.num_moe_experts)
        scores = at_least_float32(logits).softmax(-1)
        choice = scores if self.expert_bias is None else scores + self.expert_bias
        experts = choice.topk(self.topk, dim=-1).indices
        weights = scores.gather(-1, experts)
        weights = (weights / weights.sum(-1, keepdim=True)).type_as(logits)
        probs = torch.zeros_like(logits).scatter(1, experts, weights)
        routing_map = torch.zeros_like(logits, dtype=torch.bool).scatter(1, experts, True)
        self.chosen = routing_map
        if self.training and torch.is_grad_enabled() and self._at is not None:
            probs = self._add_losses(probs, logits, scores, routing_map)
        if not is_recomputing():
            self._apply_expert_bias(routing_map)
        return probs, routing_map

    def _add_losses(
        self, probs: Tensor, logits: Tensor, scores: Tensor, routing_map: Tensor
    ) -> Tensor:
        """Hang this rank's share of the router losses on ``probs``, and record it."""
        assert self._at is not None
        counts, _, tokens = get_tokens_per_expert_and_token_count(
            routing_map, self.tp_cp_group, self.topk
        )
        share = counts.to(scores.dtype) / (self.topk * tokens)
        aux_loss = scores.size(-1) * (share * scores.sum(0) / tokens).sum()
        z_loss = at_least_float32(logits).logsumexp(-1).square().sum() / tokens
        if not is_recomputing():
            first = routing_map if self._first_map is None else self._first_map
            self._stats[0].add_routing(
                self._at.loop, aux_loss, z_loss, routing_map, first, self.tp_cp_group.size()
            )
        a, z = self.config.moe_aux_loss_coeff, self.config.moe_z_loss_coeff or 0.0
        if a == z == 0:
            return probs
        return MoEAuxLossAutoScaler.apply(probs, (a * aux_loss + z * z_loss) * self._at.loss_tokens)
