"""What Transformer Engine writes in CUDA, once more in PyTorch: for tests/virtual_te.py.

The functions of ``transformer_engine_torch`` 2.20.2 by the same names and with the same arguments,
as far as our models need them; those of routing are in tests/te_routing_in_torch.py. Products are
those of the numbers that FP8 stands for, added up in float32.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import transformer_engine.pytorch  # noqa: F401  loads the next
import transformer_engine_torch as tex
from torch import Tensor
from transformer_engine.pytorch.constants import DType, TE_DType_To_Torch
from transformer_engine.pytorch.tensor import (
    Float8BlockQuantizer,
    Float8CurrentScalingQuantizer,
    Float8Quantizer,
    Float8Tensor,
)
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor
from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import (
    Float8BlockwiseQTensorStorage,
)
from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

from tests.virtual_gpu import CPU

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
BLOCK = 128


def torch_dtype(dtype: Any) -> torch.dtype:
    """Translate Transformer Engine's name of a type."""
    return TE_DType_To_Torch[DType.cast(dtype)]


# Numbers of 8 bits.


def cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round ``x * scale`` to FP8, the largest number being the limit; as bytes."""
    largest = LARGEST[dtype]
    return (x.float() * scale).clamp(-largest, largest).to(dtype).view(torch.uint8)


def scale_of(amax: Tensor, dtype: torch.dtype, epsilon: float, power_of_2: bool) -> Tensor:
    """Return what brings ``amax`` to the largest number of FP8; 1 where that is impossible."""
    scale = LARGEST[dtype] / amax.clamp(min=epsilon)
    scale = torch.where((amax == 0) & (epsilon == 0) | ~amax.isfinite(), 1.0, scale)
    scale = scale.clamp(max=torch.finfo(torch.float32).max)
    return torch.exp2(scale.log2().floor()) if power_of_2 else scale


def first_last(data: Tensor) -> Tensor:
    """Return the transposed copy that a GPU wants of a tensor: its last dimension first."""
    return data.movedim(-1, 0).contiguous()


def per_tensor(x: Tensor, quantizer: Any) -> dict[str, Any]:
    """Quantise with one scale: that of earlier steps (delayed), or of this tensor."""
    dtype = torch_dtype(quantizer.dtype)
    amax = x.float().abs().amax() if x.numel() else x.new_zeros((), dtype=torch.float32)
    if isinstance(quantizer, Float8Quantizer):
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax.view(1)))
        scale = quantizer.scale.view(1)
    else:
        if quantizer.with_amax_reduction:
            group = quantizer._canonicalized_amax_reduction_group()
            torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group)
        epsilon, power_of_2 = quantizer.amax_epsilon, quantizer.force_pow_2_scales
        scale = scale_of(amax, dtype, epsilon, power_of_2).view(1)
    data = cast(x, scale, dtype)
    return {
        "_data": data if quantizer.rowwise_usage else None,
        "_transpose": first_last(data) if quantizer.columnwise_usage else None,
        "_scale_inv": 1 / scale,
    }


def in_blocks(x: Tensor, quantizer: Any, square: bool) -> tuple[Tensor, Tensor]:
    """Quantise a matrix in blocks of 128 x 128, or of 1 x 128; return bytes, 1 / scales."""
    dtype = torch_dtype(quantizer.dtype)
    rows, columns = x.shape
    tall = BLOCK if square else 1
    padded = torch.nn.functional.pad(x.float(), (0, -columns % BLOCK, 0, -rows % tall))
    blocks = padded.view(padded.size(0) // tall, tall, padded.size(1) // BLOCK, BLOCK)
    amax = blocks.abs().amax((1, 3))
    scale = scale_of(amax, dtype, quantizer.amax_epsilon, quantizer.force_pow_2_scales)
    data = cast(blocks, scale[:, None, :, None], dtype).view(padded.shape)[:rows, :columns]
    inverse = 1 / scale
    if not square:
        inverse = inverse.T
    inverse = torch.nn.functional.pad(inverse, (0, -inverse.size(1) % 4))
    return data.contiguous(), inverse.contiguous()


def per_block(x: Tensor, quantizer: Any) -> dict[str, Any]:
    """Quantise with one scale for each block; the transposed copy has blocks of its own."""
    square, matrix, found = quantizer.block_scaling_dim == 2, x.reshape(-1, x.size(-1)), {}
    for name, used, y, shape in (
        ("rowwise", quantizer.rowwise_usage, matrix, x.shape),
        ("columnwise", quantizer.columnwise_usage, matrix.T, (x.size(-1), *x.shape[:-1])),
    ):
        data, inverse = in_blocks(y, quantizer, square) if used else (None, None)
        found[f"_{name}_data"] = data.view(shape) if data is not None else None
        found[f"_{name}_scale_inv"] = inverse
    return found


def quantize(x: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """Quantise into ``output``, or into a new tensor."""
    assert noop is None
    if isinstance(quantizer, Float8BlockQuantizer):
        return _store(_blocks(x, quantizer), per_block(x, quantizer), output)
    assert isinstance(quantizer, Float8Quantizer | Float8CurrentScalingQuantizer), quantizer
    return _store(_whole(x, quantizer), per_tensor(x, quantizer), output)


def _store(make: Callable[..., Any], found: dict[str, Any], output: Any) -> Any:
    if output is None:
        return make(found)
    for name, values in found.items():
        kept = getattr(output, name)
        if kept is None or values is None:
            setattr(output, name, values)
        else:
            kept.copy_(values)
    if hasattr(output, "_transpose_invalid"):
        output._transpose_invalid = output._transpose is None
    return output


def _whole(x: Tensor, quantizer: Any) -> Callable[..., Any]:
    def make(found: dict[str, Any]) -> Any:
        common: dict[str, Any] = {
            "data": found["_data"], "data_transpose": found["_transpose"],
            "fp8_scale_inv": found["_scale_inv"], "fp8_dtype": quantizer.dtype,
            "quantizer": quantizer,
        }  # fmt: skip
        if quantizer.internal:
            return Float8TensorStorage(fake_dtype=x.dtype, **common)
        return Float8Tensor(shape=x.shape, dtype=x.dtype, device=CPU, **common)

    return make


def _blocks(x: Tensor, quantizer: Any) -> Callable[..., Any]:
    def make(found: dict[str, Any]) -> Any:
        common = {name[1:]: values for name, values in found.items()}
        common |= {
            "fp8_dtype": quantizer.dtype, "quantizer": quantizer,
            "is_2D_scaled": quantizer.block_scaling_dim == 2,
        }  # fmt: skip
        if quantizer.internal:
            return Float8BlockwiseQTensorStorage(fake_dtype=x.dtype, **common)
        return Float8BlockwiseQTensor(shape=x.shape, dtype=x.dtype, device=CPU, **common)

    return make


def split_quantize(x: Tensor, rows: Any, quantizers: Any, **_: Any) -> list[Any]:
    """Quantise the rows of every expert by themselves."""
    return [quantize(part, own) for part, own in zip(x.split(list(rows)), quantizers, strict=True)]


def create_empty_quantized_tensor(
    quantizer: Any, shape: Any, dtype: torch.dtype, device: Any, pinned: bool
) -> Any:
    """Return a tensor to be filled, by a message of other ranks."""
    return quantize(torch.zeros(shape, dtype=dtype, device=device), quantizer)


def dequantize(x: Any, dtype: Any) -> Tensor:
    """Return what the bytes stand for."""
    return values(x, True).to(torch_dtype(dtype))


def fp8_transpose(data: Tensor, dtype: Any, *, out: Tensor | None = None) -> Tensor:
    """Copy bytes, last dimension first."""
    return first_last(data) if out is None else out.copy_(first_last(data))


def update_scales(
    amax: Tensor, histories: list[Tensor], scales: list[Tensor], how: str, dtype: Any, margin: int
) -> None:
    """``fused_amax_and_scale_update_after_reduction``: the end of a pass of delayed scaling."""
    done, largest = 0, LARGEST[torch_dtype(dtype)]
    for history, scale in zip(histories, scales, strict=True):
        history[0].copy_(amax[done : done + history.size(1)])
        done += history.size(1)
        chosen = history.amax(0) if how == "max" else history[0].clone()
        history.copy_(history.roll(-1, 0))
        history[0].zero_()
        new = largest / chosen / 2**margin
        scale.copy_(torch.where((chosen > 0) & chosen.isfinite(), new, scale))


# Products.


def values(x: Any, rowwise: bool) -> Tensor:
    """Return a matrix of a product in float32, from the copy that Hopper's tensor cores take."""
    if isinstance(x, Float8BlockwiseQTensorStorage):
        own = {f"{name}_{what}": None for name in ("rowwise", "columnwise") for what in _PARTS}
        used = "rowwise" if rowwise else "columnwise"
        for what in _PARTS:
            own[f"{used}_{what}"] = getattr(x, f"_{used}_{what}")
        alone = Float8BlockwiseQTensorStorage(
            **own, fp8_dtype=x._fp8_dtype, quantizer=None, is_2D_scaled=x._is_2D_scaled
        )
        return alone.dequantize(dtype=torch.float32)
    if isinstance(x, Float8TensorStorage):
        data = x._data if rowwise else x._transpose
        assert data is not None, "the copy that this product takes was not made"
        assert rowwise or not x._transpose_invalid
        found = data.view(torch_dtype(x._fp8_dtype)).float() * x._scale_inv
        return found if rowwise else found.movedim(0, -1)
    return x.detach().float()


_PARTS = ("data", "scale_inv")


def multiply(a: Any, a_turned: bool, b: Any, b_turned: bool) -> Tensor:
    """Return op(B) op(A) as cuBLAS takes them; FP8 wants whole groups of 16."""
    x, y = values(b, not b_turned), values(a, a_turned)
    x, y = x.reshape(-1, x.size(-1)), y.reshape(-1, y.size(-1))
    x, y = (x.T if b_turned else x), (y.T if a_turned else y)
    if not isinstance(a, Tensor) or isinstance(a, Float8Tensor | Float8BlockwiseQTensor):
        assert x.size(1) % 16 == 0 and y.size(1) % 16 == 0, (x.shape, y.shape)
    return x @ y


def put(found: Tensor, out: Tensor, accumulate: bool) -> Tensor:
    """Write a product, or add it to what is there."""
    found = found.view(out.shape)
    return out.copy_(out.float() + found if accumulate else found)


def generic_gemm(
    a: Any, a_turned: bool, b: Any, b_turned: bool, out: Any, quantizer: Any, dtype: Any,
    bias: Any, bias_dtype: Any, gelu: bool, gelu_in: Any, grad: bool, workspace: Any, size: int,
    accumulate: bool, split: bool, *, comm_overlap: Any, comm_type: Any, extra_output: Any,
    bulk_overlap: bool, alpha: float, beta: float,
) -> tuple[Any, None, None, None]:  # fmt: skip
    """One product."""
    assert bias is None and not gelu and comm_overlap is None and alpha == 1.0
    assert beta == float(accumulate)
    found = multiply(a, a_turned, b, b_turned)
    if out is not None:
        return put(found, out, accumulate), None, None, None
    lead = b.size()[:-1] if not b_turned else found.shape[:1]
    found = found.view(*lead, found.size(-1)).to(torch_dtype(dtype) if dtype else _high(b))
    return (found if quantizer is None else quantize(found, quantizer)), None, None, None


def _high(x: Any) -> torch.dtype:
    return x.dtype if isinstance(x, Tensor) else x._dtype


def te_general_grouped_gemm(
    a: list[Any], a_turned: bool, b: list[Any], b_turned: bool, out: list[Tensor], dtype: Any,
    rows: list[int], bias: Any, bias_dtype: Any, single_output: bool, gelu_in: Any, grad: bool,
    workspaces: Any, size: int, accumulate: bool, split: bool, processors: int,
) -> Any:  # fmt: skip
    """One product for every expert."""
    parts = out[0].split(list(rows)) if single_output else out
    for x, y, part in zip(a, b, parts, strict=True):
        if x.size()[0] and y.size()[0]:
            put(multiply(x, a_turned, y, b_turned), part, accumulate)
        elif not accumulate:
            part.zero_()
    return bias


# The rest of a layer.


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, dtype: Any, margin: int,
    zero_centered: bool,
) -> tuple[Any, None, Tensor]:  # fmt: skip
    """Normalise the last dimension."""
    assert not zero_centered and out is None
    inverse = (x.float().square().mean(-1) + eps).rsqrt()
    y = (x.float() * inverse[:, None] * weight.float()).to(torch_dtype(dtype))
    return (y if quantizer is None else quantize(y, quantizer)), None, inverse


def rmsnorm_bwd(
    dy: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """Return gradients of ``x`` and of the weight."""
    normed, scaled = x.float() * inverse[:, None], dy.float() * weight.float()
    along = (scaled * normed).mean(-1, keepdim=True)
    dx = (scaled - normed * along) * inverse[:, None]
    return dx.to(x.dtype), (dy.float() * normed).sum(0).to(weight.dtype)


def _rotated(x: Tensor, freqs: Tensor, sign: float) -> Tensor:
    width = freqs.size(-1)
    turned, kept = x[..., :width].float(), x[..., width:]
    one, two = turned.chunk(2, -1)
    turned = turned * freqs.cos() + sign * torch.cat((-two, one), -1) * freqs.sin()
    return torch.cat((turned.to(x.dtype), kept), -1)


def fused_rope_forward(
    x: Tensor, freqs: Tensor, starts: Any, layout: Any, interleaved: bool, lengths: Any,
    cp_size: int, cp_rank: int,
) -> Tensor:  # fmt: skip
    """Rotate slots x batch x heads x width."""
    assert not interleaved and starts is lengths is None and cp_size == 1
    return _rotated(x, freqs, 1.0)


def fused_rope_backward(dx: Tensor, freqs: Tensor, *how: Any) -> Tensor:
    """Rotate back."""
    return _rotated(dx, freqs, -1.0)


def get_fused_attn_backend(params: Any) -> tuple[Any, str]:
    """CuDNN has a kernel for bf16; FP8 on Hopper without a window, where scales are of earlier
    steps, and heads of 128."""
    backends = tex.NVTE_Fused_Attn_Backend
    if params.qkv_dtype in (DType.kFloat16, DType.kBFloat16):
        return backends.NVTE_F16_arbitrary_seqlen, ""
    if torch_dtype(params.qkv_dtype) in LARGEST and params.window_size_left < 0:
        return backends.NVTE_FP8, ""
    return backends.NVTE_No_Backend, "not of bf16"


def _scores(q: Any, k: Any, scale: float, mask: Any, window: Any, bottom_right: bool) -> Tensor:
    """Return scores [batch, heads, queries, keys], minus infinity where a query may not look."""
    q, k = values(q, True), values(k, True)
    k = k.repeat_interleave(q.size(2) // k.size(2), 2)
    scores = torch.einsum("sbhd,tbhd->bhst", q, k) * scale
    queries, keys = torch.arange(q.size(0)), torch.arange(k.size(0))
    distance = queries[:, None] - keys + (k.size(0) - q.size(0)) * bottom_right
    left, right = window
    kinds = tex.NVTE_Mask_Type
    if mask != kinds.NVTE_NO_MASK:
        assert mask in (kinds.NVTE_CAUSAL_MASK, kinds.NVTE_CAUSAL_BOTTOM_RIGHT_MASK), mask
        right = 0
    hidden = (distance > left) * (left >= 0) | (distance < -right) * (right >= 0)
    return scores.masked_fill(hidden.to(scores.device), -math.inf)


def fused_attn_fwd(
    slots_q: int, slots_k: int, training: bool, scale: float, dropout: float, zero_fill: bool,
    layout: Any, o_format: Any, scale_format: Any, bias_type: Any, mask: Any, softmax: Any,
    window: Any, bottom_right: bool, lengths_q: Any, lengths_k: Any, q: Any, k: Any, v: Any,
    dtype: torch.dtype, padded_q: Any, padded_k: Any, pages_k: Any, pages_v: Any,
    s_quantizer: Any, o_quantizer: Any, bias: Any, offset: Any, generator: Any, per_thread: int,
    max_logit: bool, graph: bool,
) -> list[Any]:  # fmt: skip
    """Attend; return also the logarithms of the sums, [batch, heads, slots, 1]."""
    assert dropout == 0.0 and bias is None
    assert layout == tex.NVTE_QKV_Layout.NVTE_SBHD_SBHD_SBHD, layout
    assert (q.size(0), k.size(0)) == (slots_q, slots_k)
    scores = _scores(q, k, scale, mask, window, bottom_right)
    v = values(v, True).repeat_interleave(q.size(2) // v.size(2), 2)
    out = torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1), v).to(dtype).contiguous()
    sums = scores.logsumexp(-1, keepdim=True)
    return [out if o_quantizer is None else quantize(out, o_quantizer), sums, sums.new_zeros(2)]


def fused_attn_bwd(
    slots_q: int, slots_k: int, scale: float, dropout: float, zero_fill: bool, layout: Any,
    o_format: Any, do_format: Any, dqkv_layout: Any, scale_format: Any, do_scale_format: Any,
    bias_type: Any, mask: Any, softmax: Any, window: Any, bottom_right: bool,
    deterministic: bool, lengths_q: Any, lengths_k: Any, q: Any, k: Any, v: Any, o: Any, do: Any,
    dtype: torch.dtype, saved: Any, padded_q: Any, padded_k: Any, s_quantizer: Any,
    dp_quantizer: Any, dqkv_quantizer: Any, graph: bool,
) -> list[Any]:  # fmt: skip
    """Return gradients of queries, keys and values, from the sums and the output that are given:
    those over all keys, of which a rank of context parallelism may see a part here.
    """
    shares = (_scores(q, k, scale, mask, window, bottom_right) - saved[0]).exp()
    q, k, v, o, do = (values(x, True) for x in (q, k, v, o, do))
    group, do, o = q.size(2) // k.size(2), do.reshape(q.shape), o.reshape(q.shape)
    dv = torch.einsum("bhst,sbhd->tbhd", shares, do)
    dshares = torch.einsum("sbhd,tbhd->bhst", do, v.repeat_interleave(group, 2))
    dscores = shares * (dshares - (do * o).sum(-1).permute(1, 2, 0)[..., None]) * scale
    dq = torch.einsum("bhst,tbhd->sbhd", dscores, k.repeat_interleave(group, 2))
    dk = torch.einsum("bhst,sbhd->tbhd", dscores, q)
    dk, dv = (x.unflatten(2, (-1, group)).sum(3) for x in (dk, dv))
    found = [x.to(dtype).contiguous() for x in (dq, dk, dv)]
    if dqkv_quantizer is not None:
        found = [quantize(x, dqkv_quantizer) for x in found]
    return [*found, None, None]


# The optimizer, on lists of tensors.


def multi_tensor_l2norm(size: int, overflow: Tensor, tensors: Any, each: bool) -> Any:
    """Return the norm of all, and those of each."""
    norms = torch.stack([x.float().norm() for x in tensors[0]])
    return norms.norm().view(1), (norms if each else norms.new_zeros(1))


def multi_tensor_scale(size: int, overflow: Tensor, tensors: Any, scale: Any) -> None:
    """Write ``scale`` times the first tensors to the second."""
    for x, out in zip(*tensors, strict=True):
        out.copy_(x.float() * scale)


multi_tensor_scale_tensor = multi_tensor_scale


def multi_tensor_adam(
    size: int, overflow: Tensor, tensors: Any, lr: float, beta1: float, beta2: float, eps: float,
    step: int, mode: int, bias_correction: int, decay: float,
) -> None:  # fmt: skip
    """AdamW (``mode`` 1) in place."""
    assert mode == 1
    one = 1 - beta1**step if bias_correction else 1.0
    two = 1 - beta2**step if bias_correction else 1.0
    for g, p, m, v in zip(*tensors, strict=True):
        m.lerp_(g.float(), 1 - beta1)
        v.mul_(beta2).addcmul_(g.float(), g.float(), value=1 - beta2)
        update = (m / one) / ((v / two).sqrt() + eps) + decay * p
        p.add_(update, alpha=-lr)
