"""What autograd keeps of one micro batch on one rank until its backward pass, in bytes.

Read off the model's code (model/block.py, gated_attention.py, sdpa.py, router.py, Megatron's
SequentialMLP and all-to-all dispatcher), one term per tensor, and held against the real model
(tests/unit/plan/test_activations.py). A tensor counts once, whoever keeps it.

Letters: t slots x sequences that attention sees here, r those of the residual stream (t / TP with
sequence parallelism), d hidden, h query heads and g KV heads of this rank, k head size, e bytes
per element.
"""

from dataclasses import dataclass
from math import ceil

from pltmoe.config import ModelConfig, RunConfig
from pltmoe.parallel.layout import Layout


@dataclass(frozen=True)
class Kernels:
    """Differences between the kernels that may run."""

    fused_norm: bool
    """RMSNorm keeps its input as it is; else it keeps the normed input, and both in fp32."""
    cuts_window: bool
    """The window's Q, K and V are cut into bands (model/sdpa.py)."""
    repeats_heads: bool
    """The bands' KV heads are repeated, one for each query head."""


TE = Kernels(fused_norm=True, cuts_window=False, repeats_heads=False)
"""Transformer Engine's attention knows windows and grouped heads."""
CUDA = Kernels(fused_norm=True, cuts_window=True, repeats_heads=True)
"""PyTorch's memory-efficient attention takes the bands' mask, but no grouped heads."""
CPU = Kernels(fused_norm=False, cuts_window=True, repeats_heads=False)


@dataclass(frozen=True)
class Sizes:
    """The letters, for one rank."""

    m: ModelConfig
    s: int
    """Slots of the sequence here."""
    b: int
    r: int
    tp: int
    cp: int
    etp: int
    e: int
    kernels: Kernels
    expert_load: float = 1.0
    """Tokens at this rank's experts over the mean."""

    @property
    def t(self) -> int:
        """Slots x sequences of attention."""
        return self.s * self.b

    @property
    def h(self) -> int:
        """Query heads of this rank."""
        return self.m.num_attention_heads // self.tp

    @property
    def g(self) -> int:
        """KV heads of this rank."""
        return self.m.num_kv_heads // self.tp

    @property
    def query(self) -> int:
        """Bytes of one tensor [t, h, k]."""
        return self.t * self.h * self.m.head_dim * self.e

    @property
    def key(self) -> int:
        """Bytes of one tensor [t, g, k]."""
        return self.t * self.g * self.m.head_dim * self.e

    @property
    def stream(self) -> int:
        """Bytes of one tensor [r, d]."""
        return self.r * self.m.hidden_size * self.e


def sizes_for(
    config: RunConfig,
    layout: Layout,
    element: int,
    kernels: Kernels | None = None,
    expert_load: float = 1.0,
) -> Sizes:
    """Return the letters of a run; ``kernels`` None: those that it takes on a GPU."""
    s = config.data.sequence_length // layout.context_parallel_size
    t = s * layout.micro_batch_size
    return Sizes(
        m=config.model,
        s=s,
        b=layout.micro_batch_size,
        r=t // layout.tensor_parallel_size if layout.sequence_parallel else t,
        tp=layout.tensor_parallel_size,
        cp=layout.context_parallel_size,
        etp=layout.expert_tensor_parallel_size,
        e=element,
        kernels=kernels or _on_a_gpu(config),
        expert_load=expert_load,
    )


def _on_a_gpu(config: RunConfig) -> Kernels:
    """Transformer Engine unless it is turned off, and not in fp32; see runtime/devices.py."""
    has_none = config.train.transformer_impl == "local" or config.train.precision == "fp32"
    return CUDA if has_none else TE


@dataclass(frozen=True)
class LayerBytes:
    """What one layer keeps in one loop, without recomputation, by part."""

    stream: float
    """Residual stream and norms."""
    projections: float
    """Q, K, V as projected, normed and rotated."""
    attention: float
    """Everything between the projections: outputs, scores' sums, the window's bands, the gate."""
    feed_forward: float
    """Dense layer, or the experts without what follows."""
    dispatch: float
    """Router, sort order, and the tokens as the experts receive them."""

    @property
    def total(self) -> float:
        """All parts."""
        return self.stream + self.projections + self.attention + self.feed_forward + self.dispatch


def layer_bytes(z: Sizes, loop: int) -> LayerBytes:
    """Return what a layer keeps in ``loop`` (from 1) when nothing is recomputed."""
    return LayerBytes(
        stream=2 * (_norm(z, z.r, z.m.hidden_size) + _norm_input(z) + z.stream),
        projections=_projections(z, loop),
        attention=_attention(z, loop),
        feed_forward=_experts(z) if z.m.is_moe else _dense(z),
        dispatch=_dispatch(z) if z.m.is_moe else 0,
    )


def kept_by_layer(z: Sizes, loop: int, recompute: str) -> float:
    """Return what a layer keeps in ``loop`` under a recompute mode."""
    whole = layer_bytes(z, loop)
    if recompute == "none":
        return whole.total
    if recompute == "selective":  # inputs and output of everything between the projections
        borrowed = _borrows(z, loop)
        own = 0 if _keeps_mixed(z, loop) or not borrowed else _mixed_qkv(z)
        unused_key = z.key if borrowed else 0
        return whole.total - whole.attention + z.query + own + unused_key
    kept = z.stream  # a layer's input; the rest is computed again
    if loop == 1 < z.m.num_loops:
        kept += lent_bytes(z)
    return kept


def lent_bytes(z: Sizes) -> float:
    """Return what one layer of loop 1 lends to later loops, besides what it keeps anyway."""
    return shared_kv_bytes(z) + z.r * (z.m.num_experts or 0)  # the routing map, one byte each


def shared_kv_bytes(z: Sizes) -> float:
    """Return K and V of one layer, where later loops borrow them; part of loop 1's total.

    Later loops leave gradients of the same size for loop 1.
    """
    return 2 * z.key if z.m.share_first_loop_kv else 0


def head_bytes(z: Sizes) -> float:
    """Return what final norm, head and cross entropy keep: mostly fp32 softmax [t, v / TP]."""
    norm = _norm(z, z.r, z.m.hidden_size) + _norm_input(z) + z.stream
    labels = z.t * (8 + 8 + 1 + 4)  # labels, their offsets, whose vocabulary, losses
    return norm + 4 * z.t * z.m.vocab_size / z.tp + labels


def message_bytes(z: Sizes, layout: Layout) -> float:
    """Return what is under way between ranks, whatever the micro batch.

    Between stages an input, an output and their gradients (a plain 1F1B schedule waits for each
    message, so two of them); under sequence parallelism Megatron's one buffer of gathered slots.
    """
    stages, chunks = layout.pipeline_parallel_size, layout.loop_chunks
    between = 0 if stages == 1 else (2 if chunks == 1 else 4) * z.stream
    return between + (z.t * z.m.hidden_size * z.e if layout.sequence_parallel else 0)


def between_loops_bytes(z: Sizes) -> float:
    """Return what ends a loop that is not the last: the final norm, where it is applied."""
    if not z.m.normalize_per_loop:
        return 0
    return _norm(z, z.r, z.m.hidden_size) + _norm_input(z)


def _norm(z: Sizes, rows: int, width: int) -> float:
    """Return what RMSNorm adds besides its input and output."""
    scale = 4 * rows  # one fp32 number per row
    if z.kernels.fused_norm:
        return scale
    normed = 4 * rows * width
    return scale + normed + (normed if z.e == 2 else 0)  # and an fp32 copy of a bf16 input


def _norm_input(z: Sizes) -> int:
    """Return the residual stream as a norm's input, where no fp32 copy replaces it."""
    return z.stream if _norm_keeps_input(z) else 0


def _norm_keeps_input(z: Sizes) -> bool:
    return z.kernels.fused_norm or z.e == 4


def _mixed_qkv(z: Sizes) -> int:
    """Return the output of the QKV projection, of which K and V are views."""
    return z.query + 2 * z.key


def _borrows(z: Sizes, loop: int) -> bool:
    return loop > 1 and z.m.share_first_loop_kv


def _window_is_cut(z: Sizes) -> bool:
    return z.kernels.cuts_window and z.m.window_keys < z.s * z.cp


def _keeps_mixed(z: Sizes, loop: int) -> bool:
    """Whether something needs the projection's output: V itself, or K before its norm."""
    if not _borrows(z, loop):
        return True
    if z.m.gated_swa:
        return (z.m.qk_norm and _norm_keeps_input(z)) or not _window_is_cut(z)
    return z.m.qk_norm and _norm_keeps_input(z) and not _copies_query(z)


def _copies_query(z: Sizes) -> bool:
    """Whether Q is cut out of the projection by a copy: each KV head lies behind its queries."""
    return z.h != z.g > 1


def _projections(z: Sizes, loop: int) -> float:
    k = z.m.head_dim
    own_keys = not _borrows(z, loop) or z.m.gated_swa
    total = _mixed_qkv(z) if _keeps_mixed(z, loop) else 0
    if z.m.qk_norm:
        total += _norm(z, z.t * z.h, k)
        total += z.query if _copies_query(z) and _norm_keeps_input(z) else 0
        total += _norm(z, z.t * z.g, k) if own_keys else 0
    total += (4 if own_keys else 2) * z.s * k * z.e  # RoPE's cosines and sines, for Q and for K
    return total + z.query + (z.key if not _borrows(z, loop) and z.cp == 1 else 0)


def _attention(z: Sizes, loop: int) -> float:
    total = z.query + 4 * z.t * z.h  # output, and the sum of each query's scores
    if z.m.gate_use_hidden_states and z.tp > 1 and z.r < z.t:
        total += z.t * z.m.hidden_size * z.e  # the gate gathers the normed stream
    if z.cp > 1:
        # Each of two mirrored chunks attends to a copy of K and V up to its end, and the two
        # outputs are joined.
        total += (2 * z.cp + 1) * z.key + z.query
    if not (_borrows(z, loop) and z.m.gated_swa):
        return total
    return total + _window(z) + 2 * 4 * z.t * z.h + z.query  # g and 1 - g in fp32, the mix


def _window(z: Sizes) -> float:
    """Return the sliding-window branch: Q, K, V, perhaps cut into bands, and its output."""
    output = z.query + 4 * z.t * z.h
    if not _window_is_cut(z):
        return output + z.key
    size = max(z.m.window_keys, 64)
    segments, past = (2, z.m.window_keys - 1) if z.cp > 1 else (1, 0)
    slots = segments * ceil((z.s / segments + past) / size) * size * z.b
    query = slots * z.h * z.m.head_dim
    heads = z.h if z.kernels.repeats_heads else z.g
    key = 2 * slots * heads * z.m.head_dim  # a band: own block and the one before
    mask = slots * 2 * size * z.e
    total = (2 * query + 2 * key) * z.e + mask + 4 * slots * z.h
    return total + z.query  # the output as [t, h * k]


def _dense(z: Sizes) -> float:
    width = (z.m.ffn_hidden_size or 0) / z.tp
    return z.t * (2 + 1) * width * z.e  # gate and up, their product


def _received(z: Sizes) -> float:
    """Return how many token copies this rank's experts work on."""
    return z.r * (z.m.moe_top_k or 0) * z.etp * z.expert_load


def _experts(z: Sizes) -> float:
    width = (z.m.moe_ffn_hidden_size or 0) / z.etp
    return _received(z) * (2 + 1) * width * z.e  # gate and up, their weighted product


def _dispatch(z: Sizes) -> float:
    experts, top_k = z.m.num_experts or 0, z.m.moe_top_k or 0
    # Logits and scores in fp32, routing map in bytes; chosen experts (int64), weights, their sum.
    # About as much where loop 1's experts are taken: a mask instead of the routing map.
    router = z.r * (experts * (4 + 4 + 1) + top_k * (8 + 4) + 4)
    if z.m.moe_aux_loss_coeff or z.m.moe_z_loss_coeff:
        router += 4 * z.r  # logsumexp of the z loss
    order = 8 * z.r * (experts + top_k)  # sort order of the whole routing map, token numbers
    return router + order + _received(z) * (z.m.hidden_size * z.e + 4)  # tokens, their weights
