"""All experts of a rank in two grouped products: what a GPU without Transformer Engine runs.

Letters: r rows (tokens x top-k) sorted by expert, e experts here, i and o inputs and outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor
from torch.autograd.function import once_differentiable


class GroupedExperts(SequentialMLP):
    """Megatron's experts, multiplied all at once.

    Parameters, their names and their shards are SequentialMLP's, one pair per expert, so that
    checkpoints do not depend on which of both ran.
    """

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``weight * down(silu(gate(x)) * up(x))`` [r, d] of rows sorted by expert.

        Args:
            permuted_local_hidden_states: rows [r, d].
            tokens_per_expert: rows of each expert [e].
            permuted_probs: routing weights of the rows [r].
        """
        x_rd = permuted_local_hidden_states
        if x_rd.size(0) == 0:  # every weight still gets its gradient: zero
            return super().forward(x_rd, tokens_per_expert, permuted_probs)
        # Counts are on the host where tokens came from other ranks. Without a wait: the copy of a
        # few bytes that are not pinned has been read when the call returns.
        ends_e = tokens_per_expert.cumsum(0, dtype=torch.int32).to(x_rd.device, non_blocking=True)
        first = [expert.linear_fc1.weight for expert in self.local_experts]
        second = [expert.linear_fc2.weight for expert in self.local_experts]
        gate_up_rf = GroupedLinear.apply(x_rd, ends_e, *first)
        h_rf = weighted_bias_swiglu_impl(gate_up_rf, None, permuted_probs.unsqueeze(-1))
        return GroupedLinear.apply(h_rf, ends_e, *second), None


class GroupedLinear(torch.autograd.Function):
    """Rows of each expert times its weight [o, i], as one product.

    The weights are stacked for the product and only for it: kept by autograd, a copy of all
    experts would stay for every layer and loop until its backward.
    """

    @staticmethod
    def forward(ctx: Any, x_ri: Tensor, ends_e: Tensor, *weights_oi: Tensor) -> Tensor:
        """Return y [r, o]; the rows of expert j end at ``ends_e[j]``."""
        ctx.save_for_backward(x_ri, ends_e, *weights_oi)
        return F.grouped_mm(x_ri, torch.stack(weights_oi).transpose(1, 2), offs=ends_e)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ro: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients of the rows and of each weight."""
        x_ri, ends_e, *weights_oi = ctx.saved_tensors
        dy_ro = dy_ro.contiguous()
        dx_ri = F.grouped_mm(dy_ro, torch.stack(weights_oi), offs=ends_e)
        dw_eoi = F.grouped_mm(dy_ro.t(), x_ri, offs=ends_e)
        return dx_ri, None, *dw_eoi.unbind()
