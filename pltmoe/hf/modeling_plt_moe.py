"""The Parallel Loop Transformer (arXiv 2510.24824) for transformers 5.

This file ships with the weights: it imports nothing but torch and transformers.

The whole layer stack f runs L times per token with the same weights:

    loop 1:      H_1 = f(E)                               ordinary causal attention
    loop l > 1:  H_l = f(a E + b shift(H_{l-1}))          shift: one slot to the right
                 attention reads loop 1's keys and values (global) and, through a gate g, a sliding
                 window over this loop's own:  y = g local + (1 - g) global
    logits = head(norm(H_L))

Letters: b sequences, s slots of this call, d hidden, h query heads, g KV heads, k head size,
n keys, e experts, t tokens. Loops run one after another, also when decoding.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging

from .configuration_plt_moe import PLTMoEConfig

logger = logging.get_logger(__name__)

KeyValue = tuple[Tensor, Tensor]

WINDOW_CHUNK = 256
"""Queries per piece of the sliding window: masks cost s * (window + chunk), not s * s."""


def at_least_float32(x: Tensor) -> Tensor:
    """Promote half precision; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class WindowLayer(DynamicLayer):
    """Keys and values of the last ``window_keys`` - 1 slots: what the next query can still see."""

    is_sliding = True
    is_croppable = False

    def __init__(self, window_keys: int):
        super().__init__()
        self.window_keys = window_keys

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> KeyValue:
        """Return the kept and the new keys and values; keep the last of them."""
        k, v = super().update(key_states, value_states)
        first_kept = max(k.size(-2) - (self.window_keys - 1), 0)
        self.keys, self.values = k[..., first_kept:, :], v[..., first_kept:, :]
        if k.size(-2) > 2 * self.window_keys:  # after a prefill: let go of the long tensors
            self.keys, self.values = self.keys.clone(), self.values.clone()
        return k, v


class PLTMoECache(Cache):
    """Cache of all loops.

    Loop 1 keeps every slot. A later loop keeps the window (G-SWA), nothing (shared keys and values
    without a window), or every slot (nothing shared). The cross-loop shift needs one more thing:
    what each loop but the last hands on at the newest slot, ``last_hidden`` [b, d].
    """

    def __init__(self, config: PLTMoEConfig):
        self.num_layers = config.num_hidden_layers
        layers = [DynamicLayer() for _ in range(self.num_layers)]
        for _ in range((config.plt_num_loops - 1) * self.num_layers):
            if config.plt_gated_swa:
                layers.append(WindowLayer(config.window_keys))
            elif not config.plt_share_first_loop_kv:
                layers.append(DynamicLayer())
        super().__init__(layers=layers)
        self.last_hidden: list[Tensor | None] = [None] * (config.plt_num_loops - 1)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,
        loop: int = 1,
        **kwargs: Any,
    ) -> KeyValue:
        """Add keys and values [b, g, s, k] of one layer in one loop; return those to attend to."""
        return super().update(key_states, value_states, (loop - 1) * self.num_layers + layer_idx)

    def exchange_hidden(self, loop: int, newest: Tensor) -> Tensor | None:
        """Return what ``loop`` handed on at the last slot so far, and keep ``newest`` [b, d]."""
        previous, self.last_hidden[loop - 1] = self.last_hidden[loop - 1], newest.clone()
        return previous

    def num_bytes(self) -> int:
        """Return the bytes of all keys, values and hidden vectors kept now."""
        kept = [x for layer in self.layers for x in (layer.keys, layer.values) if x is not None]
        kept += [x for x in self.last_hidden if x is not None]
        return sum(x.numel() * x.element_size() for x in kept)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.last_hidden = [None] * len(self.last_hidden)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take over the batch order of a beam search."""
        super().reorder_cache(beam_idx)
        self._map_hidden(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence of the batch."""
        super().batch_repeat_interleave(repeats)
        self._map_hidden(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences of the batch."""
        super().batch_select_indices(indices)
        self._map_hidden(lambda x: x[indices])

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: windows and hidden vectors of earlier slots are gone."""
        raise NotImplementedError(
            "PLTMoECache cannot be cropped: the later loops keep only their window and the last "
            "hidden vectors. Assisted decoding is not supported; start again from an empty cache."
        )

    def _map_hidden(self, function: Any) -> None:
        self.last_hidden = [None if x is None else function(x) for x in self.last_hidden]


@dataclass
class Piece:
    """Queries that attend together: ``keys`` is the slice they need, ``mask`` what they see of it.

    ``mask`` is bool [b or 1, 1, queries, keys]; None with ``is_causal`` false: everything.
    """

    queries: slice
    keys: slice
    mask: Tensor | None
    is_causal: bool = False


class Visibility:
    """Which slots the queries of one call see: all before them, less padding and other documents.

    Built once per call and shared by all layers and loops. ``everything`` is causal attention, its
    keys begin at slot 0; ``window`` is the sliding window, its keys begin where a WindowLayer's do.
    """

    def __init__(
        self,
        past: int,
        num_slots: int,
        window_keys: int | None,
        device: torch.device,
        valid: Tensor | None = None,
        documents: Tensor | None = None,
    ):
        self.past, self.device, self.valid, self.documents = past, device, valid, documents
        self.everything = self.window = [self._piece(0, num_slots, 0, None)]
        if window_keys is not None and past + num_slots > window_keys:
            first_key = max(past - (window_keys - 1), 0)
            step = max(WINDOW_CHUNK, window_keys)
            self.window = [
                self._piece(start, min(start + step, num_slots), first_key, window_keys)
                for start in range(0, num_slots, step)
            ]

    def _piece(self, start: int, stop: int, first_key: int, window_keys: int | None) -> Piece:
        key_start, key_stop = first_key, self.past + stop
        if window_keys is not None:
            key_start = max(first_key, self.past + start - (window_keys - 1))
        queries = slice(start, stop)
        keys = slice(key_start - first_key, key_stop - first_key)
        if self.valid is None and self.documents is None:
            if stop - start == 1:
                return Piece(queries, keys, None)
            if window_keys is None and self.past == 0:
                return Piece(queries, keys, None, is_causal=True)
        query_slots = torch.arange(self.past + start, self.past + stop, device=self.device)
        key_slots = torch.arange(key_start, key_stop, device=self.device)
        return Piece(queries, keys, self._mask(query_slots, key_slots, window_keys))

    def _mask(self, query_slots: Tensor, key_slots: Tensor, window_keys: int | None) -> Tensor:
        distance = query_slots[:, None] - key_slots[None, :]
        seen = (distance >= 0)[None]
        if window_keys is not None:
            seen = seen & (distance < window_keys)
        if self.valid is not None:
            seen = seen & self.valid[:, None, key_slots]
        if self.documents is not None:
            seen = seen & (
                self.documents[:, query_slots, None] == self.documents[:, None, key_slots]
            )
        return (seen | (distance == 0)).unsqueeze(1)  # padding sees itself: no empty softmax


def rotate(x_bhsk: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Apply RoPE to the two halves of each head; cos and sin are [b or 1, 1, s, k]."""
    left, right = x_bhsk.chunk(2, dim=-1)
    return x_bhsk * rope[0] + torch.cat([-right, left], dim=-1) * rope[1]


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, piece: Piece) -> Tensor:
    """Attention by PyTorch's fused kernels."""
    repeat = q.size(1) // k.size(1)
    mask = None if piece.mask is None else piece.mask.to(q.device)
    if mask is not None and repeat > 1:  # masked GQA falls back to the slow kernel on GPUs
        k, v, repeat = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1), 1
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=piece.is_causal, enable_gqa=repeat > 1
    )


def attend_eager(q: Tensor, k: Tensor, v: Tensor, piece: Piece) -> Tensor:
    """Attention written out."""
    repeat = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = q @ k.transpose(-1, -2) / q.size(-1) ** 0.5
    mask = piece.mask
    if piece.is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask.to(q.device), float("-inf"))
    return at_least_float32(scores).softmax(-1).to(v.dtype) @ v


ATTEND = {"sdpa": attend_sdpa, "eager": attend_eager}


class PLTMoERMSNorm(nn.Module):
    """x / rms(x) * weight, the statistics in at least float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        wide = at_least_float32(x)
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


class PLTMoEGate(nn.Module):
    """g = sigmoid(weight . x + bias): one scalar per head and token, on the local branch."""

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


class PLTMoEAttention(nn.Module):
    """Self-attention of one layer in any loop."""

    def __init__(self, config: PLTMoEConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        hidden, heads, size = config.hidden_size, config.num_attention_heads, config.head_dim
        kv_size = config.num_key_value_heads * size
        self.q_proj = nn.Linear(hidden, heads * size, bias=False)
        self.k_proj = nn.Linear(hidden, kv_size, bias=False)
        self.v_proj = nn.Linear(hidden, kv_size, bias=False)
        self.o_proj = nn.Linear(heads * size, hidden, bias=False)
        if config.use_qk_norm:
            self.q_norm = PLTMoERMSNorm(size, config.rms_norm_eps)
            self.k_norm = PLTMoERMSNorm(size, config.rms_norm_eps)
        if config.plt_gated_swa:
            self.plt_gate = PLTMoEGate(heads, hidden if config.plt_gate_use_hidden_states else size)

    def forward(
        self,
        x_bsd: Tensor,
        first_kv: KeyValue | None,
        loop: int,
        rope: tuple[Tensor, Tensor],
        visibility: Visibility,
        cache: PLTMoECache | None,
    ) -> tuple[Tensor, KeyValue | None]:
        """Return the output [b, s, d] and, in loop 1, the keys and values of all slots so far."""
        q = self._heads(self.q_proj(x_bsd))
        q = rotate(self.q_norm(q) if self.config.use_qk_norm else q, rope)
        kv = None
        if loop == 1 or not self.config.plt_share_first_loop_kv:
            kv = self._keys_values(x_bsd, loop, rope, cache)
            y = self._attend(q, kv, visibility.everything)
        else:
            y = self._attend(q, first_kv, visibility.everything)
            if self.config.plt_gated_swa:
                own = self._keys_values(x_bsd, loop, rope, cache)
                local = self._attend(q, own, visibility.window)
                g = self.plt_gate(q, x_bsd if self.config.plt_gate_use_hidden_states else None)
                y = g * local + (1 - g) * y
        y_bsd = self.o_proj(y.transpose(1, 2).flatten(2))
        return y_bsd, kv if loop == 1 else None

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

    def _keys_values(
        self, x_bsd: Tensor, loop: int, rope: tuple[Tensor, Tensor], cache: PLTMoECache | None
    ) -> KeyValue:
        k, v = self._heads(self.k_proj(x_bsd)), self._heads(self.v_proj(x_bsd))
        k = rotate(self.k_norm(k) if self.config.use_qk_norm else k, rope)
        return (k, v) if cache is None else cache.update(k, v, self.layer_idx, loop=loop)

    def _attend(self, q: Tensor, kv: KeyValue, pieces: list[Piece]) -> Tensor:
        attend = ATTEND[self.config._attn_implementation or "sdpa"]
        k, v = kv
        parts = [
            attend(q[:, :, piece.queries], k[:, :, piece.keys], v[:, :, piece.keys], piece)
            for piece in pieces
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class PLTMoEMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """down(silu(gate(x)) * up(x))."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class PLTMoERouter(nn.Module):
    """Softmax scores; top-k chosen by score + expert bias, weighted by the scores."""

    def __init__(self, config: PLTMoEConfig):
        super().__init__()
        self.top_k, self.renormalise = config.num_experts_per_tok, config.norm_topk_prob
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        if config.use_expert_bias:
            bias = torch.zeros(config.num_experts, dtype=torch.float32)
            self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x_td: Tensor) -> tuple[Tensor, Tensor]:
        """Return chosen experts [t, top_k] and their weights [t, top_k]."""
        # In float32 from the logits on, as in training: bf16 logits would choose other experts.
        scores = F.linear(at_least_float32(x_td), at_least_float32(self.weight)).softmax(-1)
        bias = getattr(self, "e_score_correction_bias", 0.0)
        experts = (scores + bias).topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, experts)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return experts, weights.to(x_td.dtype)


class PLTMoESparseBlock(nn.Module):
    """Mixture of experts: tokens are gathered per expert, only chosen experts run."""

    def __init__(self, config: PLTMoEConfig):
        super().__init__()
        self.gate = PLTMoERouter(config)
        self.experts = nn.ModuleList(
            PLTMoEMLP(config.hidden_size, config.moe_intermediate_size)
            for _ in range(config.num_experts)
        )

    def forward(self, x_bsd: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs [b, s, d]."""
        x_td = x_bsd.flatten(0, 1)
        chosen, weights = self.gate(x_td)
        order = chosen.flatten().argsort(stable=True)  # all (token, rank) pairs, expert by expert
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        out = torch.zeros_like(x_td)
        for expert, pairs in zip(self.experts, order.split(counts), strict=True):
            if pairs.numel():
                token = pairs // chosen.size(-1)
                y = expert(x_td[token]) * weights.flatten()[pairs, None]
                out = out.index_add(0, token, y)
        return out.view_as(x_bsd)


class PLTMoEDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward, each with a residual connection.

    Loop 1's keys and values are outputs of this layer, and inputs of it in later loops, so that
    gradients reach them through a checkpointed region of either kind (reentrant or not).
    """

    def __init__(self, config: PLTMoEConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = PLTMoERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = PLTMoEAttention(config, layer_idx)
        self.post_attention_layernorm = PLTMoERMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.num_experts:
            self.mlp = PLTMoESparseBlock(config)
        else:
            self.mlp = PLTMoEMLP(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        h_bsd: Tensor,
        first_k: Tensor | None,
        first_v: Tensor | None,
        loop: int,
        rope: tuple[Tensor, Tensor],
        visibility: Visibility,
        past_key_values: PLTMoECache | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the residual stream and, in loop 1, keys and values of all slots so far."""
        y, kv = self.self_attn(
            self.input_layernorm(h_bsd),
            (first_k, first_v),
            loop,
            rope,
            visibility,
            past_key_values,
        )
        h_bsd = h_bsd + y
        h_bsd = h_bsd + self.mlp(self.post_attention_layernorm(h_bsd))
        return h_bsd, *(kv or (None, None))


class PLTMoEPreTrainedModel(PreTrainedModel):
    """What transformers has to know about both models."""

    config_class = PLTMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PLTMoEDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_flex_attn = False
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    _is_stateful = True  # the cache cannot be rolled back: generate() refuses assisted decoding

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PLTMoERouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if hasattr(module, "e_score_correction_bias"):
                init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, PLTMoEGate):
            init.zeros_(module.weight)
            init.zeros_(module.bias)


class PLTMoEModel(PLTMoEPreTrainedModel):
    """Embedding, the looped stack, and the final norm."""

    def __init__(self, config: PLTMoEConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            PLTMoEDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = PLTMoERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PLTMoECache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run all loops over the new slots.

        Args:
            input_ids: New tokens [b, s]; or ``inputs_embeds`` [b, s, d].
            attention_mask: [b, cached + s], 0 where there is padding (either side).
            position_ids: [b or 1, s]; default: slots counted from the first real one. Position 0
                begins a document: nothing is shifted into it. Without ``attention_mask`` and
                cache, documents packed into one row do not see each other.
            past_key_values: a PLTMoECache of this model.
            output_hidden_states: return ``num_loops * (num_layers + 1)`` tensors, loop after
                loop: the loop's input, then every layer's output; the very last one is normed.
            output_attentions: not supported.

        Raises:
            ValueError: contradicting or unsupported arguments.
        """
        cache = self._choose_cache(past_key_values, use_cache, output_attentions)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        e_bsd = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past = cache.get_seq_length() if cache is not None else 0
        valid = self._valid_slots(attention_mask, past + e_bsd.size(1))
        positions = self._positions(position_ids, valid, past, e_bsd)
        documents = None
        if position_ids is not None and attention_mask is None and past == 0:
            numbers = (positions == 0).cumsum(-1)
            documents = numbers if (numbers > 1).any() else None
        window = self.config.window_keys if self.config.plt_gated_swa else None
        visibility = Visibility(past, e_bsd.size(1), window, e_bsd.device, valid, documents)
        starts = self._starts(positions, valid, past)
        states: list[Tensor] | None = [] if self._wants_states(output_hidden_states) else None
        h_bsd = self._run_loops(e_bsd, starts, positions, visibility, cache, states)
        h_bsd = self.norm(h_bsd)
        if states is not None:
            states[-1] = h_bsd
        return BaseModelOutputWithPast(
            last_hidden_state=h_bsd,
            past_key_values=cache,
            hidden_states=None if states is None else tuple(states),
        )

    def _run_loops(
        self,
        e_bsd: Tensor,
        starts: Tensor,
        positions: Tensor,
        visibility: Visibility,
        cache: PLTMoECache | None,
        states: list[Tensor] | None,
    ) -> Tensor:
        config, h_bsd = self.config, e_bsd
        rope = self._rope(positions, e_bsd.dtype)
        first_kv: list[KeyValue] = []
        for loop in range(1, config.plt_num_loops + 1):
            if loop > 1 and config.plt_cross_loop_shift:
                handed_on = self.norm(h_bsd) if config.plt_normalize_per_loop else h_bsd
                moved = self._shift(handed_on, starts, loop - 1, cache)
                h_bsd = config.plt_emb_scale * e_bsd + config.plt_hidden_scale * moved
            if states is not None:
                states.append(h_bsd)
            for index, layer in enumerate(self.layers):
                lent = first_kv[index] if loop > 1 else (None, None)
                h_bsd, k, v = layer(
                    h_bsd,
                    *lent,
                    loop=loop,
                    rope=rope,
                    visibility=visibility,
                    past_key_values=cache,
                )
                if loop == 1:
                    first_kv.append((k, v))
                if states is not None:
                    states.append(h_bsd)
        return h_bsd

    def _shift(self, h_bsd: Tensor, starts: Tensor, loop: int, cache: PLTMoECache | None) -> Tensor:
        """Move every vector one slot to the right; the first slot of a document gets zeros."""
        before = cache.exchange_hidden(loop, h_bsd[:, -1]) if cache is not None else None
        if before is None:
            before = torch.zeros_like(h_bsd[:, 0])
        moved = torch.cat([before[:, None].to(h_bsd.device), h_bsd[:, :-1]], dim=1)
        return moved.masked_fill(starts.unsqueeze(-1), 0.0)

    def _rope(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin [b or 1, 1, s, k]; angles are float32, as in other implementations."""
        size, theta = self.config.head_dim, self.config.rope_parameters["rope_theta"]
        exponent = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device) / size
        angles = positions[..., None].float() * (1.0 / theta**exponent)
        doubled = torch.cat([angles, angles], dim=-1).unsqueeze(1)
        return doubled.cos().to(dtype), doubled.sin().to(dtype)

    def _choose_cache(
        self, cache: Cache | None, use_cache: bool | None, output_attentions: bool | None
    ) -> PLTMoECache | None:
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError(
                "output_attentions is not supported: a layer attends once in loop 1 and up to "
                "twice in each later loop"
            )
        if cache is not None and not isinstance(cache, PLTMoECache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}; this model needs "
                "PLTMoECache(model.config), which also keeps what the later loops need"
            )
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and self.gradient_checkpointing and self.training:
            logger.warning_once("use_cache is turned off: gradient checkpointing is on.")
            return None
        if cache is None and use_cache:
            return PLTMoECache(self.config)
        return cache

    def _wants_states(self, output_hidden_states: bool | None) -> bool:
        if output_hidden_states is None:
            return bool(self.config.output_hidden_states)
        return bool(output_hidden_states)

    @staticmethod
    def _valid_slots(attention_mask: Tensor | None, num_slots: int) -> Tensor | None:
        """Return bool [b, cached + s], or None without padding."""
        if attention_mask is None:
            return None
        if attention_mask.dim() != 2 or attention_mask.size(1) != num_slots:
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}; expected "
                f"[batch, {num_slots}]: one number for every cached and new slot"
            )
        valid = attention_mask.bool()
        return None if valid.all() else valid

    @staticmethod
    def _positions(
        position_ids: Tensor | None, valid: Tensor | None, past: int, e_bsd: Tensor
    ) -> Tensor:
        num_slots = e_bsd.size(1)
        if position_ids is None:
            if valid is None:
                return torch.arange(past, past + num_slots, device=e_bsd.device)[None]
            position_ids = (valid.long().cumsum(-1) - 1).clamp(min=0)
        return position_ids[:, -num_slots:]

    @staticmethod
    def _starts(positions: Tensor, valid: Tensor | None, past: int) -> Tensor:
        """Return bool [b or 1, s]: true where the shift gives zero."""
        starts = positions == 0
        if valid is not None:
            after_padding = ~F.pad(valid[:, :-1], (1, 0), value=False)
            starts = starts | after_padding[:, past:]
        return starts


class PLTMoEForCausalLM(PLTMoEPreTrainedModel, GenerationMixin):
    """The language model: tokens to logits, with generate()."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PLTMoEConfig):
        super().__init__(config)
        self.model = PLTMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PLTMoECache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model; see PLTMoEModel.forward.

        Args:
            labels: [b, s], not shifted; -100 is left out. The loss is next-token cross entropy of
                the last loop, without router losses.
            logits_to_keep: compute logits of the last so many slots only (0: all), or of the
                slots with these indices.
            kwargs: ``num_items_in_batch`` (divide the summed loss by it instead of averaging).
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        keep = logits_to_keep
        keep = slice(-keep or None, None) if isinstance(keep, int) else keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = next_token_loss(logits, labels, kwargs.get("num_items_in_batch"))
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> None:
        """Give generate() a PLTMoECache where transformers would make a DynamicCache."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={kind!r} is not supported: this model brings its own cache"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = PLTMoECache(self.config)
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


def next_token_loss(
    logits_bsv: Tensor, labels_bs: Tensor, num_items: Tensor | int | None = None
) -> Tensor:
    """Cross entropy of each slot's logits with the next slot's label, in at least float32."""
    predicted = at_least_float32(logits_bsv[:, :-1]).flatten(0, 1)
    wanted = labels_bs[:, 1:].flatten().to(predicted.device)
    if num_items is None:
        return F.cross_entropy(predicted, wanted)
    total = F.cross_entropy(predicted, wanted, reduction="sum")
    return total / (num_items.to(total.device) if torch.is_tensor(num_items) else num_items)


__all__ = ["PLTMoEForCausalLM", "PLTMoEModel", "PLTMoEPreTrainedModel"]
