"""Packed weights on one device: loaded from an exported folder, or random (nothing is read).

What a decode step multiplies with lies together: Q, K and V of a layer in one matrix, gate and up
projection in one, and all experts of a layer stacked. Every tensor is made once, on the device, in
its final dtype; loading copies file after file into it, so that a model needs its own size and the
size of one tensor.

Names and shapes come from the name table in hf/mapping.py; a packed tensor is the table's Megatron
tensor, except that Q, K and V follow each other whole (Megatron interleaves them per KV group).

Letters: v vocabulary, d hidden, o = Q, K and V rows together, q = query heads * head size, k head
size, h query heads, f feed-forward width, e experts, x input of the gate.
"""

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pltmoe.config import ModelConfig
from pltmoe.errors import ConversionError
from pltmoe.hf.fields import from_hf_fields
from pltmoe.hf.folder_tensors import FolderTensors, read_json
from pltmoe.hf.mapping import Row, check_names, rows
from pltmoe.inference.experts import FP8, quantize

SCALES = {"gate_up_efd": "gate_up_scale_ef", "down_edf": "down_scale_ed"}
"""Experts, nearly all weights of a large model, may be kept in FP8 (e4m3) with a factor per row."""


@dataclass
class LayerWeights:
    """One layer; what the model does not have is None."""

    input_norm_d: Tensor
    qkv_od: Tensor
    o_dq: Tensor
    post_norm_d: Tensor
    q_norm_k: Tensor | None = None
    k_norm_k: Tensor | None = None
    gate_weight_hx: Tensor | None = None
    gate_bias_h: Tensor | None = None
    gate_up_fd: Tensor | None = None
    """Dense: gate rows, then up rows [2f, d]."""
    down_df: Tensor | None = None
    router_ed: Tensor | None = None
    """In at least float32, as in training: bf16 logits would choose other experts."""
    router_bias_e: Tensor | None = None
    gate_up_efd: Tensor | None = None
    """Experts: gate rows, then up rows [e, 2f, d]."""
    down_edf: Tensor | None = None
    gate_up_scale_ef: Tensor | None = None
    """Experts in FP8: factor of each row [e, 2f], float32."""
    down_scale_ed: Tensor | None = None


@dataclass
class Weights:
    """A whole model. ``head_vd`` of a tied model is the embedding itself."""

    model: ModelConfig
    embedding_vd: Tensor
    norm_d: Tensor
    head_vd: Tensor
    layers: list[LayerWeights] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the computation."""
        return self.embedding_vd.dtype

    @property
    def device(self) -> torch.device:
        """Where all tensors lie."""
        return self.embedding_vd.device

    def num_bytes(self) -> int:
        """Return the bytes of all tensors, a tied head once."""
        top = {id(x): x for x in (self.embedding_vd, self.norm_d, self.head_vd)}
        tensors = list(top.values())
        for layer in self.layers:
            tensors += [x for f in fields(layer) if (x := getattr(layer, f.name)) is not None]
        return sum(x.numel() * x.element_size() for x in tensors)


@dataclass(frozen=True)
class Description:
    """What an exported folder says about itself."""

    model: ModelConfig
    max_slots: int
    """Slots it was trained with (max_position_embeddings)."""
    stop_ids: tuple[int, ...]
    """Tokens that end a text."""
    dtype: torch.dtype
    """As stored."""


_FIELDS = {
    "embedding.word_embeddings.weight": "embedding_vd",
    "final_norm.weight": "norm_d",
    "output_layer.weight": "head_vd",
    "input_layernorm.weight": "input_norm_d",
    "self_attention.linear_qkv.weight": "qkv_od",
    "self_attention.linear_proj.weight": "o_dq",
    "self_attention.q_layernorm.weight": "q_norm_k",
    "self_attention.k_layernorm.weight": "k_norm_k",
    "self_attention.plt_gate.weight": "gate_weight_hx",
    "self_attention.plt_gate.bias": "gate_bias_h",
    "pre_mlp_layernorm.weight": "post_norm_d",
    "mlp.linear_fc1.weight": "gate_up_fd",
    "mlp.linear_fc2.weight": "down_df",
    "mlp.router.weight": "router_ed",
    "mlp.router.expert_bias": "router_bias_e",
    "mlp.experts.local_experts.linear_fc1.weight": "gate_up_efd",
    "mlp.experts.local_experts.linear_fc2.weight": "down_edf",
}
"""Tensor of the name table -> field here."""


def read_fields(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` of an exported folder.

    Raises:
        ConversionError: no such folder.
    """
    if folder.is_file():
        raise ConversionError(f"{folder} is a file: name the exported folder that holds it")
    path = folder / "config.json"
    if not path.is_file():
        raise ConversionError(
            f"{folder} holds no exported model (no config.json): run tools/convert_to_hf.py"
        )
    return read_json(path)


def describe_folder(folder: Path) -> Description:
    """Read ``config.json`` (and ``generation_config.json``) of an exported folder.

    Raises:
        ConversionError: no such folder, or a model that this engine does not know.
    """
    path, given = folder / "config.json", read_fields(folder)
    if given.get("plt_gate_norm"):
        raise ConversionError(
            f"{path}: the gate has a norm of its own (LoopCoder-v2), which this engine does not "
            "have; transformers runs the folder (tools/generate.py --engine transformers)"
        )
    generation = folder / "generation_config.json"
    stop = (read_json(generation) if generation.is_file() else {}).get("eos_token_id")
    stop = given.get("eos_token_id") if stop is None else stop
    return Description(
        model=from_hf_fields(given, str(path)),
        max_slots=int(given.get("max_position_embeddings") or 4096),
        stop_ids=() if stop is None else (stop,) if isinstance(stop, int) else tuple(stop),
        dtype=_dtype(given.get("dtype") or given.get("torch_dtype") or "float32", path),
    )


def load_weights(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    fp8: bool = False,
) -> Weights:
    """Load an exported folder (``plt_moe``, ``qwen3_moe`` or ``qwen3``).

    Args:
        folder: config.json and safetensors of tools/convert_to_hf.py.
        device: where to put the weights.
        dtype: precision to compute in; default: as stored.
        fp8: keep the experts in FP8; they are never there in ``dtype``.

    Raises:
        ConversionError: not such a folder, or tensors that do not fit its config.json.
    """
    about = describe_folder(folder)
    with ExitStack() as stack:
        tensors = FolderTensors(folder, stack)
        names = tensors.names(tied_head=about.model.tied_embeddings)
        check_names(str(folder), names, [name for row in rows(about.model) for name in row.hf])
        return pack(about.model, tensors.tensor, torch.device(device), dtype or about.dtype, fp8)


def random_weights(
    model: ModelConfig,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    fp8: bool = False,
) -> Weights:
    """Make random weights on the device, for measuring: nothing is read or copied."""
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    weights = _allocate(model, device, dtype, fp8)
    top = [weights.embedding_vd, weights.norm_d]
    top += [] if model.tied_embeddings else [weights.head_vd]
    tensors = [*top, *(t for layer in weights.layers for t in vars(layer).values())]
    for tensor in tensors:
        if tensor is None or tensor.dtype == FP8:
            continue
        if tensor.dim() == 1:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, model.init_std, generator=generator)
    for layer in weights.layers:
        for name, scale_name in SCALES.items() if fp8 else ():
            for expert, scale in zip(getattr(layer, name), getattr(layer, scale_name), strict=True):
                wide = torch.empty(expert.shape, dtype=dtype, device=device)
                wide.normal_(0.0, model.init_std, generator=generator)
                _quantize_into(expert, scale, wide)
        for bias in (layer.gate_bias_h, layer.router_bias_e):
            if bias is not None:
                bias.zero_()
    return weights


def pack(
    model: ModelConfig,
    read: Callable[[str], Tensor],
    device: torch.device,
    dtype: torch.dtype,
    fp8: bool = False,
) -> Weights:
    """Fill packed tensors from ``read(name)``, which returns one Hugging Face tensor.

    Raises:
        ConversionError: a tensor's shape is not what the model section says.
    """
    weights = _allocate(model, device, dtype, fp8)
    for row in rows(model):
        owner, name = weights if row.layer is None else weights.layers[row.layer], _field(row)
        target, scale, start = getattr(owner, name), None, 0
        if row.expert is not None:
            target = target[row.expert]
            scale = getattr(owner, SCALES[name])[row.expert] if fp8 else None
        for name, shape in zip(row.hf, row.shapes, strict=True):
            part = read(name)
            if tuple(part.shape) != shape:
                raise ConversionError(
                    f"{name} has shape {list(part.shape)}, but the model configuration says "
                    f"{list(shape)}"
                )
            into = target.narrow(0, start, shape[0])
            if scale is None:
                into.copy_(part)
            else:
                _quantize_into(into, scale.narrow(0, start, shape[0]), part.to(device, dtype))
            start += shape[0]
    return weights


def _quantize_into(fp8_oi: Tensor, scale_o: Tensor, wide_oi: Tensor) -> None:
    rounded_oi, factor_o = quantize(wide_oi)
    fp8_oi.copy_(rounded_oi)
    scale_o.copy_(factor_o)


def _allocate(model: ModelConfig, device: torch.device, dtype: torch.dtype, fp8: bool) -> Weights:
    """Make every tensor once, uninitialised."""
    top: dict[str, Tensor] = {}
    layers: list[dict[str, Tensor]] = [{} for _ in range(model.num_layers)]
    wide = torch.promote_types(dtype, torch.float32)
    for row in rows(model):
        where, name = (top if row.layer is None else layers[row.layer]), _field(row)
        if name in where:
            continue
        shape = row.megatron_shape
        if row.expert is not None:
            assert model.num_experts is not None
            shape = (model.num_experts, *shape)
        own = wide if row.float32 or name == "router_ed" else dtype
        if fp8 and name in SCALES:
            own = FP8
            where[SCALES[name]] = torch.empty(shape[:2], device=device, dtype=torch.float32)
        where[name] = torch.empty(shape, device=device, dtype=own)
    top.setdefault("head_vd", top["embedding_vd"])
    return Weights(model=model, layers=[LayerWeights(**layer) for layer in layers], **top)


def _field(row: Row) -> str:
    name = re.sub(r"^layers\.\d+\.", "", row.megatron)
    return _FIELDS[re.sub(r"local_experts\.\d+", "local_experts", name)]


def _dtype(name: str, path: Path) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConversionError(f"{path}: dtype {name!r} is not a floating point type of torch")
    return dtype
