"""Self-attention of a looped layer on Megatron-core, G-SWA in later loops (paper, section 3.3).

    loop 1        y = causal(Q, K, V)                          K, V lent to later loops
    loop l > 1    y = g * window(Q, K, V) + (1 - g) * causal(Q, K_1, V_1),   g = sigmoid(gate(Q))

Letters: s slots, b sequences, d hidden, h query heads, g KV heads, k head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.jit import jit_fuser
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pltmoe.config.model import ModelConfig
from pltmoe.model.loop_stats import LoopStats
from pltmoe.model.recompute import is_recomputing, recompute_contexts
from pltmoe.model.reference import at_least_float32

KeyValue = tuple[Tensor, Tensor]


class Pass(NamedTuple):
    """What all layers are told about one run of the stack: one loop of one micro batch."""

    loop: int
    """Counts from 1."""
    rope: Tensor
    """Megatron's rotary angles of the slots here, the same in every loop."""
    loss_tokens: Tensor
    """Loss tokens of the micro batch, whole sequences: what the router losses count by."""


@dataclass
class GatedAttentionSubmodules(SelfAttentionSubmodules):
    """Megatron's parts plus the second attention of later loops."""

    local_attention: Callable[..., MegatronModule] | None = None


class PLTGate(MegatronModule):
    """f_gate: one scalar per head and token, from the query (or the normed hidden state)."""

    def __init__(self, config: TransformerConfig, num_heads: int, input_size: int, tp_group: Any):
        """``num_heads`` are this rank's."""
        super().__init__(config)
        self._tp_group = tp_group
        options = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.weight = torch.nn.Parameter(torch.zeros(num_heads, input_size, **options))
        self.bias = torch.nn.Parameter(torch.zeros(num_heads, **options))
        for parameter in self.parameters():
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)

    def forward(self, query_sbhk: Tensor, hidden_sbd: Tensor | None) -> Tensor:
        """Return g [s, b, h, 1] in at least float32."""
        if hidden_sbd is None:
            logit = torch.einsum("sbhk,hk->sbh", query_sbhk, self.weight)
        else:
            logit = torch.einsum("sbd,hd->sbh", self._whole(hidden_sbd), self.weight)
        return torch.sigmoid(at_least_float32(logit + self.bias)).unsqueeze(-1)

    def _whole(self, hidden_sbd: Tensor) -> Tensor:
        """Give every tensor-parallel rank all slots, as the QKV projection does; sums gradients."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden_sbd, group=self._tp_group)
        return copy_to_tensor_model_parallel_region(hidden_sbd, group=self._tp_group)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Heads are split over tensor-parallel ranks, as those of the query projection."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            state, prefix, {"weight": 0, "bias": 0}, sharded_offsets
        )


class GatedSelfAttention(SelfAttention):
    """Megatron's self-attention that knows its loop and can borrow loop 1's keys and values."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: GatedAttentionSubmodules,
        *args: Any,
        plt: ModelConfig,
        **kwargs: Any,
    ):
        super().__init__(config, submodules, *args, **kwargs)
        self.plt = plt
        # Lent as a view, V would keep the whole projection alive where nothing else does, and
        # Transformer Engine would copy it in every loop that reads it.
        is_te = config.transformer_impl == "transformer_engine"
        is_kept_alone = config.recompute_granularity == "full"
        self._lends_copies = is_kept_alone or (is_te and plt.share_first_loop_kv)
        if plt.gated_swa:
            assert submodules.local_attention is not None
            self.local_attention = submodules.local_attention(
                config=config,
                layer_number=self.layer_number,
                attn_mask_type=self.attn_mask_type,
                attention_type="self",
                pg_collection=self.pg_collection,
            )
            gate_input = plt.hidden_size if plt.gate_use_hidden_states else plt.head_dim
            self.plt_gate = PLTGate(
                config, self.num_attention_heads_per_partition, gate_input, self.pg_collection.tp
            )

    def forward(  # type: ignore[override]
        self,
        hidden_sbd: Tensor,
        at: Pass,
        first_kv: KeyValue | None,
        stats: LoopStats,
    ) -> tuple[Tensor, KeyValue]:
        """Attend in one loop.

        Args:
            hidden_sbd: normed input.
            at: which loop, and where the slots are.
            first_kv: loop 1's (K, V), each [s, b, g, k]; not needed in loop 1.
            stats: where gate means are recorded while training.

        Returns:
            The projected output [s, b, d] and this loop's own (K, V).
        """
        query, key, value = self.get_query_key_value_tensors(hidden_sbd)
        query, key = (
            apply_rotary_pos_emb(x, at.rope, config=self.config, cp_group=self.pg_collection.cp)
            for x in (query, key)
        )
        if at.loop == 1 < self.plt.num_loops and self._lends_copies:
            value = value.contiguous()
        arguments = (hidden_sbd, query, (key, value), first_kv, at.loop, stats)
        if self.training and self.config.recompute_granularity == "selective":
            contexts = partial(recompute_contexts, get_fp8_context(self.config))
            y = checkpoint(self._mixed, *arguments, use_reentrant=False, context_fn=contexts)
        else:
            y = self._mixed(*arguments)
        output, _ = self.linear_proj(y)
        return output, (key, value)

    def _mixed(
        self,
        hidden_sbd: Tensor,
        query: Tensor,
        own_kv: KeyValue,
        first_kv: KeyValue | None,
        loop: int,
        stats: LoopStats,
    ) -> Tensor:
        """Return what the heads found [s, b, h * k]: everything between the projections."""
        borrows = loop > 1 and self.plt.share_first_loop_kv
        y = self._attend(self.core_attention, query, first_kv if borrows else own_kv)
        if not (borrows and self.plt.gated_swa):
            return y
        y_local = self._attend(self.local_attention, query, own_kv)
        gate = self.plt_gate(query, hidden_sbd if self.plt.gate_use_hidden_states else None)
        if self.training and stats.is_watching and torch.is_grad_enabled() and not is_recomputing():
            stats.add_gate(loop, gate)
        heads = (*y.shape[:2], -1, self.hidden_size_per_attention_head)
        return _mix(gate, y_local.view(heads), y.view(heads)).flatten(2)

    def _attend(self, attention: MegatronModule, query: Tensor, kv: KeyValue | None) -> Tensor:
        assert kv is not None, "loop 1 comes first"
        return attention(query, *kv, None, attn_mask_type=self.attn_mask_type)


@jit_fuser
def _mix(gate_sbh1: Tensor, local_sbhk: Tensor, shared_sbhk: Tensor) -> Tensor:
    """Weigh both branches in the gate's precision; one kernel on a GPU."""
    mixed = gate_sbh1 * local_sbhk + (1 - gate_sbh1) * shared_sbhk
    return mixed.to(local_sbhk.dtype)
