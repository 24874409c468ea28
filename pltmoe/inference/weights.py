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

import json
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pltmoe.config import ModelConfig
from pltmoe.errors import ConversionError
from pltmoe.hf.fields import from_hf_fields
from pltmoe.hf.mapping import Row, check_names, rows, without_tied_head
from pltmoe.hf.shards import INDEX
from pltmoe.inference.experts import FP8, quantize

SINGLE_FILE = "model.safetensors"
QUANTIZED_TOGETHER = 8
"""Experts: their float32 copies must fit beside a model that fills the device."""


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


def describe_folder(folder: Path) -> Description:
    """Read ``config.json`` (and ``generation_config.json``) of an exported folder.

    Raises:
        ConversionError: no such folder, or a model that this engine does not know.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ConversionError(
            f"{folder} holds no exported model (no config.json): run tools/convert_to_hf.py"
        )
    given = _read_json(path)
    generation = folder / "generation_config.json"
    stop = (_read_json(generation) if generation.is_file() else {}).get("eos_token_id")
    stop = given.get("eos_token_id") if stop is None else stop
    return Description(
        model=from_hf_fields(given, str(path)),
        max_slots=int(given.get("max_position_embeddings") or 4096),
        stop_ids=() if stop is None else (stop,) if isinstance(stop, int) else tuple(stop),
        dtype=_dtype(given.get("dtype") or given.get("torch_dtype") or "float32", path),
    )


def load_weights(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Weights:
    """Load an exported folder (``plt_moe``, ``qwen3_moe`` or ``qwen3``).

    Args:
        folder: config.json and safetensors of tools/convert_to_hf.py.
        device: where to put the weights.
        dtype: precision to compute in; default: as stored.

    Raises:
        ConversionError: not such a folder, or tensors that do not fit its config.json.
    """
    about = describe_folder(folder)
    file_of = _file_of_tensor(folder)
    names = without_tied_head(file_of, about.model)
    check_names(str(folder), names, [name for row in rows(about.model) for name in row.hf])
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        try:
            for file in sorted({file_of[name] for name in names}):
                files[file] = stack.enter_context(safe_open(folder / file, framework="pt"))
            return pack(
                about.model,
                lambda name: files[file_of[name]].get_tensor(name),
                torch.device(device),
                dtype or about.dtype,
            )
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{folder}: the weights cannot be read: {error}") from None


def weights_of(
    model: ModelConfig,
    name_to_tensor: Mapping[str, Tensor],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Weights:
    """Pack a state dict with Hugging Face (or reference) names."""
    dtype = dtype or name_to_tensor["model.embed_tokens.weight"].dtype
    return pack(model, name_to_tensor.__getitem__, torch.device(device), dtype)


def random_weights(
    model: ModelConfig,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Weights:
    """Make random weights on the device, for measuring: nothing is read or copied."""
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    weights = _allocate(model, device, dtype)
    top = [weights.embedding_vd, weights.norm_d]
    top += [] if model.tied_embeddings else [weights.head_vd]
    tensors = [*top, *(t for layer in weights.layers for t in vars(layer).values())]
    for tensor in tensors:
        if tensor is not None and tensor.dim() == 1:
            tensor.fill_(1.0)
        elif tensor is not None:
            tensor.normal_(0.0, model.init_std, generator=generator)
    for layer in weights.layers:
        for bias in (layer.gate_bias_h, layer.router_bias_e):
            if bias is not None:
                bias.zero_()
    return weights


def quantize_experts(weights: Weights) -> None:
    """Turn the experts, nearly all weights of a large model, into FP8 (e4m3, a factor per row).

    In place, a few experts at a time: never more than one layer's experts are there twice. Other
    matrices and all activations stay as they are.
    """
    for layer in weights.layers:
        for name, scale_name in (
            ("gate_up_efd", "gate_up_scale_ef"),
            ("down_edf", "down_scale_ed"),
        ):
            wide = getattr(layer, name)
            packed = torch.empty_like(wide, dtype=FP8)
            scale = torch.empty(wide.shape[:2], dtype=torch.float32, device=wide.device)
            for some in torch.arange(wide.size(0)).split(QUANTIZED_TOGETHER):
                part = slice(int(some[0]), int(some[-1]) + 1)
                packed[part], scale[part] = quantize(wide[part])
            setattr(layer, name, packed)
            setattr(layer, scale_name, scale)


def pack(
    model: ModelConfig, read: Callable[[str], Tensor], device: torch.device, dtype: torch.dtype
) -> Weights:
    """Fill packed tensors from ``read(name)``, which returns one Hugging Face tensor.

    Raises:
        ConversionError: a tensor's shape is not what the model section says.
    """
    weights = _allocate(model, device, dtype)
    for row in rows(model):
        target = getattr(weights if row.layer is None else weights.layers[row.layer], _field(row))
        target = target if row.expert is None else target[row.expert]
        start = 0
        for name, shape in zip(row.hf, row.shapes, strict=True):
            part = read(name)
            if tuple(part.shape) != shape:
                raise ConversionError(
                    f"{name} has shape {list(part.shape)}, but the model configuration says "
                    f"{list(shape)}"
                )
            target.narrow(0, start, shape[0]).copy_(part)
            start += shape[0]
    return weights


def _allocate(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> Weights:
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
        kept_wide = row.float32 or name == "router_ed"
        where[name] = torch.empty(shape, device=device, dtype=wide if kept_wide else dtype)
    top.setdefault("head_vd", top["embedding_vd"])
    return Weights(model=model, layers=[LayerWeights(**layer) for layer in layers], **top)


def _field(row: Row) -> str:
    name = re.sub(r"^layers\.\d+\.", "", row.megatron)
    return _FIELDS[re.sub(r"local_experts\.\d+", "local_experts", name)]


def _file_of_tensor(folder: Path) -> dict[str, str]:
    """Return tensor name -> file name."""
    if (folder / INDEX).is_file():
        file_of = _read_json(folder / INDEX)["weight_map"]
        if missing := sorted({f for f in file_of.values() if not (folder / f).is_file()}):
            raise ConversionError(f"{folder}: a file of the index is missing: {missing[0]}")
        return file_of
    if not (folder / SINGLE_FILE).is_file():
        raise ConversionError(f"{folder} holds no weights: neither {INDEX} nor {SINGLE_FILE}")
    try:
        with safe_open(folder / SINGLE_FILE, framework="pt") as file:
            return dict.fromkeys(file.keys(), SINGLE_FILE)
    except SafetensorError as error:
        raise ConversionError(f"{folder}: the weights cannot be read: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path} is not JSON: {error}") from None


def _dtype(name: str, path: Path) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConversionError(f"{path}: dtype {name!r} is not a floating point type of torch")
    return dtype
