"""The model section: what is computed. Field names follow the paper and Qwen3-MoE."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt


class Section(BaseModel):
    """One section of the run configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelConfig(Section):
    """A Qwen3-style decoder whose layer stack runs ``num_loops`` times per token.

    The six rows of the paper's ablation (arXiv 2510.24824, table 3) are combinations of
    ``num_loops``, ``cross_loop_shift``, ``share_first_loop_kv`` and ``gated_swa``.

    Made by ``load_config`` or ``model_from_dict``, which hold fields to each other (rules.py). The
    class alone does not: of fields that contradict each other it would ignore some.
    """

    vocab_size: PositiveInt
    """Rows of the embedding table; at least the tokenizer's vocabulary."""
    num_layers: PositiveInt
    """Layers in the stack (each runs ``num_loops`` times with the same weights)."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    num_attention_heads: PositiveInt
    """Query heads."""
    num_kv_heads: PositiveInt
    """Key/value heads (GQA); equal to ``num_attention_heads`` for plain multi-head attention."""
    head_dim: PositiveInt
    """Size of one head; heads * head_dim need not be hidden_size."""
    ffn_hidden_size: PositiveInt | None = None
    """SwiGLU width of a dense model; leave out for a mixture of experts."""
    tied_embeddings: bool = False
    """Use the embedding table as the output head as well."""
    qk_norm: bool = True
    """RMSNorm on each head of Q and K before RoPE, as in Qwen3."""
    norm_eps: PositiveFloat = 1e-6
    """Epsilon of every RMSNorm."""
    rope_theta: PositiveFloat = 10000.0
    """Base period of the rotary embedding. Positions are slot indices, the same in every loop."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of weight init; output projections use init_std / sqrt(2 num_layers)."""

    num_experts: PositiveInt | None = None
    """Experts per layer; leave out for a dense model."""
    moe_top_k: PositiveInt | None = None
    """Experts each token visits in each layer and loop (dropless); at least 2 to train."""
    moe_ffn_hidden_size: PositiveInt | None = None
    """SwiGLU width of one expert."""
    moe_aux_loss_coeff: float = Field(default=0.0, ge=0)
    """Coefficient of the Switch load-balancing loss, averaged over the loops that choose."""
    moe_z_loss_coeff: float = Field(default=0.0, ge=0)
    """Coefficient of the router z-loss (ST-MoE), averaged over loops."""
    moe_expert_bias_update_rate: float = Field(default=0.0, ge=0)
    """Step of the aux-loss-free expert bias (arXiv 2408.15664); 0 turns the bias off.
    The bias is updated once per optimizer step from the counts of all loops that choose experts."""
    moe_loop_routing: Literal["independent", "shared"] = "independent"
    """``independent``: each loop chooses its experts. ``shared``: loop 1 chooses for its slot and
    layer; later loops use the same experts, weighted by their own logits. A decoding step then
    reads no more experts than with one loop. Loop 1 alone is balanced; all loops have a z-loss."""

    num_loops: PositiveInt = 1
    """L: how often the stack runs per token."""
    cross_loop_shift: bool = False
    """Cross-loop parallelism: loop l > 1 reads E + shift(H_{l-1}). Without it, H_{l-1} itself."""
    share_first_loop_kv: bool = False
    """Later loops attend to loop 1's keys and values instead of their own."""
    gated_swa: bool = False
    """G-SWA: later loops mix in a sliding window over their own keys and values by a gate."""
    window_keys: PositiveInt = 64
    """Keys the sliding window sees, **including** the current token (flash: (window_keys-1, 0))."""
    gate_use_hidden_states: bool = False
    """Feed the gate the normed hidden state instead of the query (weight [heads, hidden])."""
    normalize_per_loop: bool = False
    """Apply the final norm to H_{l-1} before it is scaled, shifted and added to E."""
    emb_scale: float = 1.0
    """Factor on E in the input of loops > 1."""
    hidden_scale: float = 1.0
    """Factor on shift(H) in the input of loops > 1."""

    @property
    def is_moe(self) -> bool:
        """Whether the feed-forward layers are mixtures of experts."""
        return self.num_experts is not None

    @property
    def choosing_loops(self) -> int:
        """Loops that choose experts: the first ones."""
        return 1 if self.moe_loop_routing == "shared" else self.num_loops

    @property
    def local_window(self) -> int | None:
        """Keys of the gated window in loops > 1, or None without G-SWA."""
        return self.window_keys if self.gated_swa else None
