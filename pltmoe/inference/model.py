"""The decode step: all L loops of a slot are one forward pass of L rows per sequence.

    rows of sequence b, slot i       loop 1   E[i]
                                     loop 2   a E[i] + c H_1[i-1]     H_1[i-1] is in the cache
    each layer, once over b x L rows:
        norm, QKV, RoPE -> loop 1's K, V into the cache at slot i, later loops' into their rings
        attention of all rows over loop 1's cache, later loops' rows also over their ring, gate
        output projection, experts
    logits come from the last loop's row; H_1[i] .. H_{L-1}[i] go into the cache

Models without the cross-loop shift (vanilla loops) cannot do that: their loops run one after
another through the same code, one row per sequence each.

Letters: b sequences, L loops, t rows, d hidden, h query heads, g KV heads, k head size, e experts,
j experts of a row (top-k), v vocabulary; ``o`` rows of the fused QKV matrix.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pltmoe.config import ModelConfig
from pltmoe.inference.attention import decode_attention
from pltmoe.inference.cache import StaticCache, store
from pltmoe.inference.experts import experts
from pltmoe.inference.rows import Rope, Sizes, after_attention, choose, project
from pltmoe.inference.weights import LayerWeights, Weights

COMPILED_SHAPES = 64
"""torch.compile gives up after 8 by default, and then runs uncompiled."""


@dataclass(frozen=True)
class Kernels:
    """The operations that have fast versions, and why these were chosen."""

    attention: Callable[..., Tensor] = decode_attention
    experts: Callable[..., Tensor] = experts
    project: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]] = project
    store: Callable[..., None] = store
    choose: Callable[..., tuple[Tensor, Tensor]] = choose
    reason: str = "plain PyTorch"
    capturable: bool = False
    """Whether a CUDA graph can hold them: nothing is read back."""


class Attend(Protocol):
    """Stores keys and values of the rows of one layer and attends from the rows."""

    def rows_after(self, layer: int) -> Tensor | None:
        """Return which of the rows go on after a layer's keys and values; None: all."""
        ...

    def __call__(
        self, layer: int, q_thk: Tensor, k_tgk: Tensor, v_tgk: Tensor, gate_th: Tensor | None
    ) -> Tensor:
        """Return y [t, h, k] of the rows that go on."""
        ...


class Routes:
    """Which experts the rows of one pass use.

    Args:
        kernels: whose ``choose`` chooses.
        rows_per_slot: with shared routing, how many neighbouring rows are loops of one slot; they
            follow the first.
        lent: with shared routing, loop 1's choice [t, j] of each layer, for rows of later loops.
        keep: remember the choices, to be lent.
    """

    def __init__(
        self,
        kernels: Kernels,
        rows_per_slot: int = 1,
        lent: list[Tensor] | None = None,
        keep: bool = False,
    ):
        self._choose = kernels.choose
        self.rows_per_slot, self.lent, self.keep = rows_per_slot, lent, keep
        self.kept: list[Tensor] = []
        self._row_t: Tensor | None = None

    def go_on_with(self, row_t: Tensor) -> None:
        """Leave rows out from here on: ``row_t`` are those that stay."""
        self._row_t = row_t if self._row_t is None else self._row_t[row_t]

    def choose(
        self, logits_te: Tensor, bias_e: Tensor | None, top_k: int, layer: int
    ) -> tuple[Tensor, Tensor]:
        """Return experts [t, j] and weights [t, j] in the logits' precision."""
        if self.lent is not None:
            expert_tj = self.lent[layer]
            expert_tj = expert_tj if self._row_t is None else expert_tj[self._row_t]
            return expert_tj, logits_te.gather(-1, expert_tj).softmax(-1)
        expert_tj, weight_tj = self._choose(logits_te, bias_e, top_k, self.rows_per_slot)
        if self.keep:
            self.kept.append(expert_tj)
        return expert_tj, weight_tj


class PLTDecoder:
    """A model that decodes; see prefill.py for prompts and engine.py for generating text.

    Args:
        weights: where they lie is where everything runs.
        max_slots: length of the table of rotary angles.
        kernels: implementations of attention and experts.
        fuse: compile what lies between matrix products, attention and experts in a decode step
            (torch.compile; seconds for every new batch size).
    """

    def __init__(
        self,
        weights: Weights,
        max_slots: int,
        kernels: Kernels | None = None,
        fuse: bool = False,
    ):
        self.weights, self.m = weights, weights.model
        self.max_slots = max_slots
        self.kernels = kernels or Kernels()
        self._cos_sk, self._sin_sk = _rope_table(self.m, max_slots, weights)
        self._qk_norm = [_joined_norm(layer, self.m) for layer in weights.layers]
        m = self.m
        self._sizes = Sizes(m.num_attention_heads, m.head_dim, m.norm_eps, m.gate_use_hidden_states)
        self._compiled = _compile(project, after_attention) if fuse else None

    @property
    def shares_routing(self) -> bool:
        """Whether later loops use the experts that loop 1 chose."""
        return self.m.moe_loop_routing == "shared"

    def rope(self, slot_t: Tensor) -> Rope:
        """Return cos and sin [t, 1, k] of rows at these slots."""
        return self._cos_sk[slot_t].unsqueeze(1), self._sin_sk[slot_t].unsqueeze(1)

    def embed(self, token_t: Tensor) -> Tensor:
        """Return E [t, d]."""
        return F.embedding(token_t, self.weights.embedding_vd)

    def logits(self, h_td: Tensor) -> Tensor:
        """Return logits [t, v] of outputs of the last loop."""
        return F.linear(self._norm(h_td, self.weights.norm_d), self.weights.head_vd)

    def hand_on(self, h: Tensor) -> Tensor:
        """Return what the next loop reads of H: itself, or normed."""
        return self._norm(h, self.weights.norm_d) if self.m.normalize_per_loop else h

    def between_loops(self, e: Tensor, handed_on: Tensor) -> Tensor:
        """Return the input of a later loop (paper, section 3.1)."""
        return self.m.emb_scale * e + self.m.hidden_scale * handed_on

    def stack(self, h_td: Tensor, rope: Rope, attend: Attend, routes: Routes) -> Tensor:
        """Run all layers over rows; return those that went on to the end."""
        compiled = self._compiled if isinstance(attend, _StepAttention) else None
        run_project, run_after = compiled or (self.kernels.project, after_attention)
        for index, layer in enumerate(self.weights.layers):
            q_thk, k_tgk, v_tgk, gate_th = run_project(
                h_td,
                layer.input_norm_d,
                layer.qkv_od,
                self._qk_norm[index],
                layer.gate_weight_hx,
                layer.gate_bias_h,
                rope,
                self._sizes,
            )
            y_thk = attend(index, q_thk, k_tgk, v_tgk, gate_th)
            row_t = attend.rows_after(index)
            if row_t is not None:
                h_td, rope = h_td[row_t], (rope[0][row_t], rope[1][row_t])
                routes.go_on_with(row_t)
            h_td, x_td, logits_te = run_after(
                h_td, y_thk, layer.o_dq, layer.post_norm_d, layer.router_ed, self.m.norm_eps
            )
            h_td = h_td + self._feed_forward(x_td, logits_te, index, layer, routes)
        return h_td

    @torch.no_grad()
    def step(self, token_b: Tensor, cache: StaticCache) -> Tensor:
        """Decode one slot of every sequence: append ``token_b``, return logits [b, v].

        All shapes are static and nothing is read back, so that the step can be a CUDA graph.
        A sequence that has filled its cache overwrites its last slot (its text is finished).
        """
        slot_b = cache.lengths_b.clamp(max=cache.capacity - 1)
        e_bd = self.embed(token_b)
        if self.m.num_loops == 1 or not self.m.cross_loop_shift:
            h_bd = self._loops_in_turn(e_bd, slot_b, cache)
        else:
            h_bd = self._loops_at_once(e_bd, slot_b, cache)
        cache.lengths_b.add_(1).clamp_(max=cache.capacity)
        return self.logits(h_bd)

    def _loops_at_once(self, e_bd: Tensor, slot_b: Tensor, cache: StaticCache) -> Tensor:
        loops = self.m.num_loops
        later_bld = self.between_loops(e_bd[:, None], cache.handed_on_bld)
        h_td = torch.cat([e_bd[:, None], later_bld], 1).flatten(0, 1)
        attend = _StepAttention(self.kernels, cache, slot_b, loops, loop=None)
        routes = Routes(self.kernels, loops if self.shares_routing else 1)
        rope = self.rope(slot_b.repeat_interleave(loops))
        h_bLd = self.stack(h_td, rope, attend, routes).unflatten(0, (-1, loops))
        cache.handed_on_bld.copy_(self.hand_on(h_bLd[:, :-1]))
        return h_bLd[:, -1]

    def _loops_in_turn(self, h_bd: Tensor, slot_b: Tensor, cache: StaticCache) -> Tensor:
        rope, first = self.rope(slot_b), Routes(self.kernels, keep=self.shares_routing)
        for loop in range(1, self.m.num_loops + 1):
            attend = _StepAttention(self.kernels, cache, slot_b, 1, loop)
            lent = first.kept if loop > 1 and self.shares_routing else None
            routes = first if loop == 1 else Routes(self.kernels, lent=lent)
            h_bd = self.stack(h_bd, rope, attend, routes)
        return h_bd

    def _feed_forward(
        self,
        x_td: Tensor,
        logits_te: Tensor | None,
        index: int,
        layer: LayerWeights,
        routes: Routes,
    ) -> Tensor:
        if logits_te is None:
            assert layer.gate_up_fd is not None and layer.down_df is not None
            gate, up = F.linear(x_td, layer.gate_up_fd).chunk(2, -1)
            return F.linear(F.silu(gate) * up, layer.down_df)
        top_k = self.m.moe_top_k or 1
        expert_tj, weight_tj = routes.choose(logits_te, layer.router_bias_e, top_k, index)
        return self.kernels.experts(
            x_td,
            expert_tj,
            weight_tj,
            layer.gate_up_efd,
            layer.down_edf,
            layer.gate_up_scale_ef,
            layer.down_scale_ed,
        )

    def _norm(self, x: Tensor, weight_d: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), weight_d, self.m.norm_eps)


class _StepAttention:
    """Attention of one decode step: R rows per sequence, either all loops or one of them."""

    def __init__(
        self, kernels: Kernels, cache: StaticCache, slot_b: Tensor, rows: int, loop: int | None
    ):
        self.attention, self.store = kernels.attention, kernels.store
        self.cache, self.rows, self.loop = cache, rows, loop
        self.slot_b, self.lengths_b = slot_b, slot_b + 1
        self.ring_slot_b = slot_b % cache.window
        self.ring_lengths_b = self.lengths_b.clamp(max=cache.window)
        self.lengths_bL = self.lengths_b.repeat_interleave(rows)
        self.slot_bL = slot_b.repeat_interleave(rows)

    def rows_after(self, layer: int) -> Tensor | None:
        """Return None: every row goes on."""
        return None

    def __call__(
        self, layer: int, q_thk: Tensor, k_tgk: Tensor, v_tgk: Tensor, gate_th: Tensor | None
    ) -> Tensor:
        q, k, v = (x.unflatten(0, (-1, self.rows)) for x in (q_thk, k_tgk, v_tgk))
        gate = None if gate_th is None else gate_th.unflatten(0, (-1, self.rows))
        if not self.cache.m.share_first_loop_kv:
            return self._own_keys(layer, q, k, v)
        if self.loop is None:
            return self._all_loops(layer, q, k, v, gate).flatten(0, 1)
        return self._one_loop(layer, q, k, v, gate).flatten(0, 1)

    def _own_keys(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Every loop has its own full cache: rows are sequences of their own."""
        if self.loop is None:
            all_k, all_v = self.cache.full_of_all_loops(layer)
            all_k, all_v = all_k.flatten(0, 1), all_v.flatten(0, 1)
        else:
            all_k, all_v = self.cache.full(layer, self.loop)
        q, k, v = (x.flatten(0, 1)[:, None] for x in (q, k, v))
        self.store(k, v, all_k, all_v, self.slot_bL)
        return self.attention(q, all_k, all_v, self.lengths_bL)[:, 0]

    def _all_loops(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None
    ) -> Tensor:
        """Loop 1's keys go in first: every row of the slot sees them."""
        first_k, first_v = self.cache.full(layer, 1)
        if gate is None:
            self.store(k, v, first_k, first_v, self.slot_b)
            return self.attention(q, first_k, first_v, self.lengths_b)
        ring_k, ring_v = self.cache.ring_k[layer], self.cache.ring_v[layer]
        self.store(k, v, first_k, first_v, self.slot_b, ring_k, ring_v, self.ring_slot_b)
        return self.attention(
            q, first_k, first_v, self.lengths_b, ring_k, ring_v, self.ring_lengths_b, gate
        )

    def _one_loop(self, layer: int, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
        """One loop after another (no shift); q, k and v have one row per sequence."""
        assert self.loop is not None
        first_k, first_v = self.cache.full(layer, 1)
        if self.loop == 1:
            self.store(k, v, first_k, first_v, self.slot_b)
        y = self.attention(q, first_k, first_v, self.lengths_b)
        if self.loop == 1 or gate is None:
            return y
        ring_k = self.cache.ring_k[layer][:, self.loop - 2]
        ring_v = self.cache.ring_v[layer][:, self.loop - 2]
        self.store(k, v, ring_k, ring_v, self.ring_slot_b)
        return torch.lerp(
            y, self.attention(q, ring_k, ring_v, self.ring_lengths_b), gate[..., None]
        )


def _compile(*functions: Callable[..., Any]) -> list[Callable[..., Any]]:
    """Compile for exactly the shapes that come; they are few: the batch sizes."""
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, COMPILED_SHAPES)
    return [torch.compile(f, dynamic=False, fullgraph=True) for f in functions]


def _rope_table(m: ModelConfig, max_slots: int, weights: Weights) -> Rope:
    """Return cos and sin [s, k]; angles in float32, as in the reference."""
    exponent = torch.arange(0, m.head_dim, 2, dtype=torch.float32) / m.head_dim
    slots = torch.arange(max_slots, dtype=torch.float32)
    doubled = torch.outer(slots, 1.0 / m.rope_theta**exponent).repeat(1, 2)
    return tuple(x.to(weights.dtype).to(weights.device) for x in (doubled.cos(), doubled.sin()))


def _joined_norm(layer: LayerWeights, m: ModelConfig) -> Tensor | None:
    """Return the norm weights of all Q and K heads [h + g, k], so that one call norms both."""
    if layer.q_norm_k is None or layer.k_norm_k is None:
        return None
    q = layer.q_norm_k.expand(m.num_attention_heads, -1)
    return torch.cat([q, layer.k_norm_k.expand(m.num_kv_heads, -1)])
