"""The router of a looped layer: Megatron's top-k router, run once per loop.

It differs from ``TopKRouter`` in six ways. Products are in the precision of the model (where
Transformer Engine can be imported, Megatron takes its product even of local layers, which rounds
float32 to TF32 and so sends tokens elsewhere). Scores and weights are computed in at least float32
*and* in float64 when the model is (Megatron rounds them to float32, which would hide errors below
1e-7 from the tests). The aux-loss-free expert bias works with softmax scores. It knows its loop,
for the statistics; the losses of the loops are averaged by their coefficients
(megatron_config.py), and ``local_tokens_per_expert`` collects the counts of the loops that choose.
With shared routing (``moe_loop_routing``) only loop 1 chooses; later loops take its routing map,
which comes to them as an argument (block.py), and weigh its experts by their own logits. They have
a z loss, but nothing to balance.

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
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    get_tokens_per_expert_and_token_count,
    topk_routing_with_score_function,
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
        # Megatron makes it on the CPU, and moves it when it is first used.
        self.weight.data = self.weight.data.to(torch.cuda.current_device())
        self.chosen: Tensor | None = None
        """Routing map [t, e] of the forward pass, until ``leave``."""
        self._at: Pass | None = None
        self._chooses = True
        self._first_map: Tensor | None = None
        self._stats: list[LoopStats] = []  # in a list: not a submodule, the layer owns it

    def enter(self, at: Pass, first_map: Tensor | None, stats: LoopStats, chooses: bool) -> None:
        """Say what the next forward pass belongs to.

        Args:
            at: loop and micro batch.
            first_map: loop 1's routing map [t, e] of the same tokens, or None in loop 1.
            stats: where to record it.
            chooses: whether this loop chooses experts, or takes loop 1's.
        """
        assert chooses or first_map is not None, "loop 1 comes first"
        self._at, self._first_map, self._stats = at, first_map, [stats]
        self._chooses = chooses

    def leave(self) -> None:
        """Keep nothing of the pass that ``enter`` began."""
        self.chosen = self._first_map = None

    def gating(self, input: Tensor) -> Tensor:  # noqa: A002  the base class's name
        """Return logits [s, b, e] of a layer's input [s, b, d], in at least float32."""
        if input.dtype in (torch.float32, torch.float64):
            return F.linear(input, self.weight)
        return super().gating(input)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts, or weigh those of loop 1.

        Args:
            logits: [s, b, e].
            padding_mask: must be None; sequences are packed.

        Returns:
            Weights [s * b, e], zero where not chosen, and the routing map [s * b, e].
        """
        assert padding_mask is None, "sequences are packed, never padded"
        logits = logits.view(-1, self.config.num_moe_experts)
        scores = None
        if self._chooses:
            scores = at_least_float32(logits).softmax(-1)
            probs, routing_map = self._choose(logits, scores)
        else:
            probs, routing_map = self._weigh_first(logits)
        self.chosen = routing_map
        if self.training and torch.is_grad_enabled() and self._at is not None:
            aux_loss = None if scores is None else self._balancing_loss(scores, routing_map)
            probs = self._add_losses(probs, logits, aux_loss, routing_map)
        if self._chooses and not is_recomputing():
            self._apply_expert_bias(routing_map)
        if self.config.moe_router_padding_for_quantization:
            return probs, routing_map.clone()  # the dispatcher pads it in place
        return probs, routing_map

    def _best(self, scores: Tensor) -> Tensor:
        choice = scores if self.expert_bias is None else scores + self.expert_bias
        return choice.topk(self.topk, dim=-1).indices

    def _choose(self, logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.moe_router_fusion:  # one kernel of Transformer Engine; the same weights
            return topk_routing_with_score_function(logits, self.topk, fused=True)
        experts = self._best(scores)
        weights = scores.gather(-1, experts)
        weights = (weights / weights.sum(-1, keepdim=True)).type_as(logits)
        probs = torch.zeros_like(logits).scatter(1, experts, weights)
        return probs, _map_of(experts, logits)

    def _weigh_first(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weigh loop 1's experts: a softmax over them, as if their scores were renormalised."""
        assert self._first_map is not None
        masked = at_least_float32(logits).masked_fill(~self._first_map, float("-inf"))
        return masked.softmax(-1).type_as(logits), self._first_map

    def _balancing_loss(self, scores: Tensor, routing_map: Tensor) -> Tensor:
        counts, _, tokens = get_tokens_per_expert_and_token_count(
            routing_map, self.tp_cp_group, self.topk
        )
        share = counts.to(scores.dtype) / (self.topk * tokens)
        return scores.size(-1) * (share * scores.sum(0) / tokens).sum()

    def _add_losses(
        self, probs: Tensor, logits: Tensor, aux_loss: Tensor | None, routing_map: Tensor
    ) -> Tensor:
        """Hang this rank's share of the router losses on ``probs``, and record it."""
        assert self._at is not None
        tokens = logits.size(0) * self.tp_cp_group.size()
        z_loss = at_least_float32(logits).logsumexp(-1).square().sum() / tokens
        if self._stats[0].is_watching and not is_recomputing():
            self._record(logits, aux_loss, z_loss, routing_map)
        a, z = self.config.moe_aux_loss_coeff, self.config.moe_z_loss_coeff or 0.0
        if z == 0 and (a == 0 or aux_loss is None):
            return probs
        loss = z * z_loss if aux_loss is None else a * aux_loss + z * z_loss
        return MoEAuxLossAutoScaler.apply(probs, loss * self._at.loss_tokens)

    @torch.no_grad()
    def _record(
        self, logits: Tensor, aux_loss: Tensor | None, z_loss: Tensor, routing_map: Tensor
    ) -> None:
        """Take statistics; a loop that does not choose is asked what it would have chosen."""
        assert self._at is not None
        first = routing_map if self._first_map is None else self._first_map
        own = routing_map
        if not self._chooses:
            own = _map_of(self._best(at_least_float32(logits).softmax(-1)), logits)
        self._stats[0].add_routing(
            self._at.loop, aux_loss, z_loss, own, first, self.tp_cp_group.size()
        )


def _map_of(experts: Tensor, logits: Tensor) -> Tensor:
    """Return the routing map [t, e] of the chosen experts [t, top_k]."""
    return torch.zeros_like(logits, dtype=torch.bool).scatter(1, experts, True)
