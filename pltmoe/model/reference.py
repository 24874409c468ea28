"""The whole Parallel Loop Transformer in plain PyTorch, on one device. Read this first.

It is the specification that every other implementation here is tested against (loss and gradients,
float64), so it prefers being obvious to being fast: attention builds full masks, experts run in a
Python loop. Parameter names are those of the Hugging Face export.

Letters: b sequences, s slots, d hidden, h query heads, g KV heads, k head size, e experts.
Formulas: arXiv 2510.24824, section 3; choices where the paper is silent are named at their place.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pltmoe.config.model import ModelConfig
from pltmoe.model.cross_loop import next_loop_input, window_mask

KeyValue = tuple[Tensor, Tensor]


@dataclass
class RouterRecord:
    """What one router did in one loop: logits [tokens, e] and chosen experts [tokens, top_k]."""

    loop: int
    layer: int
    logits: Tensor
    experts: Tensor


@dataclass
class ReferenceOutput:
    """Logits [b, s, vocab], H_1 .. H_L before the final norm, and every router call."""

    logits: Tensor
    loop_hidden: list[Tensor] = field(default_factory=list)
    routers: list[RouterRecord] = field(default_factory=list)


def at_least_float32(x: Tensor) -> Tensor:
    """Promote half precision; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the statistics in at least float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        wide = at_least_float32(x)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(
            x.dtype
        )


def rope_angles(m: ModelConfig, num_slots: int, device: torch.device) -> Tensor:
    """Return angles [s, k/2] in float32, as transformers and Megatron-core compute them."""
    exponent = torch.arange(0, m.head_dim, 2, dtype=torch.float32, device=device) / m.head_dim
    slots = torch.arange(num_slots, dtype=torch.float32, device=device)
    return torch.outer(slots, 1.0 / m.rope_theta**exponent)


def apply_rope(x_bhsk: Tensor, angles: Tensor) -> Tensor:
    """Rotate the two halves of each head (Qwen convention: not interleaved)."""
    doubled = torch.cat([angles, angles], dim=-1)
    cos, sin = doubled.cos().to(x_bhsk.dtype), doubled.sin().to(x_bhsk.dtype)
    left, right = x_bhsk.chunk(2, dim=-1)
    return x_bhsk * cos + torch.cat([-right, left], dim=-1) * sin


def attend(q_bhsk: Tensor, k_bgsk: Tensor, v_bgsk: Tensor, visible_ss: Tensor) -> Tensor:
    """Softmax attention under an explicit mask; KV heads are repeated for their query heads."""
    groups = q_bhsk.size(1) // k_bgsk.size(1)
    k, v = k_bgsk.repeat_interleave(groups, 1), v_bgsk.repeat_interleave(groups, 1)
    scores = q_bhsk @ k.transpose(-1, -2) / q_bhsk.size(-1) ** 0.5
    return scores.masked_fill(~visible_ss, float("-inf")).softmax(-1) @ v


class Gate(nn.Module):
    """g = sigmoid(f_gate(.)): one scalar per head and token, zero at init (g = 0.5)."""

    def __init__(self, num_heads: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads, size))
        self.bias = nn.Parameter(torch.zeros(num_heads))

    def forward(self, q_bhsk: Tensor, x_bsd: Tensor | None) -> Tensor:
        """Return g [b, h, s, 1] from the query after RoPE or, if given, from hidden states."""
        if x_bsd is None:
            logit = torch.einsum("bhsk,hk->bhs", q_bhsk, self.weight)
        else:
            logit = torch.einsum("bsd,hd->bhs", x_bsd, self.weight)
        return torch.sigmoid(logit + self.bias[:, None]).unsqueeze(-1)


class Attention(nn.Module):
    """Self-attention of one layer in any loop; in later loops gated sliding-window attention."""

    def __init__(self, m: ModelConfig):
        super().__init__()
        self.m = m
        q_size, kv_size = m.num_attention_heads * m.head_dim, m.num_kv_heads * m.head_dim
        self.q_proj = nn.Linear(m.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(m.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(m.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, m.hidden_size, bias=False)
        if m.qk_norm:
            self.q_norm, self.k_norm = (
                RMSNorm(m.head_dim, m.norm_eps),
                RMSNorm(m.head_dim, m.norm_eps),
            )
        if m.gated_swa:
            gate_input = m.hidden_size if m.gate_use_hidden_states else m.head_dim
            self.plt_gate = Gate(m.num_attention_heads, gate_input)

    def forward(
        self, x_bsd: Tensor, angles: Tensor, loop: int, first_kv: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        """Return the output [b, s, d] and this loop's own (K, V), each [b, g, s, k]."""
        b, s, _ = x_bsd.shape
        m, heads = self.m, (b, s, -1, self.m.head_dim)
        q, k, v = (proj(x_bsd).view(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if m.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        q, k = apply_rope(q, angles), apply_rope(k, angles)
        causal = window_mask(s, window_keys=s, device=x_bsd.device)
        if loop == 1 or not m.share_first_loop_kv:
            y = attend(q, k, v, causal)
        else:
            assert first_kv is not None, "loop 1 comes first"
            y = attend(q, *first_kv, causal)
            if m.gated_swa:
                y_local = attend(q, k, v, window_mask(s, m.window_keys, x_bsd.device))
                g = self.plt_gate(q, x_bsd if m.gate_use_hidden_states else None)
                y = g * y_local + (1 - g) * y
        return self.o_proj(y.transpose(1, 2).reshape(b, s, -1)), (k, v)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, ffn_hidden_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(ffn_hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """down(silu(gate(x)) * up(x))."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Linear):
    """Softmax scores; top-k chosen by score + expert bias, weighted by the renormalised scores."""

    e_score_correction_bias: Tensor

    def __init__(self, m: ModelConfig):
        assert m.num_experts is not None and m.moe_top_k is not None
        super().__init__(m.hidden_size, m.num_experts, bias=False)
        self.top_k = m.moe_top_k
        if m.moe_expert_bias_update_rate > 0:
            self.register_buffer("e_score_correction_bias", torch.zeros(m.num_experts))

    def choose(
        self, x_td: Tensor, first_experts: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits [t, e], chosen experts [t, top_k] and their weights [t, top_k].

        With ``first_experts``, what loop 1 chose for the same tokens, only the weights are this
        loop's own. A softmax over the chosen logits is the renormalised scores, and is never 0 / 0
        where this loop would have chosen quite different experts.
        """
        logits = at_least_float32(self(x_td))
        if first_experts is not None:
            weights = logits.gather(-1, first_experts).softmax(-1)
            return logits, first_experts, weights.to(x_td.dtype)
        scores = logits.softmax(-1)
        bias = getattr(self, "e_score_correction_bias", 0.0)
        experts = (scores + bias).topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, experts)
        return logits, experts, (weights / weights.sum(-1, keepdim=True)).to(x_td.dtype)


class MoE(nn.Module):
    """Dropless mixture of experts."""

    def __init__(self, m: ModelConfig):
        super().__init__()
        assert m.num_experts is not None and m.moe_ffn_hidden_size is not None
        self.gate = Router(m)
        self.experts = nn.ModuleList(
            MLP(m.hidden_size, m.moe_ffn_hidden_size) for _ in range(m.num_experts)
        )

    def forward(
        self, x_bsd: Tensor, first_experts: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output [b, s, d], router logits [t, e] and chosen experts [t, top_k]."""
        x_td = x_bsd.flatten(0, 1)
        logits, chosen, weights = self.gate.choose(x_td, first_experts)
        out = torch.zeros_like(x_td)
        for index, expert in enumerate(self.experts):
            token, rank = (chosen == index).nonzero(as_tuple=True)
            out = out.index_add(0, token, expert(x_td[token]) * weights[token, rank, None])
        return out.view_as(x_bsd), logits, chosen


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual connection."""

    def __init__(self, m: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(m.hidden_size, m.norm_eps)
        self.self_attn = Attention(m)
        self.post_attention_layernorm = RMSNorm(m.hidden_size, m.norm_eps)
        self.mlp = MoE(m) if m.is_moe else MLP(m.hidden_size, m.ffn_hidden_size or 0)


class Decoder(nn.Module):
    """Embedding, the looped stack, and the final norm."""

    def __init__(self, m: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(m.vocab_size, m.hidden_size)
        self.layers = nn.ModuleList(Layer(m) for _ in range(m.num_layers))
        self.norm = RMSNorm(m.hidden_size, m.norm_eps)


class ReferencePLT(nn.Module):
    """The language model: tokens [b, s] to logits [b, s, vocab], through L loops."""

    def __init__(self, m: ModelConfig):
        super().__init__()
        self.m, self.model = m, Decoder(m)
        self.lm_head = nn.Linear(m.hidden_size, m.vocab_size, bias=False)
        if m.tied_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens_bs: Tensor, starts_document: Tensor | None = None) -> ReferenceOutput:
        """Run all loops. ``starts_document`` [b, s] resets the shift inside packed sequences."""
        m, out = self.m, ReferenceOutput(logits=torch.empty(0))
        if starts_document is None:
            starts_document = torch.zeros_like(tokens_bs, dtype=torch.bool)
        embedding = self.model.embed_tokens(tokens_bs)
        angles = rope_angles(m, tokens_bs.size(1), tokens_bs.device)
        first_kv: list[KeyValue] = []
        h = embedding
        for loop in range(1, m.num_loops + 1):
            if loop > 1 and m.cross_loop_shift:
                previous = self.model.norm(h) if m.normalize_per_loop else h
                h = next_loop_input(
                    embedding, previous, starts_document, 1, m.emb_scale, m.hidden_scale
                )
            h = self._run_stack(h, angles, loop, first_kv, out)
            out.loop_hidden.append(h)
        out.logits = self.lm_head(self.model.norm(h))
        return out

    def _run_stack(
        self, h: Tensor, angles: Tensor, loop: int, first_kv: list[KeyValue], out: ReferenceOutput
    ) -> Tensor:
        for index, layer in enumerate(self.model.layers):
            lent = first_kv[index] if loop > 1 else None
            y, kv = layer.self_attn(layer.input_layernorm(h), angles, loop, lent)
            if loop == 1:
                first_kv.append(kv)
            h = h + y
            x = layer.post_attention_layernorm(h)
            if self.m.is_moe:
                # Records stand in the order of loops and layers, so the first are loop 1's.
                chosen = out.routers[index].experts if loop > self.m.choosing_loops else None
                y, logits, experts = layer.mlp(x, chosen)
                out.routers.append(RouterRecord(loop, index + 1, logits, experts))
            else:
                y = layer.mlp(x)
            h = h + y
        return h


def language_model_loss(logits_bsv: Tensor, labels_bs: Tensor) -> Tensor:
    """Mean next-token cross entropy of the last loop; labels are already shifted."""
    return F.cross_entropy(at_least_float32(logits_bsv).flatten(0, 1), labels_bs.flatten())


def load_balancing_loss(record: RouterRecord, m: ModelConfig) -> Tensor:
    """Switch loss of one router call: e * sum_i f_i P_i (arXiv 2101.03961, eq. 4)."""
    assert m.num_experts is not None and m.moe_top_k is not None
    tokens = record.logits.size(0)
    counts = torch.bincount(record.experts.flatten(), minlength=m.num_experts)
    share = counts.to(record.logits.dtype) / (tokens * m.moe_top_k)
    return m.num_experts * (share * record.logits.softmax(-1).mean(0)).sum()


def router_loss(out: ReferenceOutput, m: ModelConfig) -> Tensor:
    """Auxiliary and z losses with their coefficients, summed over layers.

    The z loss is averaged over all loops, the auxiliary loss over those that choose experts.
    """
    total = out.logits.new_zeros(())
    for record in out.routers:
        z = record.logits.logsumexp(-1).square().mean()
        total = total + m.moe_z_loss_coeff / m.num_loops * z
        if record.loop <= m.choosing_loops:
            balance = load_balancing_loss(record, m)
            total = total + m.moe_aux_loss_coeff / m.choosing_loops * balance
    return total
