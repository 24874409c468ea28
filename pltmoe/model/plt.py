"""The Parallel Loop Transformer on Megatron-core: embed, run the stack L times, norm, head.

Equal to model/reference.py, loss and gradients (tests/unit/model/test_parity.py). Composed from
layer specs on LanguageModule, because Megatron's GPTModel is deprecated and knows no loops.

Letters: s slots, b sequences, d hidden, v vocabulary.
"""

from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from pltmoe.config.model import ModelConfig
from pltmoe.model.block import LoopedStack
from pltmoe.model.cross_loop import next_loop_input
from pltmoe.model.layer_specs import RMSNorm, layer_spec


class PLTModel(LanguageModule):
    """A language model whose layer stack runs ``plt.num_loops`` times per token."""

    def __init__(self, plt: ModelConfig, config: TransformerConfig, pg_collection: Any):
        """Build with uninitialised weights; ``model/initialize.py`` or a checkpoint fills them."""
        super().__init__(config=config, pg_collection=pg_collection)
        self.plt = plt
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = self.post_process = True
        self.share_embeddings_and_output_weights = plt.tied_embeddings
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
        spec = layer_spec(plt)
        self.layers = LoopedStack(
            build_module(spec, config=config, layer_number=number, pg_collection=pg_collection)
            for number in range(1, plt.num_layers + 1)
        )
        self.final_norm = RMSNorm(config=config, hidden_size=plt.hidden_size, eps=plt.norm_eps)
        self.output_layer = ColumnParallelLinear(
            plt.hidden_size,
            plt.vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_bias_add=False,
            gather_output=False,
            skip_weight_param_allocation=plt.tied_embeddings,
            tp_group=pg_collection.tp,
        )
        self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Accept the (absent) input from a previous stage; Megatron's schedules call it."""

    def forward(
        self,
        tokens_bs: Tensor,
        position_ids_bs: Tensor | None = None,
        labels_bs: Tensor | None = None,
    ) -> Tensor:
        """Run all loops.

        Args:
            tokens_bs: token ids.
            position_ids_bs: slots with position 0 begin a document: the cross-loop shift gives
                zero there. RoPE always uses the slot index.
            labels_bs: next tokens, already shifted.

        Returns:
            With labels, the cross entropy of each token [b, s] in float32 (Megatron's
            ``vocab_parallel_cross_entropy``); without, logits [b, s, v].
        """
        hidden = self._run_loops(tokens_bs, position_ids_bs)
        weight = self.shared_embedding_or_output_weight() if self.plt.tied_embeddings else None
        logits_sbv, _ = self.output_layer(self.final_norm(hidden), weight=weight)
        if labels_bs is None:
            return logits_sbv.transpose(0, 1).contiguous()
        return self.compute_language_model_loss(labels_bs, logits_sbv)

    def _run_loops(self, tokens_bs: Tensor, position_ids_bs: Tensor | None) -> Tensor:
        plt, s = self.plt, tokens_bs.size(1)
        if position_ids_bs is None:
            position_ids_bs = torch.arange(s, device=tokens_bs.device).expand_as(tokens_bs)
        embedding = self.embedding(tokens_bs, position_ids_bs)
        rope = self.rotary_pos_emb(s)
        starts_document = (position_ids_bs == 0).transpose(0, 1)
        hidden, first_kv = self.layers.run(embedding, rope, 1, None)
        for loop in range(2, plt.num_loops + 1):
            if plt.cross_loop_shift:
                previous = self.final_norm(hidden) if plt.normalize_per_loop else hidden
                hidden = next_loop_input(
                    embedding, previous, starts_document, 0, plt.emb_scale, plt.hidden_scale
                )
            hidden, _ = self.layers.run(hidden, rope, loop, first_kv)
        return hidden
