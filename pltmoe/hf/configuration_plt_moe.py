"""Configuration of the Parallel Loop Transformer for transformers 5.

This file ships with the weights: it imports nothing but transformers. Fields are those of
Qwen3-MoE (dense models: Qwen3), and ``plt_*`` for what the loops add (arXiv 2510.24824).
"""

from collections.abc import Iterator

import transformers

try:
    from transformers import PreTrainedConfig
except ImportError as error:  # its name of before
    raise ImportError(
        f"this model needs transformers 5.0 or newer, here is {transformers.__version__}: "
        "pip install -U 'transformers>=5'"
    ) from error

_NEUTRAL_BETWEEN_LOOPS = {
    "plt_normalize_per_loop": False,
    "plt_emb_scale": 1.0,
    "plt_hidden_scale": 1.0,
}


class PLTMoEConfig(PreTrainedConfig):
    """Describes a decoder whose layer stack runs ``plt_num_loops`` times per token.

    Args:
        vocab_size: Rows of the embedding table.
        hidden_size: Width of the residual stream.
        num_hidden_layers: Layers in the stack; every loop runs all of them with the same weights.
        num_attention_heads: Query heads.
        num_key_value_heads: Key/value heads; ``num_attention_heads`` must be a multiple of it.
        head_dim: Size of one head.
        intermediate_size: SwiGLU width of a dense model (``num_experts`` = 0), else None.
        num_experts: Experts per layer, all layers alike; 0 for a dense model.
        num_experts_per_tok: Experts each token visits in each layer and loop.
        moe_intermediate_size: SwiGLU width of one expert.
        norm_topk_prob: Whether the chosen experts' weights are renormalised to sum to 1.
        use_expert_bias: Whether routers have ``e_score_correction_bias``, which takes part in
            choosing experts but not in weighting them (arXiv 2408.15664).
        output_router_logits: Return the routers' logits and their balancing loss, by default.
        router_aux_loss_coef: Its factor in the loss where it is returned.
        use_qk_norm: RMSNorm on each head of Q and K before RoPE.
        rope_parameters: ``{"rope_type": "default", "rope_theta": ...}``; no other type exists here.
        plt_num_loops: L; 1 is an ordinary decoder (the flags of later loops are then false).
        plt_cross_loop_shift: Loop l > 1 reads E + shift(H_{l-1}); without it, H_{l-1} itself.
        plt_share_first_loop_kv: Later loops attend to loop 1's keys and values.
        plt_gated_swa: Later loops mix in a sliding window over their own keys and values:
            g * local + (1 - g) * global.
        plt_window_size: ``[left, right]`` as in flash attention: ``[63, 0]`` is 64 keys
            including the current token.
        plt_gate_use_hidden_states: The gate reads the normed hidden state, not the query.
        plt_gate_norm: The gate has an RMSNorm of its own, on the residual stream, for what it reads
            (LoopCoder-v2); needs plt_gate_use_hidden_states.
        plt_normalize_per_loop: Apply the final norm to H_{l-1} before it is scaled and shifted.
        plt_emb_scale: Factor on E in the input of later loops.
        plt_hidden_scale: Factor on shift(H_{l-1}) in the input of later loops.
        plt_loop_routing: ``independent``: each loop chooses its experts. ``shared``: later loops
            use those that loop 1 chose for the same slot and layer, weighted by their own scores.

    Raises:
        ValueError: fields that contradict each other; the message names them.
    """

    model_type = "plt_moe"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 65536,
        hidden_size: int = 2048,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 4,
        head_dim: int = 128,
        intermediate_size: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 4096,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        rope_parameters: dict | None = None,
        num_experts: int = 256,
        num_experts_per_tok: int = 8,
        moe_intermediate_size: int | None = 1024,
        norm_topk_prob: bool = True,
        use_expert_bias: bool = False,
        output_router_logits: bool = False,
        router_aux_loss_coef: float = 0.001,
        use_qk_norm: bool = True,
        plt_num_loops: int = 2,
        plt_cross_loop_shift: bool = True,
        plt_share_first_loop_kv: bool = True,
        plt_gated_swa: bool = True,
        plt_window_size: list[int] | None = None,
        plt_gate_use_hidden_states: bool = False,
        plt_gate_norm: bool = False,
        plt_normalize_per_loop: bool = False,
        plt_emb_scale: float = 1.0,
        plt_hidden_scale: float = 1.0,
        plt_loop_routing: str = "independent",
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        **kwargs,
    ):
        if unknown := [name for name in kwargs if name.startswith("plt_")]:
            raise ValueError(f"PLTMoEConfig: {unknown[0]} is not known to this version of the code")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self.rope_parameters = dict(rope_parameters or {})
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.norm_topk_prob = norm_topk_prob
        self.use_expert_bias = use_expert_bias
        self.output_router_logits = output_router_logits
        self.router_aux_loss_coef = router_aux_loss_coef
        self.use_qk_norm = use_qk_norm
        self.plt_num_loops = plt_num_loops
        has_later_loops = plt_num_loops > 1
        self.plt_cross_loop_shift = plt_cross_loop_shift and has_later_loops
        self.plt_share_first_loop_kv = plt_share_first_loop_kv and has_later_loops
        self.plt_gated_swa = plt_gated_swa and has_later_loops
        self.plt_window_size = list(plt_window_size) if plt_window_size is not None else [63, 0]
        self.plt_gate_use_hidden_states = plt_gate_use_hidden_states
        self.plt_gate_norm = plt_gate_norm
        self.plt_normalize_per_loop = plt_normalize_per_loop
        self.plt_emb_scale = plt_emb_scale
        self.plt_hidden_scale = plt_hidden_scale
        self.plt_loop_routing = plt_loop_routing if has_later_loops else "independent"
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            **kwargs,
        )
        self._check()

    @property
    def window_keys(self) -> int:
        """Keys a query sees in the local window, the current token included."""
        return self.plt_window_size[0] + 1

    def _check(self) -> None:
        if broken := [message for is_broken, message in self._rules() if is_broken]:
            raise ValueError("PLTMoEConfig: " + "; ".join(broken))

    def _rules(self) -> Iterator[tuple[bool, str]]:
        """Yield (is broken, message)."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        rope_type = self.rope_parameters.get("rope_type", "default")
        window, experts, top_k = self.plt_window_size, self.num_experts, self.num_experts_per_tok
        yield self.hidden_act != "silu", f"hidden_act ({self.hidden_act}) must be silu"
        yield rope_type != "default", f"rope_type ({rope_type}) must be default"
        yield (
            heads % kv_heads != 0,
            f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads})",
        )
        yield (
            not experts and not self.intermediate_size,
            "a dense model (num_experts = 0) needs intermediate_size",
        )
        yield (
            bool(experts) and not self.moe_intermediate_size,
            f"num_experts ({experts}) needs moe_intermediate_size",
        )
        yield (
            bool(experts) and not 1 <= top_k <= experts,
            f"num_experts_per_tok ({top_k}) must be between 1 and num_experts ({experts})",
        )
        yield self.plt_num_loops < 1, f"plt_num_loops ({self.plt_num_loops}) must be at least 1"
        yield (
            len(window) != 2 or window[0] < 0 or window[1] != 0,
            f"plt_window_size ({window}) must be [left, 0] with left >= 0",
        )
        yield (
            self.plt_gated_swa and not self.plt_share_first_loop_kv,
            "plt_gated_swa needs plt_share_first_loop_kv: the window is mixed with attention over "
            "loop 1's keys and values",
        )
        yield (
            self.plt_gate_norm and not self.plt_gate_use_hidden_states,
            "plt_gate_norm needs plt_gate_use_hidden_states: the query has its own norm",
        )
        routing = self.plt_loop_routing
        yield (
            routing not in ("independent", "shared"),
            f"plt_loop_routing ({routing}) must be independent or shared",
        )
        yield (
            routing == "shared" and not experts,
            "plt_loop_routing (shared) needs num_experts: a dense model has none to choose",
        )
        for name, neutral in _NEUTRAL_BETWEEN_LOOPS.items():
            value = getattr(self, name)
            broken = value != neutral and not self.plt_cross_loop_shift
            yield broken, f"{name} ({value}) needs plt_cross_loop_shift"


__all__ = ["PLTMoEConfig"]
