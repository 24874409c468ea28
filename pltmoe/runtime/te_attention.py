"""Which kernel Transformer Engine gives each attention branch: its own selector is asked."""

from pltmoe.errors import EngineError
from pltmoe.runtime.devices import Backend

WHY = "NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 prints why"


def selected(
    *,
    slots: int,
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window_keys: int | None,
    deterministic: bool = False,
) -> Backend:
    """Return the kernel that trains a branch in bf16 on the current GPU.

    Args:
        slots: of a sequence.
        batch: sequences of a micro batch.
        heads: query heads on this rank.
        kv_heads: KV heads on this rank.
        head_dim: size of a head.
        window_keys: keys of the window, the query's own included; None: the whole past.
        deterministic: only kernels that repeat bit for bit.

    Raises:
        EngineError: none can do it.
    """
    from transformer_engine.pytorch.attention.dot_product_attention.utils import (
        AttentionParams,
        get_attention_backend,
    )

    window = (-1, 0) if window_keys is None else (window_keys - 1, 0)
    flash, version, fused, _, unfused, _ = get_attention_backend(
        AttentionParams(
            qkv_layout="sbhd_sbhd_sbhd", batch_size=batch, num_heads=heads,
            num_gqa_groups=kv_heads, max_seqlen_q=slots, max_seqlen_kv=slots, head_dim_qk=head_dim,
            head_dim_v=head_dim, attn_mask_type="causal", window_size=window,
            softmax_scale=head_dim**-0.5, deterministic=deterministic, is_training=True,
            bottom_right_diagonal=False,  # as the attention itself asks where all slots are there
        )
    )  # fmt: skip
    what = "the whole past" if window_keys is None else f"a window of {window_keys} keys"
    if fused:
        return Backend("TE", f"cuDNN: {what}")
    if flash:
        return Backend("TE", f"FlashAttention {version}: {what}; not cuDNN: {WHY}")
    if unfused:
        return Backend("TE", f"unfused, all s x s scores: {what}; slow: {WHY}")
    raise EngineError(
        f"Transformer Engine has no attention for {what}, heads of {head_dim}: {WHY}; or set "
        "train.transformer_impl to local"
    )
