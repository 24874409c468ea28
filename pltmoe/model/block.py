"""The layer stack that every loop runs through: one set of weights, loop 1's results handed on.

What loop 1 lends to later loops leaves a layer as an output and enters later loops as an input,
never through hidden state, so that recomputation and pipeline stages can see it.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pltmoe.config.model import ModelConfig
from pltmoe.model.gated_attention import KeyValue, Pass
from pltmoe.model.grouped_experts import GroupedExperts
from pltmoe.model.loop_stats import LoopStats
from pltmoe.model.recompute import recompute_contexts


class Lent(NamedTuple):
    """What one layer of loop 1 lends to the same layer of later loops."""

    key_value: KeyValue | None
    """K and V, each [s, b, g, k]; None where later loops use only their own."""
    experts: Tensor | None
    """Loop 1's routing map [t, e]; None in a dense model."""


class PLTLayer(TransformerLayer):
    """Megatron's pre-norm transformer layer, told which loop it runs in."""

    def __init__(self, *args: Any, plt: ModelConfig, **kwargs: Any):
        super().__init__(*args, add_layer_offset=False, **kwargs)
        self.plt = plt
        self.stats = LoopStats(plt, torch.cuda.current_device())
        if self.is_moe_layer:
            _spare_copies(self.mlp.token_dispatcher, self.mlp.experts)

    def forward(  # type: ignore[override]
        self, hidden_sbd: Tensor, at: Pass, lent: Lent | None
    ) -> tuple[Tensor, Lent]:
        """Return the layer's output [s, b, d] and what this loop could lend."""
        try:
            return self._pass(hidden_sbd, at, lent)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        """Drop what Megatron remembers of a pass, and with it the whole graph of a repeated one.

        PyTorch ends a repetition as soon as it has what backward needs, by an error inside of this
        pass; nothing goes backward through its graph, which would stay until the next pass.
        """
        self.mlp_norm_manager = None
        if self.is_moe_layer:
            self.mlp.router.leave()
            dispatcher = self.mlp.token_dispatcher
            dispatcher.probs = dispatcher.routing_map = None
            dispatcher.reversed_local_input_permutation_mapping = None

    def _pass(self, hidden_sbd: Tensor, at: Pass, lent: Lent | None) -> tuple[Tensor, Lent]:
        y, own_kv = self.self_attention(
            self.input_layernorm(hidden_sbd), at, lent.key_value if lent else None, self.stats
        )
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        hidden_sbd = add((y, None), hidden_sbd, self.hidden_dropout)
        kept = own_kv if self.plt.share_first_loop_kv else None
        if not self.is_moe_layer:
            return self._forward_mlp(hidden_sbd), Lent(kept, None)
        router = self.mlp.router
        chooses = at.loop <= self.plt.choosing_loops
        router.enter(at, lent.experts if lent else None, self.stats, chooses)
        hidden_sbd = self._forward_mlp(hidden_sbd)
        return hidden_sbd, Lent(kept, router.chosen)


def _spare_copies(dispatcher: MoEAlltoAllTokenDispatcher, experts: torch.nn.Module) -> None:
    """Spare tokens two copies, and the host a wait, where one rank has all experts.

    What the dispatcher sorts by expert after tokens have come from several ranks, and back again
    before they return, is sorted already; and nobody but experts that run one by one, or in
    Transformer Engine, asks on the host how many tokens each got. (megatron-core 0.19.2:
    ``dispatch_postprocess`` and ``combine_preprocess`` sort where there is more than one local
    expert; ``_maybe_dtoh_and_synchronize`` moves the counts.)
    """
    if dispatcher.ep_size * dispatcher.tp_size > 1:
        return
    dispatcher.num_local_experts = 1
    if isinstance(experts, GroupedExperts):
        dispatcher._maybe_dtoh_and_synchronize = lambda point, counts_e=None: counts_e


class LoopedStack(torch.nn.ModuleList):
    """The layers of a model, or of one pipeline stage, run once per loop."""

    def __init__(self, layers: Iterable[PLTLayer] = (), numbers: Sequence[int] = ()):
        """``numbers`` counts the layers over the whole model, from 0."""
        super().__init__(layers)
        self.numbers = list(numbers)

    def run(
        self,
        hidden_sbd: Tensor,
        at: Pass,
        lent: Sequence[Lent] | None,
        part: range | None = None,
    ) -> tuple[Tensor, list[Lent]]:
        """Run the layers (``part``: local numbers) in one loop.

        Returns:
            The output, and what each layer lends if this is loop 1.
        """
        own: list[Lent] = []
        for index, local in enumerate(part if part is not None else range(len(self))):
            arguments = (hidden_sbd, at, lent[index] if lent is not None else None)
            hidden_sbd, lends = self._run_layer(self[local], *arguments)
            own.append(lends)
        return hidden_sbd, own

    @staticmethod
    def _run_layer(layer: Any, *arguments: Any) -> tuple[Tensor, Lent]:
        if layer.training and layer.config.recompute_granularity == "full":
            contexts = partial(recompute_contexts, get_fp8_context(layer.config))
            return checkpoint(layer, *arguments, use_reentrant=False, context_fn=contexts)
        return layer(*arguments)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """One checkpoint key per layer, numbered over the whole model (from 0)."""
        state: dict[str, Any] = {}
        for local, (number, layer) in enumerate(zip(self.numbers, self, strict=True)):
            here = f"{prefix}{local}."
            layer_state = layer.sharded_state_dict(here, sharded_offsets, metadata)
            replace_prefix_for_sharding(layer_state, here, f"{prefix}{number}.")
            state.update(layer_state)
        return state
