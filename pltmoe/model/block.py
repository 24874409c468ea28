"""The layer stack that every loop runs through: one set of weights, K and V handed explicitly.

Loop 1's keys and values leave a layer as outputs and enter later loops as inputs, never through
hidden state, so that recomputation and pipeline stages can see them.
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from pltmoe.config.model import ModelConfig
from pltmoe.model.gated_attention import KeyValue
from pltmoe.model.loop_stats import LoopStats


class PLTLayer(TransformerLayer):
    """Megatron's pre-norm transformer layer, told which loop it runs in."""

    def __init__(self, *args: Any, plt: ModelConfig, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.stats = LoopStats(plt, torch.cuda.current_device())

    def forward(  # type: ignore[override]
        self, hidden_sbd: Tensor, rope: Tensor, loop: int, first_kv: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        """Return the layer's output [s, b, d] and this loop's own (K, V)."""
        y, kv = self.self_attention(
            self.input_layernorm(hidden_sbd), rope, loop, first_kv, self.stats
        )
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        hidden_sbd = add((y, None), hidden_sbd, self.hidden_dropout)
        if self.is_moe_layer:
            self.mlp.router.enter_loop(loop, self.stats)
        return self._forward_mlp(hidden_sbd), kv


class LoopedStack(torch.nn.ModuleList):
    """The layers of the model, run once per loop."""

    def run(
        self, hidden_sbd: Tensor, rope: Tensor, loop: int, first_kv: list[KeyValue] | None
    ) -> tuple[Tensor, list[KeyValue]]:
        """Run all layers in one loop; returns the output and each layer's own (K, V)."""
        own: list[KeyValue] = []
        for index, layer in enumerate(self):
            lent = first_kv[index] if first_kv is not None else None
            hidden_sbd, kv = layer(hidden_sbd, rope, loop, lent)
            own.append(kv)
        return hidden_sbd, own

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """One checkpoint key per layer, numbered over the whole model (from 0)."""
        state: dict[str, Any] = {}
        for local, layer in enumerate(self):
            layer_state = layer.sharded_state_dict(f"{prefix}{local}.", sharded_offsets, metadata)
            state.update(layer_state)
        return state
