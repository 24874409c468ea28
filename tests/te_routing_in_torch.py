"""What Transformer Engine's kernels for routing compute, in PyTorch: see tests/te_in_torch.py.

The router's functions of ``transformer_engine_torch`` 2.20.2, and those of the Triton kernels that
take rows to experts and back.
"""

from typing import Any

import torch
from torch import Tensor


def topk_fwd(
    logits: Tensor, topk: int, use_pre_softmax: bool, num_groups: Any, group_topk: Any,
    scaling_factor: Any, score_function: str, expert_bias: Any, form: int, indices: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``fused_topk_with_score_function_fwd`` with a softmax over the chosen."""
    assert not (use_pre_softmax or num_groups or group_topk or scaling_factor) and indices is None
    assert score_function == "softmax" and expert_bias is None and form == 0
    best, experts = logits.float().topk(topk, -1)
    probs = torch.zeros_like(logits, dtype=torch.float32).scatter(1, experts, best.softmax(-1))
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, experts, True)
    return probs.to(logits.dtype), chosen, probs


def topk_bwd(chosen: Tensor, probs: Tensor, dprobs: Tensor, dlogits: Tensor, *how: Any) -> None:
    """Write the gradient of the logits."""
    dprobs = dprobs.float() * chosen
    dlogits.copy_(probs * (dprobs - (probs * dprobs).sum(-1, keepdim=True)))


def score_fwd(
    logits: Tensor, topk: int, score_function: str, routing_map_format: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``fused_score_for_moe_aux_loss_fwd``: softmax over all experts, and the chosen."""
    assert score_function == "softmax" and routing_map_format == 0
    scores = logits.float().softmax(-1)
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.topk(topk, -1)[1], True)
    return scores, chosen, scores


def score_bwd(
    intermediate_output: Tensor, grad_scores: Tensor, grad_logits: Tensor, **_: Any
) -> None:
    """``fused_score_for_moe_aux_loss_bwd``."""
    scores = intermediate_output
    along = (scores * grad_scores).sum(-1, keepdim=True)
    grad_logits.copy_(scores * (grad_scores - along))


def fused_moe_aux_loss_fwd(
    probs: Tensor, tokens_per_expert: Tensor, total_num_tokens: Any, num_experts: int, topk: int,
    coeff: float, **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the balancing loss, and its factor."""
    one = torch.ones((), device=probs.device)
    factor = one * (num_experts * coeff / topk) / total_num_tokens / total_num_tokens
    return ((probs.float().sum(0) * tokens_per_expert).sum() * factor).to(probs.dtype), factor


fused_moe_aux_loss_fwd_graph_safe = fused_moe_aux_loss_fwd


def fused_moe_aux_loss_bwd(
    Const_buf: Tensor, tokens_per_expert: Tensor, num_rows: int, num_cols: int,
    grad_aux_loss: Tensor,
) -> Tensor:  # fmt: skip
    """Return the gradient of the scores, the same for every token."""
    return (tokens_per_expert * Const_buf * grad_aux_loss).expand(num_rows, num_cols).contiguous()


# Rows to experts and back: what Triton kernels do.


def _routes(row_id_map: Tensor, pad_offsets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return token, expert and row among the permuted, for every pair of token and expert."""
    experts = row_id_map.size(1) // 2
    used = torch.arange(experts) < row_id_map[:, -1:]
    tokens, expert = used.nonzero()[:, 0], row_id_map[:, experts:-1][used].long()
    rows = row_id_map[:, :experts][used].long()
    return tokens, expert, rows if pad_offsets is None else rows + pad_offsets[expert]


def make_row_id_map(routing_map: Tensor, tokens: int, experts: int) -> Tensor:
    """Return rows, experts and their number for every token, in the kernel's form."""
    routing_map = routing_map.bool()
    order = (~routing_map).int().argsort(dim=-1, stable=True)
    rows = routing_map.T.reshape(-1).cumsum(0).view(experts, tokens).T - 1
    found = torch.cat((rows.gather(1, order), order, routing_map.sum(-1, keepdim=True)), -1)
    return found.int()


def permute_with_mask_map(
    x: Tensor, row_id_map: Tensor, probs: Any, scale: Any, pad_offsets: Any, tokens: int,
    experts: int, rows_out: int, width: int, scale_width: Any,
) -> tuple[Tensor, None, Tensor | None]:  # fmt: skip
    """Copy a token's numbers to the rows of its experts; its weights with them."""
    assert scale is None
    token, expert, row = _routes(row_id_map, pad_offsets)
    out, out_probs = x.new_zeros(rows_out, width), None
    out[row] = x[token]
    if probs is not None:
        out_probs = probs.new_zeros(rows_out)
        out_probs[row] = probs[token, expert]
    return out, None, out_probs


def unpermute_with_mask_map(
    x: Tensor, row_id_map: Tensor, weights: Any, probs: Any, pad_offsets: Any, tokens: int,
    experts: int, width: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Add up a token's rows, weighted or not."""
    token, expert, row = _routes(row_id_map, pad_offsets)
    found = x[row].float()
    if weights is not None:
        found = found * weights[token, expert, None].float()
    out = torch.zeros(tokens, width).index_add_(0, token, found).to(x.dtype)
    if probs is None:
        return out, None
    out_probs = probs.new_zeros(tokens, experts)
    out_probs[token, expert] = probs[row]
    return out, out_probs


def unpermute_with_mask_map_bwd_with_merging_probs(
    dy: Tensor, row_id_map: Tensor, x: Tensor, weights: Tensor, pad_offsets: Any, tokens: int,
    experts: int, rows_out: int, width: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return gradients of the rows and of the weights."""
    token, expert, row = _routes(row_id_map, pad_offsets)
    dx, dweights = dy.new_zeros(rows_out, width), weights.new_zeros(tokens, experts)
    dx[row] = (dy[token].float() * weights[token, expert, None].float()).to(dy.dtype)
    dots = (dy[token].float() * x[row].float()).sum(-1)
    dweights[token, expert] = dots.to(weights.dtype)
    return dx, dweights


def make_chunk_sort_map(sizes: Tensor, order: Tensor, rows: int, chunks: int) -> Tensor:
    """Return where every row goes when chunks of ``sizes`` rows are put into ``order``."""
    starts = sizes.cumsum(0) - sizes
    source = torch.cat([torch.arange(int(sizes[i])) + int(starts[i]) for i in order.tolist()])
    return torch.empty(rows, dtype=torch.int32).scatter_(0, source, torch.arange(rows).int())


def sort_chunks_by_map(
    x: Tensor, row_map: Tensor, probs: Tensor | None, rows: int, width: int, is_forward: bool
) -> tuple[Tensor, Tensor | None]:
    """Move rows, and their weights, there or back."""
    order = row_map.long().argsort() if is_forward else row_map.long()
    return x[order], None if probs is None else probs[order]
