"""Parameters of one rank, and the bytes of parameters, gradients and optimizer state."""

from dataclasses import dataclass

from pltmoe.config import ModelConfig
from pltmoe.parallel.layout import Layout


@dataclass(frozen=True)
class StageWeights:
    """Parameters that a rank of one stage holds."""

    shared: int
    """Everything but experts; copies on data- and context-parallel ranks share their optimizer."""
    experts: int
    """Experts; copies on expert-data-parallel ranks."""
    largest: int
    """The largest single parameter: the size of a weight gradient before it is added."""
    in_layers: int
    """Those that every loop uses: without embedding, head and final norm."""


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of one rank that live as long as the run."""

    parameters: int
    gradients: int
    """fp32, whatever the precision."""
    optimizer: float
    """Two fp32 moments, and an fp32 master copy where weights are bf16; this rank's shard."""
    shard: float
    """Parameters that this rank updates on its GPU."""
    buckets: float = 0.0
    """Buffers for messages, and weights gathered from other ranks, while a step runs."""


def stage_weights(m: ModelConfig, layout: Layout, stage: int) -> StageWeights:
    """Count the parameters on a rank of ``stage``."""
    tp, last = layout.tensor_parallel_size, layout.pipeline_parallel_size - 1
    layers = m.num_layers // layout.pipeline_parallel_size
    matrices = _layer_matrices(m, layout)
    table = m.vocab_size // tp * m.hidden_size
    tables = (stage == 0) + (stage == last and not (m.tied_embeddings and last == 0))
    in_layers = layers * (sum(matrices) + _layer_vectors(m, tp))
    shared = in_layers + tables * table
    shared += m.hidden_size if stage == last else 0  # final norm
    expert = 3 * m.hidden_size * (m.moe_ffn_hidden_size or 0) // layout.expert_tensor_parallel_size
    experts = layers * (m.num_experts or 0) // layout.expert_parallel_size * expert
    largest = max(*matrices, tables and table, expert * 2 // 3)
    return StageWeights(shared, experts, largest, in_layers + experts)


def weight_bytes(
    weights: StageWeights, layout: Layout, element: int, fp8: bool = False
) -> WeightBytes:
    """Return what lives as long as the run; ``element`` is bytes per weight (2: bf16, 4: fp32).

    With ``fp8`` Transformer Engine keeps a copy of each weight, and its transpose, of one byte.
    """
    count = weights.shared + weights.experts
    copies = layout.data_parallel_size * layout.context_parallel_size
    shard = weights.shared / copies + weights.experts / layout.expert_data_parallel_size
    kept = element + (2 if fp8 else 0)
    return WeightBytes(kept * count, 4 * count, shard * (12 if element == 2 else 8), shard)


def zero_bytes(
    weights: StageWeights,
    layout: Layout,
    element: int,
    stage: int,
    offloaded: bool = False,
    bucket: float = 5e8,
) -> WeightBytes:
    """Return the same for DeepSpeed (0.19.8).

    From stage 1 on it keeps fp32 masters also beside fp32 weights. Stage 1 adds micro batches up in
    whole gradients, in fp32 beside those of bf16 weights. Offloaded state is in host memory; sums
    of fp32 gradients are, too, but those of bf16 weights stay, this rank's part of them.

    Args:
        weights: of this rank.
        layout: sizes.
        element: bytes per weight.
        stage: of ZeRO.
        offloaded: whether the optimizer's state is in host memory.
        bucket: numbers in a bucket of gradients (zero_optimization.reduce_bucket_size).
    """
    count = weights.shared + weights.experts
    shard = weights.shared / layout.data_parallel_size
    shard += weights.experts / layout.expert_data_parallel_size
    if stage == 0:
        return WeightBytes(element * count, 4 * count, 8 * count, count)
    whole = element * count + 4 * (count if element == 2 else shard)
    part = 4 * shard * (element == 2 or not offloaded)
    gradients = whole if stage == 1 and not offloaded else part
    live = element * min(count, 1e9) if stage == 3 else 0  # zero_optimization.max_live_parameters
    return WeightBytes(
        element * (round(shard) if stage == 3 else count),
        round(gradients),
        0 if offloaded else 12 * shard,
        0 if offloaded else shard,
        (8 if element == 2 else 4) * bucket + live,  # bf16 gradients, flattened, and in fp32
    )


def _layer_matrices(m: ModelConfig, layout: Layout) -> tuple[int, ...]:
    """Projections, dense feed-forward and router of a layer."""
    tp, d = layout.tensor_parallel_size, m.hidden_size
    qkv = d * m.head_dim * (m.num_attention_heads + 2 * m.num_kv_heads) // tp
    out = d * m.head_dim * m.num_attention_heads // tp
    ffn = (m.ffn_hidden_size or 0) * d // tp
    return qkv, out, 2 * ffn, ffn, (m.num_experts or 0) * d  # every rank has the whole router


def _layer_vectors(m: ModelConfig, tp: int) -> int:
    """Norms, and the gate with its bias."""
    norms = 2 * m.hidden_size + (2 * m.head_dim if m.qk_norm else 0)
    if not m.gated_swa:
        return norms
    width = m.hidden_size if m.gate_use_hidden_states else m.head_dim
    return norms + m.num_attention_heads // tp * (width + 1)
