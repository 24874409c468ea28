"""LoopCoder-v2 (arXiv 2606.18023) -> our Hugging Face format, tensor by tensor.

Its public weights are dense PLT models, but come without code that runs them. Names are those of
Llama, as ours, and one gate per layer:

    model.layers.N.self_attn.plt_gate.weight [h, d or k], .bias [h], .gate_norm.weight [d]

    their g weighs the global branch:   y = g global + (1 - g) local
    ours weighs the local one, and      1 - sigmoid(x) = sigmoid(-x)

so weight and bias change their sign; nothing else does. The gate reads the residual stream through
a norm of its own (``plt_gate_use_hidden_states``), or the query after RoPE. The window [64, 0] is
65 keys in both. Between loops: final norm, scales, shift.
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
from huggingface_hub.errors import StrictDataclassError
from tqdm import tqdm

from pltmoe.errors import ConversionError
from pltmoe.hf.configuration_plt_moe import PLTMoEConfig
from pltmoe.hf.convert import copy_model_code, whole_folder
from pltmoe.hf.fields import ARCHITECTURES, AUTO_MAP, from_hf_fields, rope_theta, to_hf_fields
from pltmoe.hf.folder_tensors import FolderTensors, read_json
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
_OPTIONAL = {"hidden_act": "silu", "initializer_range": 0.02, "tie_word_embeddings": False}
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SCALES = ("plt_emb_scale", "plt_hidden_scale")
"""May be null, which is 1; not to be there would be another layout."""
_REFUSED = ("attention_bias", "mlp_bias", "use_sliding_window", "layer_types")
_FLAGS = ("plt_cross_loop_shift", "plt_share_first_loop_kv", "plt_gated_swa")
_NOT_COPIED = {"config.json", "README.md"}
_NOT_COPIED_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}


def is_loopcoder(folder: Path) -> bool:
    """Return whether ``folder`` holds a model of this family, one that is refused included.

    Raises:
        ConversionError: no readable config.json.
    """
    names = read_json(folder / "config.json").get("architectures")
    return isinstance(names, list) and (ARCHITECTURE in names or WITHOUT_SHIFT in names)


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
    fields = read_json(folder / "config.json")
    with ExitStack() as stack:
        tensors = FolderTensors(folder, stack)
        names = tensors.names(tied_head=fields.get("tie_word_embeddings") is True)
        names = [name for name in names if not name.endswith("rotary_emb.inv_freq")]
        config = loopcoder_config(fields, names, str(folder / "config.json"))
        shapes = _shapes(config)
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
    tree["head_dim"] = fields.get("head_dim") or _head_dim(fields, where)
    tree["rope_theta"] = rope_theta(fields, where)
    tree |= {name: 1.0 if fields[name] is None else fields[name] for name in _SCALES}
    tree["use_qk_norm"] = any(name.endswith("self_attn.q_norm.weight") for name in names)
    if has_later_loops := fields["plt_num_loops"] != 1:
        tree |= dict.fromkeys(_FLAGS, True)
    else:  # nothing is between loops
        tree |= dict.fromkeys(_FLAGS, False) | {"plt_normalize_per_loop": False}
        tree |= dict.fromkeys(_SCALES, 1.0) | {"plt_gate_use_hidden_states": False}
    model = from_hf_fields(tree | {"model_type": "plt_moe", "num_experts": 0}, where)
    if not isinstance(slots := fields["max_position_embeddings"], int) or slots < 1:
        raise ConversionError(f"{where}: max_position_embeddings is {slots!r}, no number of slots")
    own = to_hf_fields(model, slots, "plt_moe") | {name: fields.get(name) for name in _IDS}
    own["plt_gate_norm"] = has_later_loops and model.gate_use_hidden_states
    try:
        return PLTMoEConfig(**own)
    except (ValueError, StrictDataclassError) as error:
        raise ConversionError(f"{where}: {' '.join(str(error).split())}") from None


def _head_dim(fields: Mapping[str, Any], where: str) -> int:
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    if not (isinstance(width, int) and isinstance(heads, int) and heads > 0):
        raise ConversionError(f"{where}: no head_dim, hidden_size {width!r}, num_attention_heads "
                              f"{heads!r}")  # fmt: skip
    return width // heads


def _refuse(fields: Mapping[str, Any], where: str) -> None:
    architectures = fields.get("architectures")
    architectures = architectures if isinstance(architectures, list) else []
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
    known = {*_SAME, *_SCALES}
    for name, value in fields.items():
        if (name.startswith("plt_") and name not in known) or name == "quantization_config":
            raise ConversionError(f"{where}: {name} is {value!r}; this layout is not known")


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
    (folder / "config.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    for path in sorted(source.iterdir()):
        code = path.suffix == ".py" and not path.name.startswith("tokenization")
        weights = path.suffix in _NOT_COPIED_SUFFIXES or path.name.endswith(".index.json")
        if path.is_file() and path.name not in _NOT_COPIED and not code and not weights:
            shutil.copyfile(path, folder / path.name)
    copy_model_code(folder)
    (folder / "README.md").write_text(
        f"Converted from {fields.get('_name_or_path') or source.name} ({ARCHITECTURE}) to "
        "`plt_moe`: the same weights with the gate's sign changed, run in one pass per token.\n",
        encoding="utf-8",
    )
