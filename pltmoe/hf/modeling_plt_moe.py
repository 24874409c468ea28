"""The Parallel Loop Transformer (arXiv 2510.24824) for transformers 5.

This file ships with the weights: it imports nothing but torch and transformers.

The whole layer stack f runs L times per token with the same weights:

    loop 1:      H_1 = f(E)                               ordinary causal attention
    loop l > 1:  H_l = f(a E + b shift(H_{l-1}))          shift: one slot to the right
                 attention reads loop 1's keys and values (global) and, through a gate g, a sliding
                 window over this loop's own:  y = g local + (1 - g) global
    logits = head(norm(H_L))

Decoding with a cache, all L loops of a slot are ONE pass of L rows through every layer: loop l of
slot i needs loop l - 1 of slot i - 1 only. A prompt costs about one loop: when only the last slots'
outputs are wanted, a later loop runs over the last slots it needs (see slots_needed), with the same
outputs and the same cache. Without the shift, loops run one after another, also when decoding.

Letters: b sequences, s slots of this call, d hidden, h query heads, g KV heads, k head size,
n keys, e experts, t tokens, L loops (rows of one slot, when decoding).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicLayer
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.integrations import use_experts_implementation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func
from transformers.utils import can_return_tuple, logging

from .configuration_plt_moe import PLTMoEConfig

logger = logging.get_logger(__name__)

KeyValue = tuple[Tensor, Tensor]

WINDOW_CHUNK = 256
"""Queries per piece of the sliding window: masks cost s * (window + chunk), not s * s."""


_NO_CONTINUOUS_BATCHING = (
    "continuous batching (generate_batch) is not supported: transformers' paged cache has no place "
    "for the windows and hidden vectors of the later loops. Use generate() with a left-padded "
    "batch, or `transformers serve` without --continuous-batching"
)


def at_least_float32(x: Tensor) -> Tensor:
    """Promote half precision; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def slots_needed(config: PLTMoEConfig, loop: int, outputs: int) -> int:
    """Return how many of the last slots ``loop`` must run over, for ``outputs`` exact last slots.

    A later loop sees the past through loop 1's keys and values, known everywhere, and through its
    own window: N layers reach N (w - 1) slots back. The loop before it must give it one slot more
    (the shift). With at least one output, the windows that the cache keeps are exact too.
    """
    reach, shift = 0, int(config.plt_cross_loop_shift)
    if config.plt_gated_swa:
        reach = config.num_hidden_layers * (config.window_keys - 1)
    if loop == 1:  # has its keys and values: only its outputs are wanted
        return slots_needed(config, 2, outputs) + shift if config.plt_num_loops > 1 else outputs
    return outputs + reach + (config.plt_num_loops - loop) * (reach + shift)


class FullLayer(DynamicLayer):
    """Keys and values of every slot of one layer in one loop."""

    record_past = False

    def activate_past_recording(self) -> None:
        """Keep what crop() may ask for, until it is called."""
        self.record_past = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> KeyValue:
        """Add keys and values, return all."""
        return super().update(key_states, value_states)

    def reset(self) -> None:
        """Forget every slot; transformers before 5.18 keeps them, as zeros."""
        self.keys = self.values = None
        self.is_initialized = False

    def keep_first(self, num_slots: int) -> None:
        """Forget all slots but the first ``num_slots``."""
        if self.is_initialized:
            self.keys, self.values = self.keys[..., :num_slots, :], self.values[..., :num_slots, :]

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply ``function`` to what is kept; unlike transformers' methods also to no slots."""
        if self.is_initialized:
            self.keys, self.values = function(self.keys), function(self.values)


class WindowLayer(FullLayer):
    """Keys and values of the last ``window_keys`` - 1 slots: what the next query can still see."""

    is_sliding = True

    def __init__(self, window_keys: int):
        super().__init__()
        self.window_keys = window_keys

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, recorded: int = 0, **kwargs: Any
    ) -> KeyValue:
        """Return the kept and the new keys and values; keep the last of them.

        ``recorded``: so many slots more, which crop() may take back.
        """
        k, v = super().update(key_states, value_states)
        self._keep(k.size(-2), recorded)
        return k, v

    def drop_last(self, num_slots: int) -> None:
        """Forget the last ``num_slots``, and what was recorded before them."""
        if self.is_initialized:
            self._keep(self.keys.size(-2) - num_slots, 0)

    def _keep(self, stop: int, recorded: int) -> None:
        before, first = self.keys.size(-2), max(stop - (self.window_keys - 1) - recorded, 0)
        self.keys, self.values = self.keys[..., first:stop, :], self.values[..., first:stop, :]
        if before > 2 * (self.window_keys + recorded):  # a prefill: let go of the long tensors
            self.keys, self.values = self.keys.clone(), self.values.clone()


@dataclass
class Slots:
    """Consecutive slots of one call: ``past`` slots lie before them.

    positions [b or 1, s] for RoPE; starts [b or 1, s], true where the shift gives zero;
    valid [b, past + s] without padding, or None; documents [b, past + s] numbers, or None.
    """

    past: int
    positions: Tensor
    starts: Tensor
    valid: Tensor | None = None
    documents: Tensor | None = None

    def __len__(self) -> int:
        """Return s."""
        return self.positions.size(1)


class PLTMoECache(Cache):
    """Cache of all loops.

    Loop 1 keeps every slot. A later loop keeps the window (G-SWA), nothing (shared keys and values
    without a window), or every slot (nothing shared). The cross-loop shift needs one more thing:
    what each loop but the last hands on at the newest slot, ``last_hidden`` [b, 1, d].

    ``crop`` is exact for any number of slots. What it needs is kept while recording is on, as
    assisted decoding switches it on. Otherwise loop 1 is shortened, too, and the model computes the
    last slots anew before its next call, from their token ids (8 bytes a slot).
    """

    def __init__(self, config: PLTMoEConfig):
        self.config, self.num_layers = config, config.num_hidden_layers
        layers: list[FullLayer] = [FullLayer() for _ in range(self.num_layers)]
        for _ in range((config.plt_num_loops - 1) * self.num_layers):
            if config.plt_gated_swa:
                layers.append(WindowLayer(config.window_keys))
            elif not config.plt_share_first_loop_kv:
                layers.append(FullLayer())
        super().__init__(layers=layers)
        self.last_hidden: list[Tensor | None] = [None] * (config.plt_num_loops - 1)
        self.record: dict[str, Tensor] = {}
        self.recorded = self.missing = 0

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
        layer = self._layers_of(loop)[layer_idx]
        return layer.update(key_states, value_states, recorded=self.recorded)

    def activate_past_recording(self) -> None:
        """Keep what crop() may ask for; transformers before 5.14 has no such method."""
        for layer in self.layers:
            layer.activate_past_recording()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the slots so far, those that crop() has left to be computed anew included."""
        return super().get_seq_length(layer_idx) + (self.missing if layer_idx == 0 else 0)

    def own_slots(self, loop: int) -> int:
        """Return for how many slots ``loop`` keeps keys and values of its own."""
        layers = self._layers_of(loop)
        return layers[0].get_seq_length() if layers else 0

    def forget_window(self, loop: int) -> None:
        """Begin the window of ``loop`` anew: it goes on after a gap."""
        for layer in self._layers_of(loop):
            layer.reset()

    def hidden_before(self, loop: int) -> Tensor | None:
        """Return what ``loop`` handed on at the last slot so far [b, 1, d], or None."""
        kept = self.last_hidden[loop - 1]
        return None if kept is None else kept[:, -1:]

    def keep_hidden(self, loop: int, newest_bsd: Tensor) -> None:
        """Keep what ``loop`` hands on at the last slot and, recording, what crop() may ask for."""
        keep, kept = self.recorded + 1, self.last_hidden[loop - 1]
        newest = newest_bsd[:, -keep:]
        if kept is not None and keep > newest.size(1):
            newest = torch.cat([kept.to(newest.device), newest], dim=1)[:, -keep:]
        self.last_hidden[loop - 1] = newest.clone()

    def note_call(self, ids: Tensor | None, slots: Slots, num_sequences: int) -> None:
        """Remember what new slots are computed from; ``ids`` [b, s] is None for embeddings."""
        if slots.documents is not None:
            self.record["documents"] = slots.documents.expand(num_sequences, -1)
        if self.config.plt_num_loops == 1:
            return
        shape, device = (num_sequences, len(slots)), slots.positions.device
        new = {
            "ids": torch.full(shape, -1, device=device) if ids is None else ids,
            "positions": slots.positions.expand(shape),
            "starts": slots.starts.expand(shape),
        }
        for name, x in new.items():
            kept = self.record.get(name)
            self.record[name] = x if kept is None else torch.cat([kept, x], dim=1)

    def note_exact(self, new_slots: int, outputs: int, whole: bool) -> None:
        """Count the slots that crop() can take back; ``whole``: no loop has left out any slot."""
        recording = self.layers[0].record_past
        self.recorded = (self.recorded + new_slots if whole else outputs) if recording else 0

    def take_missing(self, valid: Tensor | None) -> tuple[Tensor, Slots]:
        """Return token ids [b, s] and slots that crop() has left to be computed anew."""
        stop = self.get_seq_length()
        past, self.missing = stop - self.missing, 0
        ids, positions, starts = (self.record[x][:, past:] for x in ("ids", "positions", "starts"))
        if valid is not None:
            valid = valid[:, :stop]
        return ids, Slots(past, positions, starts, valid, self.record.get("documents"))

    def num_bytes(self) -> int:
        """Return the bytes of all keys, values and hidden vectors kept now."""
        kept = [x for layer in self.layers for x in (layer.keys, layer.values) if x is not None]
        kept += [x for x in self.last_hidden if x is not None]
        return sum(x.numel() * x.element_size() for x in kept)

    def paper_bytes(self) -> int:
        """Return the paper's formula for the slots so far: D n + (L - 1) D w with G-SWA, D n with
        shared keys and values only, L D n with nothing shared; D: bytes of a slot in all layers.

        ``num_bytes`` differs from it by what the paper leaves out, the L - 1 hidden vectors, and by
        the newest slot of each window, which is not kept but comes with the next query.
        """
        first = self._layers_of(1)
        stored, config = super().get_seq_length(), self.config
        if not stored:
            return 0
        slot_bytes = sum(x.nbytes for layer in first for x in (layer.keys, layer.values)) // stored
        later = 0 if config.plt_share_first_loop_kv else stored
        if config.plt_gated_swa:
            later = min(config.window_keys, stored)
        return slot_bytes * (stored + (config.plt_num_loops - 1) * later)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.last_hidden = [None] * len(self.last_hidden)
        self.record, self.recorded, self.missing = {}, 0, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take over the batch order of a beam search."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence of the batch."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences of the batch."""
        self._map(lambda x: x[indices.to(x.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last slots, -``tokens_to_remove`` of them.

        A positive number is that of the slots to keep: so generate() asks before transformers 5.14.

        Raises:
            ValueError: more slots than there are, or slots that were given as embeddings and are
                needed again.
        """
        length, dropped = self.get_seq_length(), -tokens_to_remove
        if tokens_to_remove > 0:
            dropped = max(length - tokens_to_remove, 0)
        if dropped > length:
            raise ValueError(f"crop({tokens_to_remove}) of a cache of {length} slots")
        if dropped == length:
            recording = self.layers[0].record_past
            self.reset()
            if recording:
                self.activate_past_recording()
            return
        if not self.missing and dropped <= self.recorded:
            self._drop_recorded(length - dropped, dropped)
        elif dropped:
            self._drop_unrecorded(length - dropped)
        self.record = {name: x[:, : length - dropped] for name, x in self.record.items()}
        self.recorded = 0

    def _drop_recorded(self, left: int, dropped: int) -> None:
        for layer in self.layers:
            if isinstance(layer, WindowLayer):
                layer.drop_last(dropped)
            else:
                layer.keep_first(left)
        self._map_hidden(lambda x: x[:, x.size(1) - dropped - 1 : x.size(1) - dropped].clone())

    def _drop_unrecorded(self, left: int) -> None:
        """Shorten every loop so far that computing the missing slots again makes all exact."""
        config = self.config
        missing = 0
        if config.plt_cross_loop_shift or config.plt_gated_swa:
            missing = min(left, slots_needed(config, 1, 1))
            if (self.record["ids"][:, left - missing : left] < 0).any():
                raise ValueError(
                    f"crop: the last {missing} slots must be computed again, but were given as "
                    "inputs_embeds; give input_ids, or call activate_past_recording() beforehand"
                )
        self.missing = missing
        for loop in range(1, config.plt_num_loops + 1):
            if loop > 1 and config.plt_share_first_loop_kv:
                self.forget_window(loop)
                continue
            again = min(self.missing, slots_needed(config, loop, 1))
            for layer in self._layers_of(loop):
                layer.keep_first(left - again)
        self.last_hidden = [None] * len(self.last_hidden)

    def _layers_of(self, loop: int) -> list[Any]:
        return self.layers[(loop - 1) * self.num_layers : loop * self.num_layers]

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        for layer in self.layers:
            layer.map(function)
        self._map_hidden(function)
        self.record = {name: function(x) for name, x in self.record.items()}

    def _map_hidden(self, function: Callable[[Tensor], Tensor]) -> None:
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
    """Which slots the queries of one loop see: all before them, less padding and other documents.

    Built once per loop and shared by all layers. ``everything`` is causal attention, its keys begin
    at slot 0; ``window`` is the sliding window, its keys begin at ``first_kept``.

    Args:
        slots: of the call; ``skipped`` of them at the beginning are no queries in this loop.
        first_kept: the first slot whose key the loop's own cache still has.
        window_keys: None without a window.
    """

    def __init__(
        self, slots: Slots, skipped: int = 0, first_kept: int = 0, window_keys: int | None = None
    ):
        self.slots, self.device = slots, slots.positions.device
        self.key = (skipped, first_kept, window_keys)
        first, stop = slots.past + skipped, slots.past + len(slots)
        self.everything = self.window = [self._piece(first, stop, 0, first, None)]
        if window_keys is not None and (first_kept > 0 or stop > window_keys):
            step = max(WINDOW_CHUNK, window_keys)
            self.window = [
                self._piece(start, min(start + step, stop), first_kept, first, window_keys)
                for start in range(first, stop, step)
            ]

    def _piece(
        self, start: int, stop: int, first_key: int, first_query: int, window_keys: int | None
    ) -> Piece:
        key_start = first_key
        if window_keys is not None:
            key_start = max(first_key, start - (window_keys - 1))
        queries = slice(start - first_query, stop - first_query)
        keys = slice(key_start - first_key, stop - first_key)
        if self.slots.valid is None and self.slots.documents is None:
            if stop - start == 1:
                return Piece(queries, keys, None)
            if key_start == start and (window_keys is None or stop - start <= window_keys):
                return Piece(queries, keys, None, is_causal=True)
        query_slots = torch.arange(start, stop, device=self.device)
        key_slots = torch.arange(key_start, stop, device=self.device)
        return Piece(queries, keys, self._mask(query_slots, key_slots, window_keys))

    def _mask(self, query_slots: Tensor, key_slots: Tensor, window_keys: int | None) -> Tensor:
        valid, documents = self.slots.valid, self.slots.documents
        distance = query_slots[:, None] - key_slots[None, :]
        seen = (distance >= 0)[None]
        if window_keys is not None:
            seen = seen & (distance < window_keys)
        if valid is not None:
            seen = seen & valid[:, None, key_slots]
        if documents is not None:
            seen = seen & (documents[:, query_slots, None] == documents[:, None, key_slots])
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

    def __init__(self, config: PLTMoEConfig):
        super().__init__()
        self.reads_hidden = config.plt_gate_use_hidden_states
        size = config.hidden_size if self.reads_hidden else config.head_dim
        self.weight = nn.Parameter(torch.zeros(config.num_attention_heads, size))
        self.bias = nn.Parameter(torch.zeros(config.num_attention_heads))
        if config.plt_gate_norm:
            self.gate_norm = PLTMoERMSNorm(size, config.rms_norm_eps)

    def forward(self, q_bhsk: Tensor, x_bsd: Tensor, h_bsd: Tensor) -> Tensor:
        """Return g [b, h, s, 1] from the query after RoPE, or from hidden states: the layer's
        normed input x or, with a norm of the gate's own, the residual stream h.
        """
        if not self.reads_hidden:
            logit = torch.einsum("bhsk,hk->bhs", q_bhsk, self.weight)
        else:
            x_bsd = self.gate_norm(h_bsd) if hasattr(self, "gate_norm") else x_bsd
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
            self.plt_gate = PLTMoEGate(config)

    def forward(
        self,
        x_bsd: Tensor,
        h_bsd: Tensor,
        first_kv: KeyValue | None,
        loop: int | None,
        rope: tuple[Tensor, Tensor],
        visibility: Visibility,
        cache: PLTMoECache | None,
    ) -> tuple[Tensor, KeyValue | None]:
        """Return the output [b, s, d] and, in loop 1, the keys and values of all slots so far.

        Args:
            x_bsd: The normed input; ``h_bsd`` is the residual stream that it comes from. With
                ``loop`` None, the s rows are the loops of one slot.
            first_kv: Loop 1's keys and values, in later loops.
            loop: From 1; None for all loops at once.
            rope: Cosines and sines of the slots.
            visibility: What the queries see.
            cache: Keys and values of slots before these.
        """
        q = self._heads(self.q_proj(x_bsd))
        q = rotate(self.q_norm(q) if self.config.use_qk_norm else q, rope)
        needs_own = loop in (1, None) or self.config.plt_gated_swa
        k = v = None
        if needs_own or not self.config.plt_share_first_loop_kv:
            k, v = self._heads(self.k_proj(x_bsd)), self._heads(self.v_proj(x_bsd))
            k = rotate(self.k_norm(k) if self.config.use_qk_norm else k, rope)
        kv = None
        if loop is None:
            y, local = self._all_loops(q, k, v, visibility, cache)
        else:
            y, local, kv = self._one_loop(q, k, v, first_kv, loop, visibility, cache)
        if local is not None:
            later = slice(1, None) if loop is None else slice(None)  # loop 1 has no gate
            g = self.plt_gate(q[:, :, later], x_bsd[:, later], h_bsd[:, later])
            mixed = g * local + (1 - g) * y[:, :, later]
            y = mixed if loop else torch.cat([y[:, :, :1], mixed], dim=2)
        return self.o_proj(y.transpose(1, 2).flatten(2)), kv

    def _one_loop(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        first_kv: KeyValue | None,
        loop: int,
        visibility: Visibility,
        cache: PLTMoECache | None,
    ) -> tuple[Tensor, Tensor | None, KeyValue | None]:
        """Return the global and the local branch and, in loop 1, its keys and values."""
        own = None
        if k is not None:
            own = (k, v) if cache is None else cache.update(k, v, self.layer_idx, loop=loop)
        if loop == 1 or not self.config.plt_share_first_loop_kv:
            y = self._attend(q, own, visibility.everything)
            return y, None, own if loop == 1 else None
        y = self._attend(q, first_kv, visibility.everything)
        local = self._attend(q, own, visibility.window) if self.config.plt_gated_swa else None
        return y, local, None

    def _all_loops(
        self, q_bhLk: Tensor, k_bgLk: Tensor, v_bgLk: Tensor, visibility: Visibility, cache: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return the global branch of all rows of one slot and the local one of the later rows."""
        config, own = self.config, []
        owners = config.plt_num_loops
        if config.plt_share_first_loop_kv and not config.plt_gated_swa:
            owners = 1
        for row in range(owners):  # loop 1's keys and values first: all rows see the slot itself
            k, v = k_bgLk[:, :, row : row + 1], v_bgLk[:, :, row : row + 1]
            own.append(cache.update(k, v, self.layer_idx, loop=row + 1))
        if not config.plt_share_first_loop_kv:
            rows = [
                self._attend_rows(q_bhLk[:, :, row : row + 1], kv, visibility.everything)
                for row, kv in enumerate(own)
            ]
            return torch.cat(rows, dim=2), None
        y = self._attend_rows(q_bhLk, own[0], visibility.everything)
        if not config.plt_gated_swa:
            return y, None
        local = [
            self._attend_rows(q_bhLk[:, :, row : row + 1], own[row], visibility.window)
            for row in range(1, owners)
        ]
        return y, torch.cat(local, dim=2)

    def _attend_rows(self, q_bhrk: Tensor, kv: KeyValue, pieces: list[Piece]) -> Tensor:
        """Attend with r rows of one slot: they and the heads of a KV head are one set of queries.

        The keys are read once, and not repeated for the query heads.
        """
        groups, rows = kv[0].size(1), q_bhrk.size(2)
        q_bgmk = q_bhrk.unflatten(1, (groups, -1)).flatten(2, 3)
        y_bgmk = self._attend(q_bgmk, kv, pieces, all_queries=True)
        return y_bgmk.unflatten(2, (-1, rows)).flatten(1, 2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

    def _attend(
        self, q: Tensor, kv: KeyValue | None, pieces: list[Piece], all_queries: bool = False
    ) -> Tensor:
        assert kv is not None, "loop 1 comes first"
        attend, (k, v) = ATTEND[self.config._attn_implementation or "sdpa"], kv
        parts = [
            attend(
                q if all_queries else q[:, :, piece.queries],
                k[:, :, piece.keys],
                v[:, :, piece.keys],
                piece,
            )
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
    """Softmax scores; top-k chosen by score + expert bias, weighted by the scores.

    With shared routing the experts that loop 1 chose for a slot serve its later loops too; each
    loop's own scores weight them.
    """

    def __init__(self, config: PLTMoEConfig):
        super().__init__()
        self.is_shared = config.plt_loop_routing == "shared"
        self.top_k, self.renormalise = config.num_experts_per_tok, config.norm_topk_prob
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        if config.use_expert_bias:
            bias = torch.zeros(config.num_experts, dtype=torch.float32)
            self.register_buffer("e_score_correction_bias", bias)

    def forward(
        self, x_td: Tensor, experts: Tensor | None = None, rows: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return chosen experts [t, top_k], their weights [t, top_k], and all logits [t, experts].

        Args:
            x_td: Tokens.
            experts: Chosen elsewhere; only their weights are computed from ``x_td``.
            rows: With shared routing, each ``rows`` tokens go where the first of them does.
        """
        # In float32 from the logits on, as in training: bf16 logits would choose other experts.
        logits = F.linear(at_least_float32(x_td), at_least_float32(self.weight))
        scores = logits.softmax(-1)
        if experts is None:
            bias = getattr(self, "e_score_correction_bias", 0.0)
            rows = rows if self.is_shared else 1
            experts = (scores[::rows] + bias).topk(self.top_k, dim=-1).indices
            experts = experts.repeat_interleave(rows, dim=0) if rows > 1 else experts
        if self.is_shared and self.renormalise:
            # The same as below, but never 0 / 0: all of loop 1's experts may be unlikely later.
            return experts, logits.gather(-1, experts).softmax(-1).to(x_td.dtype), logits
        weights = scores.gather(-1, experts)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return experts, weights.to(x_td.dtype), logits


@use_experts_implementation
class PLTMoEStackedExperts(nn.Module):
    """SwiGLU experts, those of a layer in one tensor, as transformers' implementations want them.

    Weights are stored expert by expert, with the names of Qwen3-MoE.
    """

    def __init__(self, config: PLTMoEConfig):
        super().__init__()
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self.num_experts, self.act_fn = config.num_experts, F.silu
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, inner))

    def forward(self, x_td: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """``experts_implementation="eager"``; the decorator puts the others in its place."""
        return self.one_by_one(x_td, chosen, weights)

    def one_by_one(self, x_td: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Run the experts in turn."""
        order = chosen.flatten().argsort(stable=True)  # all (token, rank) pairs, expert by expert
        in_use = torch.stack(chosen.unique(return_counts=True)).tolist()
        out = torch.zeros_like(x_td)
        for expert, pairs in zip(in_use[0], order.split(in_use[1]), strict=True):
            token = pairs // chosen.size(-1)
            gate, up = F.linear(x_td[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            y = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            out.index_add_(0, token, y * weights.flatten()[pairs, None])
        return out


register_checkpoint_conversion_mapping(
    PLTMoEConfig.model_type, get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True
)


class PLTMoEExperts(PLTMoEStackedExperts):
    """The experts of a layer: only chosen ones run, once each for all their tokens.

    As transformers' ``experts_implementation`` says, by default in grouped products. torch has none
    in float64, or of rows that are no multiple of 16 bytes.
    """

    def forward(self, x_td: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Return the sum [t, d] of what ``chosen`` experts [t, top_k] return, ``weights`` times."""
        size = self.down_proj.element_size()
        is_odd = any(width * size % 16 for width in self.down_proj.shape[1:])
        if is_odd or self.down_proj.dtype == torch.float64:
            return self.one_by_one(x_td, chosen, weights)
        return super().forward(x_td, chosen, weights)


class PLTMoESparseBlock(nn.Module):
    """Mixture of experts."""

    def __init__(self, config: PLTMoEConfig):
        super().__init__()
        self.gate = PLTMoERouter(config)
        self.experts = PLTMoEExperts(config)

    def forward(
        self, x_bsd: Tensor, experts: Tensor | None = None, is_one_slot: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weighted sum of the chosen experts' outputs [b, s, d], who was chosen, and the
        router's logits [b * s, experts].

        Args:
            x_bsd: Tokens; when decoding, s are the loops of one slot, and the rows of an expert are
                one matrix product whatever loop they belong to.
            experts: [b, s, top_k] from elsewhere; default: the router chooses.
            is_one_slot: Whether the s tokens are the loops of one slot.
        """
        x_td, rows = x_bsd.flatten(0, 1), x_bsd.size(1) if is_one_slot else 1
        experts = None if experts is None else experts.flatten(0, 1)
        chosen, weights, logits = self.gate(x_td, experts, rows)
        out = self.experts(x_td, chosen, weights)
        return out.view_as(x_bsd), chosen.unflatten(0, x_bsd.shape[:2]), logits


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
        experts: Tensor | None,
        loop: int | None,
        rope: tuple[Tensor, Tensor],
        visibility: Visibility,
        past_key_values: PLTMoECache | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Return the residual stream; in loop 1, keys and values of all slots so far; the experts
        chosen [b, s, top_k], and the router's logits [b * s, experts].

        ``experts`` given: the tokens go to these. ``loop`` None: the rows are one slot's loops.
        """
        y, kv = self.self_attn(
            self.input_layernorm(h_bsd),
            h_bsd,
            (first_k, first_v),
            loop,
            rope,
            visibility,
            past_key_values,
        )
        h_bsd = h_bsd + y
        x_bsd = self.post_attention_layernorm(h_bsd)
        logits = None
        if isinstance(self.mlp, PLTMoESparseBlock):
            y, experts, logits = self.mlp(x_bsd, experts, is_one_slot=loop is None)
        else:
            y = self.mlp(x_bsd)
        return h_bsd + y, *(kv or (None, None)), experts, logits


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

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PLTMoERouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if hasattr(module, "e_score_correction_bias"):
                init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, PLTMoEExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)
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
        output_router_logits: bool | None = None,
        outputs_to_keep: int = 0,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Run all loops over the new slots.

        Args:
            input_ids: New tokens [b, s]; or ``inputs_embeds`` [b, s, d].
            attention_mask: [b, cached + s], 0 where there is padding, on either side of the tokens.
            position_ids: [b or 1, s]; default: slots counted from the first real one. Position 0
                begins a document: nothing is shifted into it. Without ``attention_mask``,
                documents packed into one row do not see each other, also in later calls.
            past_key_values: a PLTMoECache of this model.
            output_hidden_states: return ``num_loops * (num_layers + 1)`` tensors, loop after
                loop: the loop's input, then every layer's output; the very last one is normed.
            output_attentions: not supported.
            output_router_logits: return ``num_loops * num_layers`` tensors [b * s, num_experts],
                loop after loop.
            outputs_to_keep: return the last so many slots only (0: all). The later loops then run
                over the last slots they need, unless hidden states or router logits are asked for.

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
        packed = position_ids is not None and attention_mask is None
        documents = self._documents(positions, cache, past, packed)
        slots = Slots(past, positions, self._starts(positions, valid, past), valid, documents)
        if cache is not None:
            self._make_up_for_crop(cache, valid)
            cache.note_call(input_ids, slots, e_bsd.size(0))
        config = self.config
        wants_states = _given(output_hidden_states, config.output_hidden_states)
        wants_logits = config.num_experts and _given(
            output_router_logits, config.output_router_logits
        )
        states: list[Tensor] | None = [] if wants_states else None
        logits: list[Tensor] | None = [] if wants_logits else None
        is_asked = bool(wants_states or wants_logits)
        if not is_asked and cache is not None and self._can_run_all_loops_at_once(e_bsd):
            h_bsd = self._run_all_loops_at_once(e_bsd, slots, cache)
        else:
            outputs = 0 if is_asked else outputs_to_keep
            h_bsd = self._run_loops(e_bsd, slots, cache, outputs, states, logits)
        h_bsd = self.norm(h_bsd[:, -outputs_to_keep:])
        if states is not None:
            states[-1] = self.norm(states[-1])
        return MoeModelOutputWithPast(
            last_hidden_state=h_bsd,
            past_key_values=cache,
            hidden_states=None if states is None else tuple(states),
            router_logits=None if logits is None else tuple(logits),
        )

    def _run_loops(
        self,
        e_bsd: Tensor,
        slots: Slots,
        cache: PLTMoECache | None,
        outputs: int = 0,
        states: list[Tensor] | None = None,
        router_logits: list[Tensor] | None = None,
    ) -> Tensor:
        """Return H_L of the new slots, loop after loop; with ``outputs``, the last so many suffice
        (the others may be missing or wrong). Append to ``states`` and ``router_logits``.
        """
        h_bsd = e_bsd
        skips = self._skips(slots, cache, outputs)
        if cache is not None:
            cache.note_exact(len(slots), outputs or len(slots), whole=not any(skips))
        cos, sin = self._rope(slots.positions, e_bsd.dtype)
        first_kv: list[KeyValue] = []
        first_experts: list[Tensor | None] = []
        shares_routing = self.config.plt_loop_routing == "shared"
        visibility = None
        for loop, skip in enumerate(skips, start=1):
            if loop > 1:
                ahead = skip - skips[loop - 2]
                h_bsd = self._next_input(e_bsd, h_bsd, skip, ahead, slots.starts, loop, cache)
            visibility = self._visibility(slots, loop, skip, cache, visibility)
            if states is not None:
                states.append(h_bsd)
            for index, layer in enumerate(self.layers):
                lent = first_kv[index] if loop > 1 else (None, None)
                routed = first_experts[index] if loop > 1 and shares_routing else None
                h_bsd, k, v, experts, logits = layer(
                    h_bsd,
                    *lent,
                    routed[:, skip:] if routed is not None else None,
                    loop=loop,
                    rope=(cos[:, :, skip:], sin[:, :, skip:]),
                    visibility=visibility,
                    past_key_values=cache,
                )
                if loop == 1:
                    first_kv.append((k, v))
                    first_experts.append(experts)
                if states is not None:
                    states.append(h_bsd)
                if router_logits is not None:
                    router_logits.append(logits)
        return h_bsd

    def _skips(self, slots: Slots, cache: PLTMoECache | None, outputs: int) -> list[int]:
        """Return for each loop how many of the new slots, from the first, it may leave out.

        Loops with all keys and values of their own need every slot, except those they still have
        after a crop.
        """
        config, skips = self.config, [0]
        for loop in range(2, config.plt_num_loops + 1):
            skip = 0
            if not config.plt_share_first_loop_kv:
                skip = cache.own_slots(loop) - slots.past if cache is not None else 0
            elif outputs:
                skip = max(len(slots) - slots_needed(config, loop, outputs), 0)
            if skip and cache is not None and config.plt_gated_swa:
                cache.forget_window(loop)
            skips.append(skip)
        return skips

    def _visibility(
        self,
        slots: Slots,
        loop: int,
        skip: int,
        cache: PLTMoECache | None,
        before: Visibility | None,
    ) -> Visibility:
        """Return what the queries of ``loop`` see; loop 1 has no window."""
        window = self.config.window_keys if self.config.plt_gated_swa and loop > 1 else None
        first_kept = slots.past + skip
        if cache is not None and window is not None:
            first_kept -= cache.own_slots(loop)
        if before is not None and before.key == (skip, first_kept, window):
            return before
        return Visibility(slots, skip, first_kept, window)

    def _can_run_all_loops_at_once(self, e_bsd: Tensor) -> bool:
        """One new slot: its loops need each other at the slot before only, if there is a shift."""
        return e_bsd.size(1) == 1 and self.config.plt_cross_loop_shift

    def _run_all_loops_at_once(self, e_b1d: Tensor, slots: Slots, cache: PLTMoECache) -> Tensor:
        """Return H_L of one new slot [b, 1, d]: one pass of L rows through every layer."""
        config = self.config
        rows = [e_b1d]
        for loop in range(1, config.plt_num_loops):
            before = cache.hidden_before(loop)
            before = torch.zeros_like(e_b1d) if before is None else before.to(e_b1d.device)
            rows.append(self._mix(e_b1d, before.masked_fill(slots.starts.unsqueeze(-1), 0.0)))
        cache.note_exact(1, 1, whole=True)
        visibility = self._visibility(slots, 2, 0, cache, None)
        rope, h_bLd = self._rope(slots.positions, e_b1d.dtype), torch.cat(rows, dim=1)
        for layer in self.layers:
            h_bLd, *_ = layer(
                h_bLd,
                None,
                None,
                None,
                loop=None,
                rope=rope,
                visibility=visibility,
                past_key_values=cache,
            )
        handed_on = self.norm(h_bLd[:, :-1]) if config.plt_normalize_per_loop else h_bLd
        for loop in range(1, config.plt_num_loops):
            cache.keep_hidden(loop, handed_on[:, loop - 1 : loop])
        return h_bLd[:, -1:]

    def _make_up_for_crop(self, cache: PLTMoECache, valid: Tensor | None) -> None:
        """Compute the slots again that PLTMoECache.crop has left out."""
        if cache.missing:
            ids, slots = cache.take_missing(valid)
            self._run_loops(self.embed_tokens(ids), slots, cache, outputs=1)
            cache.recorded = 0

    def _next_input(
        self,
        e_bsd: Tensor,
        h_bsd: Tensor,
        skip: int,
        ahead: int,
        starts: Tensor,
        loop: int,
        cache: PLTMoECache | None,
    ) -> Tensor:
        """Return the input of ``loop`` > 1 at the slots from ``skip`` on.

        ``h_bsd`` is the loop before, which began ``ahead`` slots earlier.
        """
        config = self.config
        if not config.plt_cross_loop_shift:
            return h_bsd[:, ahead:]
        h_bsd = h_bsd[:, max(ahead - 1, 0) :]
        h_bsd = self.norm(h_bsd) if config.plt_normalize_per_loop else h_bsd
        h_bsd = h_bsd.to(e_bsd.device)  # layers may be spread over devices
        before = cache.hidden_before(loop - 1) if cache is not None else None
        if cache is not None:
            cache.keep_hidden(loop - 1, h_bsd)
        moved = h_bsd[:, :-1]
        if ahead == 0:
            before = torch.zeros_like(h_bsd[:, :1]) if before is None else before.to(h_bsd.device)
            moved = torch.cat([before, moved], dim=1)
        return self._mix(e_bsd[:, skip:], moved.masked_fill(starts[:, skip:, None], 0.0))

    def _mix(self, e_bsd: Tensor, moved_bsd: Tensor) -> Tensor:
        return self.config.plt_emb_scale * e_bsd + self.config.plt_hidden_scale * moved_bsd

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
        if valid.all():
            return None
        ended = (~valid & (valid.cumsum(-1) > 0)).cumsum(-1) > 0
        if (valid & ended).any():
            raise ValueError(
                "attention_mask has padding between tokens of a row, which the shift between loops "
                "and the window would take for slots: pad on the left, or give rows that end at "
                "different slots a cache each"
            )
        return valid

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
    def _documents(
        positions: Tensor, cache: PLTMoECache | None, past: int, packed: bool
    ) -> Tensor | None:
        """Return the document number of each slot [b or 1, past + s], or None if there is one."""
        begins = (positions == 0).long().cumsum(-1)
        kept = cache.record.get("documents") if cache is not None else None
        if kept is not None:
            return torch.cat([kept, (kept[:, -1:] + begins).expand(kept.size(0), -1)], dim=1)
        several = packed and (positions[:, 0 if past else 1 :] == 0).any()
        return F.pad(begins, (past, 0)) if several else None

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
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Run the model; see PLTMoEModel.forward.

        Args:
            labels: [b, s], not shifted; -100 is left out. The loss is next-token cross entropy of
                the last loop.
            output_router_logits: also return them, and ``aux_loss``: the balancing loss of the
                loops that choose experts, as Qwen3-MoE's of its layers (an expert bias does not
                enter). ``router_aux_loss_coef`` of it is added to the loss.
            logits_to_keep: compute logits of the last so many slots only (0: all), or of the
                slots with these indices.
            kwargs: ``num_items_in_batch`` (divide the summed loss by it instead of averaging),
                ``shift_labels`` ([b, s], ``labels`` already moved to the slot that predicts them).

        Raises:
            ValueError: contradicting or unsupported arguments.
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
            output_router_logits=output_router_logits,
            # indices may ask for any slot
            outputs_to_keep=logits_to_keep if isinstance(logits_to_keep, int) else 0,
            return_dict=True,
        )
        kept = slice(None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            shifted = kwargs.get("shift_labels")
            shifted = F.pad(labels[:, 1:], (0, 1), value=-100) if shifted is None else shifted
            loss = token_loss(logits, shifted, kwargs.get("num_items_in_batch"))
        aux_loss = None
        if out.router_logits is not None:
            aux_loss = self._balancing_loss(out.router_logits, attention_mask)
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            router_logits=out.router_logits,
        )

    def _balancing_loss(
        self, router_logits: tuple[Tensor, ...], attention_mask: Tensor | None
    ) -> Tensor:
        config = self.config
        choosing = 1 if config.plt_loop_routing == "shared" else config.plt_num_loops
        if attention_mask is not None:  # of the new slots, as many in every sequence
            slots = router_logits[0].size(0) // attention_mask.size(0)
            attention_mask = attention_mask[:, -slots:]
        return load_balancing_loss_func(
            router_logits[: choosing * config.num_hidden_layers],
            config.num_experts,
            config.num_experts_per_tok,
            attention_mask,
        )

    @property
    def init_continuous_batching(self) -> Any:
        """Absent: `transformers serve --continuous-batching` then takes generate()."""
        raise AttributeError(_NO_CONTINUOUS_BATCHING)

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse, see generate_batch."""
        raise NotImplementedError(_NO_CONTINUOUS_BATCHING)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: transformers' paged cache has no place for the later loops.

        Raises:
            NotImplementedError: always; generate() takes batches.
        """
        raise NotImplementedError(_NO_CONTINUOUS_BATCHING)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> None:
        """Give generate() a PLTMoECache where transformers would make a DynamicCache."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", "dynamic_full"):
            raise ValueError(
                f"cache_implementation={kind!r} is not supported: this model brings its own cache"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = cache = PLTMoECache(self.config)
            if generation_config.is_assistant:  # its guesses are taken back
                cache.activate_past_recording()
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


def _given(argument: bool | None, default: bool) -> bool:
    return default if argument is None else argument


def token_loss(
    logits_bsv: Tensor, labels_bs: Tensor, num_items: Tensor | int | None = None
) -> Tensor:
    """Cross entropy of each slot's logits with its label (-100: none), in at least float32."""
    predicted = at_least_float32(logits_bsv).flatten(0, 1)
    wanted = labels_bs.flatten().to(predicted.device)
    if num_items is None:
        return F.cross_entropy(predicted, wanted)
    total = F.cross_entropy(predicted, wanted, reduction="sum")
    return total / (num_items.to(total.device) if torch.is_tensor(num_items) else num_items)


__all__ = ["PLTMoEForCausalLM", "PLTMoEModel", "PLTMoEPreTrainedModel"]
