"""The name table Megatron <-> Hugging Face, as data, and the pure functions that apply it.

Both sides hold the same numbers; three things differ: the names, Megatron's fused QKV matrix and
its fused gate|up matrix. Every row of the table is one Megatron tensor and the Hugging Face tensors
it is made of, so a model can be converted tensor by tensor, in either direction, weights and
gradients alike.

    Megatron linear_qkv (GQA: h query heads, g groups)     Hugging Face
    group 1:  q q .. q | k | v                             q_proj: q of group 1, q of group 2, ..
    group 2:  q q .. q | k | v                             k_proj: k of group 1, k of group 2, ..
    ..        (each letter: head_dim rows)                 v_proj: v of group 1, v of group 2, ..

Letters of shapes: v vocabulary, d hidden, q = query heads * head size, kv = KV heads * head size,
k head size, h query heads, f feed-forward width, e experts, x input of the gate.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from pltmoe.config.model import ModelConfig
from pltmoe.errors import ConversionError

Layout = Literal["same", "qkv", "gate_up"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """One line of the table; ``{layer}`` and ``{expert}`` stand for indices from 0."""

    megatron: str
    """Name in ``PLTModel.state_dict()``."""
    hf: tuple[str, ...]
    """Names in the Hugging Face model, in the order in which ``layout`` joins them."""
    shapes: tuple[str, ...]
    """Shape of each Hugging Face tensor, in the letters of this file."""
    layout: Layout = "same"
    """How the Hugging Face tensors lie in the Megatron tensor."""
    when: Callable[[ModelConfig], bool] = lambda m: True
    """Whether a model has this tensor."""
    float32: bool = False
    """Kept in float32 whatever the model's dtype is."""


def _has_expert_bias(m: ModelConfig) -> bool:
    return m.moe_expert_bias_update_rate > 0


_MEGATRON_LAYER, _HF_LAYER = "layers.{layer}.", "model.layers.{layer}."
_MEGATRON_EXPERT = _MEGATRON_LAYER + "mlp.experts.local_experts.{expert}."
_HF_EXPERT = _HF_LAYER + "mlp.experts.{expert}."


def _layer(megatron: str, hf: str, shape: str, **options: object) -> Rule:
    return Rule(_MEGATRON_LAYER + megatron, (_HF_LAYER + hf,), (shape,), **options)  # type: ignore[arg-type]


RULES: tuple[Rule, ...] = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ("v d",)),
    _layer("input_layernorm.weight", "input_layernorm.weight", "d"),
    Rule(
        _MEGATRON_LAYER + "self_attention.linear_qkv.weight",
        tuple(_HF_LAYER + f"self_attn.{name}_proj.weight" for name in "qkv"),
        ("q d", "kv d", "kv d"),
        "qkv",
    ),
    _layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "d q"),
    _layer(
        "self_attention.q_layernorm.weight",
        "self_attn.q_norm.weight",
        "k",
        when=lambda m: m.qk_norm,
    ),
    _layer(
        "self_attention.k_layernorm.weight",
        "self_attn.k_norm.weight",
        "k",
        when=lambda m: m.qk_norm,
    ),
    _layer(
        "self_attention.plt_gate.weight",
        "self_attn.plt_gate.weight",
        "h x",
        when=lambda m: m.gated_swa,
    ),
    _layer(
        "self_attention.plt_gate.bias", "self_attn.plt_gate.bias", "h", when=lambda m: m.gated_swa
    ),
    _layer("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "d"),
    Rule(
        _MEGATRON_LAYER + "mlp.linear_fc1.weight",
        (_HF_LAYER + "mlp.gate_proj.weight", _HF_LAYER + "mlp.up_proj.weight"),
        ("f d", "f d"),
        "gate_up",
        when=lambda m: not m.is_moe,
    ),
    _layer("mlp.linear_fc2.weight", "mlp.down_proj.weight", "d f", when=lambda m: not m.is_moe),
    _layer("mlp.router.weight", "mlp.gate.weight", "e d", when=lambda m: m.is_moe),
    _layer(
        "mlp.router.expert_bias",
        "mlp.gate.e_score_correction_bias",
        "e",
        when=_has_expert_bias,
        float32=True,
    ),
    Rule(
        _MEGATRON_EXPERT + "linear_fc1.weight",
        (_HF_EXPERT + "gate_proj.weight", _HF_EXPERT + "up_proj.weight"),
        ("f d", "f d"),
        "gate_up",
        when=lambda m: m.is_moe,
    ),
    Rule(
        _MEGATRON_EXPERT + "linear_fc2.weight",
        (_HF_EXPERT + "down_proj.weight",),
        ("d f",),
        when=lambda m: m.is_moe,
    ),
    Rule("final_norm.weight", ("model.norm.weight",), ("d",)),
    Rule(
        "output_layer.weight", ("lm_head.weight",), ("v d",), when=lambda m: not m.tied_embeddings
    ),
)


@dataclass(frozen=True)
class Row:
    """A rule with its indices filled in: one Megatron tensor of one model."""

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[Shape, ...]
    layout: Layout
    float32: bool
    layer: int | None
    expert: int | None
    groups: int

    @property
    def megatron_shape(self) -> Shape:
        """Shape of the Megatron tensor: the parts stacked along their first dimension."""
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Cut a Megatron tensor into its Hugging Face tensors.

        Raises:
            ConversionError: the shape is not what the model configuration implies.
        """
        _check_shape(self.megatron, tensor, self.megatron_shape)
        if self.layout == "qkv":
            parts = split_qkv(tensor, self.groups, self.shapes[1][0] // self.groups)
        elif self.layout == "gate_up":
            parts = tensor.chunk(2)
        else:
            parts = (tensor,)
        return dict(zip(self.hf, parts, strict=True))

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Put a Megatron tensor together from its Hugging Face tensors.

        Raises:
            ConversionError: a part is missing, or its shape is not what the configuration implies.
        """
        if missing := [name for name in self.hf if name not in parts]:
            raise ConversionError(f"Hugging Face tensor missing: {missing[0]}")
        tensors = [parts[name] for name in self.hf]
        for name, tensor, shape in zip(self.hf, tensors, self.shapes, strict=True):
            _check_shape(name, tensor, shape)
        if self.layout == "qkv":
            return join_qkv(*tensors, groups=self.groups)
        return torch.cat(tensors) if self.layout == "gate_up" else tensors[0]


def split_qkv(qkv: Tensor, groups: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut Megatron's QKV [(h + 2g) k, d] into Q [h k, d], K [g k, d] and V [g k, d]."""
    per_group = qkv.view(groups, -1, *qkv.shape[1:])
    sizes = [per_group.size(1) - 2 * head_dim, head_dim, head_dim]
    q, k, v = (part.flatten(0, 1) for part in per_group.split(sizes, dim=1))
    return q, k, v


def join_qkv(q: Tensor, k: Tensor, v: Tensor, groups: int) -> Tensor:
    """Interleave Q, K and V per KV group as Megatron keeps them; the inverse of split_qkv."""
    parts = [part.reshape(groups, -1, *part.shape[1:]) for part in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def rows(model: ModelConfig) -> Iterator[Row]:
    """Yield every tensor of the model once: embedding, layer after layer, final norm, head."""
    sizes = _sizes(model)
    for block in _blocks():
        in_layers = "{layer}" in block[0].megatron
        for layer in range(model.num_layers) if in_layers else [None]:
            for rule in block:
                if rule.when(model):
                    yield from _fill(rule, layer, model, sizes)


def check_names(
    side: str, given: Collection[str], known: Collection[str], partial: bool = False
) -> None:
    """Compare the tensors that are there with those of the table.

    Raises:
        ConversionError: unknown or (unless ``partial``) missing tensors; names the first ones.
    """
    known = set(known)
    if unknown := sorted(set(given) - known):
        raise ConversionError(
            f"{side} tensor unknown to the model configuration: {_some(unknown)}; "
            "does the configuration belong to these weights?"
        )
    if not partial and (missing := sorted(known - set(given))):
        raise ConversionError(f"{side} tensor missing: {_some(missing)}")


def _sizes(m: ModelConfig) -> dict[str, int]:
    return {
        "v": m.vocab_size,
        "d": m.hidden_size,
        "h": m.num_attention_heads,
        "k": m.head_dim,
        "q": m.num_attention_heads * m.head_dim,
        "kv": m.num_kv_heads * m.head_dim,
        "f": m.moe_ffn_hidden_size or m.ffn_hidden_size or 0,
        "e": m.num_experts or 0,
        "x": m.hidden_size if m.gate_use_hidden_states else m.head_dim,
    }


def _blocks() -> list[list[Rule]]:
    """Group neighbouring rules that repeat per layer, so that rows come layer after layer."""
    key = lambda rule: "{layer}" in rule.megatron  # noqa: E731
    return [list(block) for _, block in groupby(RULES, key)]


def _fill(rule: Rule, layer: int | None, m: ModelConfig, sizes: dict[str, int]) -> Iterator[Row]:
    shapes = tuple(tuple(sizes[letter] for letter in shape.split()) for shape in rule.shapes)
    experts = range(m.num_experts or 0) if "{expert}" in rule.megatron else [None]
    for expert in experts:
        index = {"layer": layer, "expert": expert}
        yield Row(
            megatron=rule.megatron.format(**index),
            hf=tuple(name.format(**index) for name in rule.hf),
            shapes=shapes,
            layout=rule.layout,
            float32=rule.float32,
            layer=layer,
            expert=expert,
            groups=m.num_kv_heads,
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _check_shape(name: str, tensor: Tensor, shape: Shape) -> None:
    if tuple(tensor.shape) != shape:
        raise ConversionError(
            f"{name} has shape {list(tensor.shape)}, but the model configuration says {list(shape)}"
        )
