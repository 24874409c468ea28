"""LoopCoder-v2 (arXiv 2606.18023) -> our Hugging Face format, tensor by tensor.

Its public weights are dense PLT models, but come without code that runs them. Names are those of
Llama, as ours, and one gate per layer:

    model.layers.N.self_attn.plt_gate.weight [h, d or k], .bias [h], .gate_norm.weight [d]

    their g weighs the global branch:   y = g global + (1 - g) local
    ours weighs the local one, and      1 - sigmoid(x) = sigmoid(-x)

so weight and bias change their sign; nothing else does. The gate reads the residual stream through
a norm of its own (``plt_gate_use_hidden_states``), or the query after RoPE. The window [64, 0] is
65 keys in both. Between loops: final norm, scales, shift, as in the paper.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from pltmoe.errors import ConversionError
from pltmoe.hf.configuration_plt_moe import PLTMoEConfig
from pltmoe.hf.convert import copy_model_code, whole_folder
from pltmoe.hf.fields import ARCHITECTURES, AUTO_MAP
from pltmoe.hf.folder_tensors import FolderTensors
from pltmoe.hf.mapping import check_names
from pltmoe.hf.modeling_plt_moe import PLTMoEForCausalLM
from pltmoe.hf.shards import ShardWriter, num_bytes

log = logging.getLogger(__name__)

ARCHITECTURE = "IQuestPLTCoderForCausalLM"
WITHOUT_SHIFT = "IQuestLoopCoderForCausalLM"
"""IQuest-Coder-V1-Loop: the whole stack again over its own output, no shift, no embedding."""

_SAME = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "rms_norm_eps", "max_position_embeddings", "plt_num_loops",
    "plt_window_size", "plt_normalize_per_loop", "plt_gate_use_hidden_states",
)  # fmt: skip
_OPTIONAL = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_SCALES = ("plt_emb_scale", "plt_hidden_scale")
"""May be null, which is 1; not to be there would be another layout."""
_REFUSED = ("attention_bias", "mlp_bias", "rope_scaling")
_NOT_COPIED = {"config.json", "README.md"}
_NOT_COPIED_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}


def is_loopcoder(folder: Path) -> bool:
    """Return whether ``folder`` holds a model of this family, one that is refused included.

    Raises:
        ConversionError: no readable config.json.
    """
    names = _fields(folder).get("architectures") or []
    return bool({ARCHITECTURE, WITHOUT_SHIFT} & set(names))


def convert_loopcoder(
    folder: Path, output: Path, max_shard_bytes: int = 5 * 10**9, progress: bool = True
) -> PLTMoEConfig:
    """Write the model of ``folder`` as a folder that transformers runs in one pass per token.

    Args:
        folder: ``config.json``, safetensors files, tokenizer; only read.
        output: must not exist, or be empty.
        max_shard_bytes: largest safetensors file, and about the memory that is needed.
        progress: show a progress bar.

    Raises:
        ConversionError: another model, an option or a tensor that ours does not have; nothing is
            left behind.
    """
    fields = _fields(folder)
    with ExitStack() as stack:
        tensors = FolderTensors(folder, stack)
        names = [name for name in tensors.names() if not name.endswith("rotary_emb.inv_freq")]
        config = loopcoder_config(fields, names, str(folder / "config.json"))
        shapes = _shapes(config)
        if config.tie_word_embeddings:
            names = [name for name in names if name != "lm_head.weight"]
        check_names(f"{folder}: Hugging Face", names, list(shapes))
        _check_shapes(folder, tensors, shapes)
        with whole_folder(output) as writing:
            _write_weights(writing, tensors, shapes, max_shard_bytes, progress)
            _write_rest(folder, writing, config, fields)
    return config


def loopcoder_config(
    fields: Mapping[str, Any], names: list[str], where: str = "config.json"
) -> PLTMoEConfig:
    """Return our configuration for a LoopCoder-v2 ``config.json`` and its tensors' names.

    Raises:
        ConversionError: see convert_loopcoder.
    """
    _refuse(fields, where)
    if missing := [name for name in (*_SAME, *_SCALES) if name not in fields]:
        raise ConversionError(f"{where}: field missing: {missing[0]}")
    tree = {name: fields[name] for name in _SAME}
    tree |= {name: fields.get(name, default) for name, default in _OPTIONAL.items()}
    heads = fields["num_attention_heads"]
    tree["head_dim"] = fields.get("head_dim") or fields["hidden_size"] // heads
    rope = fields.get("rope_parameters") or {}
    theta = rope.get("rope_theta", fields.get("rope_theta"))
    if theta is None or rope.get("rope_type", "default") != "default":
        raise ConversionError(f"{where}: rope_theta must be given, and the default kind of RoPE")
    tree["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    tree |= {name: 1.0 if fields[name] is None else fields[name] for name in _SCALES}
    tree |= {"num_experts": 0, "moe_intermediate_size": None}
    tree["plt_gate_norm"] = bool(tree["plt_gate_use_hidden_states"])
    tree["use_qk_norm"] = any(name.endswith("self_attn.q_norm.weight") for name in names)
    try:
        return PLTMoEConfig(**tree)
    except ValueError as error:
        raise ConversionError(f"{where}: {error}") from None


def _refuse(fields: Mapping[str, Any], where: str) -> None:
    architectures = fields.get("architectures") or []
    if WITHOUT_SHIFT in architectures:
        raise ConversionError(
            f"{where}: {WITHOUT_SHIFT} (IQuest-Coder-V1-Loop) runs its loops without the "
            "cross-loop shift and without adding the embedding again; it is no PLT and cannot be "
            "converted"
        )
    if ARCHITECTURE not in architectures:
        raise ConversionError(
            f"{where}: architectures is {architectures}; only {ARCHITECTURE} has this layout"
        )
    for name in _REFUSED:
        if fields.get(name):
            raise ConversionError(f"{where}: {name} is {fields[name]!r}; our model has none")


def _fields(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: cannot be read ({error})") from None


def _shapes(config: PLTMoEConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor; their names are ours."""
    with torch.device("meta"):
        model = PLTMoEForCausalLM(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def _check_shapes(
    folder: Path, tensors: FolderTensors, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    for name, shape in shapes.items():
        if (found := tensors.shape(name)) != shape:
            raise ConversionError(
                f"{folder}: {name} has shape {list(found)}, but config.json says {list(shape)}"
            )


def _write_weights(
    folder: Path,
    tensors: FolderTensors,
    shapes: Mapping[str, tuple[int, ...]],
    max_shard_bytes: int,
    progress: bool,
) -> None:
    dtype = tensors.tensor("model.norm.weight").dtype
    sizes = [(name, num_bytes(shape, dtype)) for name, shape in shapes.items()]
    writer = ShardWriter(folder, sizes, max_shard_bytes)
    for name in tqdm(shapes, desc="weights", disable=not progress):
        tensor = tensors.tensor(name)
        if name.endswith((".plt_gate.weight", ".plt_gate.bias")):
            tensor = -tensor  # their gate weighs the other branch
        writer.add(name, tensor)
    writer.finish()


def _write_rest(
    source: Path, folder: Path, config: PLTMoEConfig, fields: Mapping[str, Any]
) -> None:
    """Write the configuration and our code; copy the tokenizer and whatever else is no weight."""
    tree = config.to_dict() | {"architectures": [ARCHITECTURES["plt_moe"]], "auto_map": AUTO_MAP}
    tree["dtype"] = fields.get("dtype") or fields.get("torch_dtype")
    tree["transformers_version"] = transformers.__version__
    (folder / "config.json").write_text(json.dumps(tree, indent=2) + "\n")
    for path in sorted(source.iterdir()):
        code = path.suffix == ".py" and not path.name.startswith("tokenization")
        weights = path.suffix in _NOT_COPIED_SUFFIXES or path.name.endswith(".index.json")
        if path.is_file() and path.name not in _NOT_COPIED and not code and not weights:
            shutil.copyfile(path, folder / path.name)
    copy_model_code(folder)
    (folder / "README.md").write_text(
        f"Converted from {fields.get('_name_or_path') or source.name} ({ARCHITECTURE}) to "
        "`plt_moe`: the same weights with the gate's sign changed, run in one pass per token.\n"
    )
