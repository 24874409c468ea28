"""Does a configuration fit a checkpoint? Names every field that would change what is computed.

| field                                                   | resume           | weights only  |
|---------------------------------------------------------|------------------|---------------|
| fields of model.* that give tensors their shape         | must be equal    | must be equal,|
|                                                         |                  | gates aside   |
| the rest of model.*, optimizer.*, order of the data,    | must be equal,   | free          |
| seed, batch sizes, precision, train.fp8_* (if it is     | or be accepted   |               |
| fp8), train.spike_*,                                    |                  | (*)           |
| the text itself ("data.contents")                       |                  |               |
| train.steps                                             | see below        | free          |
| parallel.*, intervals, tracking, name, validation data  | free             | free          |

"Accepted" means listed in ``checkpoint.accept_changes``. ``train.steps`` ends the learning-rate
schedule unless ``optimizer.decay_steps`` is given; another end is another learning rate at every
step, so it counts as a change of ``optimizer.decay_steps``. Where the schedule stays the same, a
run may be made longer or shorter. (*) Expert biases are part of the function: that they are left
behind (a rate of 0) must be accepted, too; so must another tokenizer, whose ids are other text.
A model with gates may start from one without, such as PLT from a vanilla model: they start at zero.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pltmoe.checkpoint.manifest import Manifest
from pltmoe.config import RunConfig, config_to_dict
from pltmoe.errors import CheckpointError
from pltmoe.runtime.devices import precision_name
from pltmoe.runtime.files import sha256_of
from pltmoe.runtime.tokenizer_files import find_tokenizer

logger = logging.getLogger(__name__)

_SHAPE_FIELDS = (
    "vocab_size",
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_kv_heads",
    "head_dim",
    "ffn_hidden_size",
    "tied_embeddings",
    "qk_norm",
    "num_experts",
    "moe_ffn_hidden_size",
    "gated_swa",
    "gate_use_hidden_states",
)
"""Fields of the model section that decide which tensors there are, and their shapes."""
_SHAPES = frozenset(f"model.{field}" for field in _SHAPE_FIELDS)

_BIAS = "model.moe_expert_bias_update_rate"
_GATES = ("model.gated_swa", "model.gate_use_hidden_states")
BIAS, GATE = ".expert_bias", ".plt_gate."
"""In the names of tensors that a checkpoint may lack."""
CONTENTS = "data.contents"
"""Stands for the text behind ``data.train`` in messages and ``checkpoint.accept_changes``."""
_DATA_ORDER = ("train", "split", "sequence_length", "reset_position_ids", "mask_document_ends")
_DRAWS_ANEW = (
    "data.train",
    "data.split",
    "data.sequence_length",
    "data.tokenizer",
    "train.seed",
    CONTENTS,
)
"""What a sequence is, and which comes when."""
_TRAIN = ("global_batch_size", "micro_batch_size", "seed", "spike_sigma", "spike_window")
_FP8 = ("fp8_recipe", "fp8_attention")
"""Of ``train``, where the precision is fp8."""


def check_resume(
    directory: Path,
    manifest: Manifest,
    config: RunConfig,
    fingerprints: Mapping[str, str] | None = None,
) -> None:
    """Check that continuing from ``directory`` continues the same run.

    Args:
        directory: the checkpoint.
        manifest: its manifest.
        config: the run that wants to continue.
        fingerprints: of its training sources as they are now, by path.

    Raises:
        CheckpointError: it holds weights only, is already past the last step, or fields differ.
    """
    if "optimizer" not in manifest.contains:
        raise CheckpointError(
            f"{directory} holds weights only and cannot be resumed: start a new run from it with "
            f"checkpoint.load_weights={directory}"
        )
    if manifest.step > config.train.steps:
        raise CheckpointError(
            f"{directory} is at step {manifest.step}, past train.steps ({config.train.steps}): "
            "raise train.steps, or choose another train.output_dir"
        )
    changed = _changed(_decisive(manifest.config, manifest), _decisive(config, None))
    changed |= _changed_text(manifest.data, fingerprints or {})
    to_accept = ",".join(path for path in changed if path not in _SHAPES)
    accepted = [path for path in changed if _accepts(config, path)]
    for path in accepted:
        logger.warning("accepted change: %s", changed.pop(path))
    if changed:
        accept = f", accept them with 'checkpoint.accept_changes=[{to_accept}]',"
        if not _SHAPES.isdisjoint(changed):
            accept = " (tensor shapes cannot change)"
        raise CheckpointError(
            f"{directory} does not fit the configuration: {'; '.join(changed.values())}. "
            f"Put the checkpoint's values back{accept} or choose another train.output_dir"
        )
    if redrawn := [path for path in accepted if path in _DRAWS_ANEW]:
        logger.warning(
            "the order of the data is drawn anew (%s): sequences may repeat", ", ".join(redrawn)
        )
    left = (config.train.steps - manifest.step) * config.train.global_batch_size
    if manifest.consumed_samples + left > manifest.train_samples:
        logger.warning(
            "the run was planned for %d sequences and is longer now: the order of the data is "
            "drawn anew, sequences may repeat",
            manifest.train_samples,
        )


def check_weights(directory: Path, manifest: Manifest, config: RunConfig) -> None:
    """Check that the weights in ``directory`` have the shapes of ``config.model``.

    Raises:
        CheckpointError: fields differ, expert biases, by which the model chooses its experts,
            would be left behind, or the tokenizer is another one.
    """
    changed = _changed(_shapes(manifest.config), _shapes(config))
    if GATE in absent_tensors(manifest, config):
        changed = {path: why for path, why in changed.items() if path not in _GATES}
    if changed:
        raise CheckpointError(
            f"the weights in {directory} do not fit the configuration: "
            + "; ".join(changed.values())
        )
    rate, theirs = config.model.moe_expert_bias_update_rate, manifest.config.model
    if theirs.moe_expert_bias_update_rate and not rate and not _accepts(config, _BIAS):
        raise CheckpointError(
            f"the model in {directory} chooses its experts with biases (checkpoint {_BIAS} "
            f"{theirs.moe_expert_bias_update_rate}, config {rate}): set the same rate or another, "
            "or leave the biases behind with checkpoint.accept_changes=[" + _BIAS + "]"
        )
    trained, used = manifest.tokenizer_sha256, config.data.tokenizer
    if trained and trained != sha256_of(used) and not _accepts(config, "data.tokenizer"):
        raise CheckpointError(
            f"the model in {directory} was trained with another tokenizer than data.tokenizer "
            f"({used}), whose ids are other text: use {find_tokenizer(directory)} and data made "
            "with it, or accept the change with checkpoint.accept_changes=[data.tokenizer]"
        )


def absent_tensors(manifest: Manifest, config: RunConfig) -> tuple[str, ...]:
    """Return what stands in the names of the model's tensors that the checkpoint lacks.

    They start as in a new model, at zero.
    """
    theirs = manifest.config.model
    lacks = {
        BIAS: not theirs.moe_expert_bias_update_rate,
        GATE: config.model.gated_swa and not theirs.gated_swa,
    }
    return tuple(part for part, is_absent in lacks.items() if is_absent)


def _accepts(config: RunConfig, path: str) -> bool:
    return path in config.checkpoint.accept_changes and path not in _SHAPES


def _changed(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """Return path -> message for every field that differs."""
    found = {}
    for path in old:
        if old[path] != new[path]:
            found[path] = f"{path}: checkpoint {_show(old[path])}, config {_show(new[path])}"
            if path == "optimizer.decay_steps":
                found[path] += (
                    " (train.steps when not set; optimizer.decay_steps="
                    f"{_show(old[path])} keeps the learning-rate schedule)"
                )
    return found


def _changed_text(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    """Name the sources of the same path that hold other text; paths are compared elsewhere."""
    other = [source for source in old if source in new and old[source] != new[source]]
    if not other:
        return {}
    return {
        CONTENTS: f"{CONTENTS}: {', '.join(other)} (.bin, .idx) is not the text that the "
        "checkpoint was trained on: it has been made anew or changed since"
    }


def _shapes(config: RunConfig) -> dict[str, Any]:
    return {f"model.{field}": getattr(config.model, field) for field in _SHAPE_FIELDS}


def _decisive(config: RunConfig, manifest: Manifest | None) -> dict[str, Any]:
    """Flatten the fields that decide the result; with its manifest, of a checkpoint."""
    tree = config_to_dict(config)
    fields = {f"model.{name}": value for name, value in tree["model"].items()}
    fields |= {f"optimizer.{name}": value for name, value in tree["optimizer"].items()}
    if config.optimizer.schedule != "constant":
        fields["optimizer.decay_steps"] = config.optimizer.decay_steps or config.train.steps
    fields |= {f"data.{name}": tree["data"][name] for name in _DATA_ORDER}
    fields |= {f"train.{name}": tree["train"][name] for name in _TRAIN}
    if manifest is not None:
        fields["data.tokenizer"] = manifest.tokenizer_sha256
        fields["train.precision"] = manifest.precision
    else:
        fields["data.tokenizer"] = sha256_of(config.data.tokenizer)
        fields["train.precision"] = precision_name(config.train.precision)
    is_fp8 = fields["train.precision"] == "fp8"
    fields |= {f"train.{name}": tree["train"][name] if is_fp8 else None for name in _FP8}
    return fields


def _show(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:
        return f"sha256 {value[:12]}"
    return str(value)
