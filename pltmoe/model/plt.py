"""The Parallel Loop Transformer on Megatron-core: embed, run the stack L times, norm, head.

Equal to model/reference.py, loss and gradients (tests/unit/model/test_parity.py). Composed from
layer specs on LanguageModule, because Megatron's GPTModel is deprecated and knows no loops.

One process may hold the whole model, and then ``forward`` runs all loops. Or it holds one pipeline
stage, whose parts ``parallel/loop_chunks.py`` calls: the same steps, cut where loops and stages
meet.

    embed -> [layers of loop 1] -> finish_loop -> next_loop -> [layers of loop 2] -> ... -> head
    first                          last           first                                     last

Letters: s slots, b sequences, d hidden, v vocabulary.
"""

import copy
from typing import Any, NamedTuple

import torch
from megatron.core.enums import ModelType
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from pltmoe.config.model import ModelConfig
from pltmoe.model.block import LoopedStack
from pltmoe.model.cross_loop import add_to_embedding
from pltmoe.model.gated_attention import Pass
from pltmoe.model.layer_specs import RMSNorm, layer_spec
from pltmoe.model.loop_diagnostics import LoopDiagnostics
from pltmoe.model.slots import AllSlots, Slots, starts_document


class StageParts(NamedTuple):
    """What one pipeline stage holds of the model."""

    chunks: tuple[range, ...]
    """Layers (from 0) of each model chunk, in the order they run."""
    is_first: bool = True
    """Holds the embedding."""
    is_last: bool = True
    """Holds the final norm and the head."""


class PLTModel(LanguageModule):
    """A language model, or one stage of it, whose layers run ``plt.num_loops`` times per token."""

    def __init__(
        self,
        plt: ModelConfig,
        config: TransformerConfig,
        pg_collection: Any,
        stage: StageParts | None = None,
        slots: Slots | None = None,
    ):
        """Build with uninitialised weights; ``model/initialize.py`` or a checkpoint fills them.

        Args:
            plt: what is computed.
            config: the same for Megatron (model/megatron_config.py).
            pg_collection: Megatron's process groups, handed through.
            stage: the part to build; the whole model by default.
            slots: how sequences are cut between ranks; not at all by default.
        """
        super().__init__(config=config, pg_collection=pg_collection)
        self.plt = plt
        self.stage = stage or StageParts((range(plt.num_layers),))
        self.slots = slots or AllSlots()
        self.diagnostics = LoopDiagnostics(plt, torch.cuda.current_device())
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = self.stage.is_first, self.stage.is_last
        self.share_embeddings_and_output_weights = plt.tied_embeddings
        if self.stage.is_first:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=plt.vocab_size,
                max_sequence_length=0,  # only used by learned positions
                position_embedding_type="rope",
                tp_group=pg_collection.tp,
            )
        self.rotary_pos_emb = RotaryEmbedding(
            kv_channels=plt.head_dim,
            rotary_percent=1.0,
            rotary_base=plt.rope_theta,
            cp_group=pg_collection.cp,
        )
        spec = layer_spec(plt, config, self.slots)
        numbers = [number for chunk in self.stage.chunks for number in chunk]
        self.layers = LoopedStack(
            (
                build_module(
                    spec, config=config, layer_number=number + 1, pg_collection=pg_collection
                )
                for number in numbers
            ),
            numbers,
        )
        if self.stage.is_last:
            self._build_head(pg_collection)
        self.setup_embeddings_and_output_layer()

    def _build_head(self, pg_collection: Any) -> None:
        plt, config = self.plt, copy.copy(self.config)
        if config.transformer_impl == "transformer_engine":
            config.gradient_accumulation_fusion = False  # this layer is Megatron's: needs Apex
        self.final_norm = RMSNorm(config=config, hidden_size=plt.hidden_size, eps=plt.norm_eps)
        self.output_layer = ColumnParallelLinear(
            plt.hidden_size,
            plt.vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_bias_add=False,
            gather_output=False,
            skip_weight_param_allocation=plt.tied_embeddings and self.stage.is_first,
            tp_group=pg_collection.tp,
        )

    def begin_step(self, watch: bool) -> None:
        """Forget the statistics of the last step; take none in this one unless ``watch``."""
        self.diagnostics.begin_step(watch)
        for layer in self.layers:
            layer.stats.begin_step(watch)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Accept the (absent) input from a previous stage; Megatron's schedules call it."""

    def forward(
        self,
        tokens_bs: Tensor,
        position_ids_bs: Tensor | None = None,
        labels_bs: Tensor | None = None,
        loss_tokens: Tensor | None = None,
    ) -> Tensor:
        """Run all loops.

        Args:
            tokens_bs: token ids of this rank's slots.
            position_ids_bs: slots with position 0 begin a document: the cross-loop shift gives
                zero there. RoPE always uses the slot index.
            labels_bs: next tokens, already shifted.
            loss_tokens: how many tokens of the (whole) sequences have a loss; all by default.

        Returns:
            With labels, the cross entropy of each token [b, s] in float32 (Megatron's
            ``vocab_parallel_cross_entropy``); without, logits [b, s, v] of this rank's vocabulary.
        """
        if position_ids_bs is None:
            slots = torch.arange(tokens_bs.size(1), device=tokens_bs.device)
            position_ids_bs = slots.expand_as(tokens_bs)
        embedding = self.embed(tokens_bs, position_ids_bs)
        # Once: inside of another such context delayed scales of gradients would move for each.
        with get_fp8_context(self.config):
            hidden = self._run_loops(embedding, tokens_bs, position_ids_bs, loss_tokens)
        return self.head(hidden, labels_bs)

    def _run_loops(
        self,
        embedding_sbd: Tensor,
        tokens_bs: Tensor,
        position_bs: Tensor,
        loss_tokens: Tensor | None,
    ) -> Tensor:
        at = self.pass_of(1, tokens_bs, loss_tokens)
        hidden, first = self.layers.run(embedding_sbd, at, None)
        self.diagnostics.add_output(1, hidden)
        for loop in range(2, self.plt.num_loops + 1):
            hidden = self.next_loop(loop, embedding_sbd, self.finish_loop(hidden), position_bs)
            hidden, _ = self.layers.run(hidden, self.pass_of(loop, tokens_bs, loss_tokens), first)
            self.diagnostics.add_output(loop, hidden)
        return hidden

    def pass_of(self, loop: int, tokens_bs: Tensor, loss_tokens: Tensor | None) -> Pass:
        """Return what the layers need to know in one loop."""
        total = self.slots.total or tokens_bs.size(1)
        if loss_tokens is None:
            count = total * tokens_bs.size(0)
            loss_tokens = torch.tensor(float(count), device=tokens_bs.device)
        # packed_seq: the angles of all slots; Slots picks those of this rank.
        rope = self.slots.rope(self.rotary_pos_emb(total, packed_seq=True))
        return Pass(loop, rope, loss_tokens)

    def embed(self, tokens_bs: Tensor, position_ids_bs: Tensor) -> Tensor:
        """Return E [s, b, d]."""
        return self.embedding(tokens_bs, position_ids_bs)

    def finish_loop(self, hidden_sbd: Tensor) -> Tensor:
        """Normalise the output of a loop that is not the last, if the model does that."""
        return self.final_norm(hidden_sbd) if self.plt.normalize_per_loop else hidden_sbd

    def next_loop(
        self, loop: int, embedding_sbd: Tensor, previous_sbd: Tensor, position_bs: Tensor
    ) -> Tensor:
        """Return the input of ``loop`` > 1 from E and the (finished) output of the one before."""
        if not self.plt.cross_loop_shift:
            return previous_sbd
        begins = self.slots.residual(starts_document(position_bs))
        moved = self.slots.shift(previous_sbd).masked_fill(begins.unsqueeze(-1), 0.0)
        self.diagnostics.add_shift(loop - 1, previous_sbd, moved, begins)
        return add_to_embedding(embedding_sbd, moved, self.plt.emb_scale, self.plt.hidden_scale)

    def head(self, hidden_sbd: Tensor, labels_bs: Tensor | None) -> Tensor:
        """Return token losses [b, s], or logits [b, s, v] without labels."""
        weight = self.shared_embedding_or_output_weight() if self.plt.tied_embeddings else None
        logits_sbv, _ = self.output_layer(self.final_norm(hidden_sbd), weight=weight)
        if labels_bs is None:
            return logits_sbv.transpose(0, 1).contiguous()
        return self.compute_language_model_loss(labels_bs, logits_sbv)
