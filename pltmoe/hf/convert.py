"""Checkpoint -> Hugging Face folder, tensor by tensor, whole or not at all.

    checkpoint folder                     exported folder
    manifest.json   configuration   -->   config.json, generation_config.json, README.md
    *.distcp        weights         -->   model-0000i-of-0000n.safetensors, ...index.json
    tokenizer.model                 -->   tokenizer.json, tokenizer_config.json, tokenizer.model
    or tokenizer.json, ..._config.json    (the last if the checkpoint has it)
                                          configuration_plt_moe.py, modeling_plt_moe.py (PLT only)

Nothing but the checkpoint is needed, and no more memory than one shard (verification, if the model
fits, needs the model once).
"""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from pltmoe.checkpoint.find import find_checkpoint
from pltmoe.checkpoint.integrity import check_files
from pltmoe.checkpoint.manifest import Manifest, read_manifest
from pltmoe.errors import ConversionError
from pltmoe.hf import configuration_plt_moe, modeling_plt_moe
from pltmoe.hf.checkpoint_tensors import CheckpointTensors
from pltmoe.hf.code_cache import check_code_cache
from pltmoe.hf.fast_tokenizer import write_tokenizer
from pltmoe.hf.fields import to_hf_fields
from pltmoe.hf.folder_tensors import read_json
from pltmoe.hf.mapping import Row, rows
from pltmoe.hf.model_card import model_card
from pltmoe.hf.shards import ShardWriter, num_bytes
from pltmoe.hf.verify import Verification, verify_export
from pltmoe.runtime.tokenizer_files import find_tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportOptions:
    """How to export."""

    dtype: torch.dtype | None = None
    """Of the weights; default: as in the checkpoint. Expert biases stay float32."""
    max_shard_bytes: int = 5 * 10**9
    """Largest safetensors file, and about the memory that is needed."""
    tokenizer: bool = True
    """Export the tokenizer."""
    verify: bool = True
    """Compare logits before the folder gets its name."""
    progress: bool = True
    """Show a progress bar."""


@dataclass(frozen=True)
class Export:
    """What was exported."""

    checkpoint: Path
    folder: Path
    architecture: str
    checked: Verification | str
    """The comparison of logits, or why there was none."""


def export_checkpoint(checkpoint: Path, output: Path, options: ExportOptions) -> Export:
    """Convert ``checkpoint`` (a step folder, or a run's folder: its latest) to ``output``.

    Raises:
        CheckpointError: no complete checkpoint there, or a damaged one.
        ConversionError: ``output`` is not empty, a tensor does not fit, logits differ, or the
            user's cache cannot be written; nothing is left behind.
    """
    checkpoint = find_checkpoint(checkpoint)
    manifest = read_manifest(checkpoint)
    check_files(checkpoint, manifest)
    model = manifest.config.model
    tensors = CheckpointTensors(checkpoint, model)
    dtype = options.dtype or tensors.dtype()
    fields = to_hf_fields(model, manifest.config.data.sequence_length)
    if options.verify:
        check_code_cache(fields)
    with whole_folder(output) as folder:
        _write_weights(folder, tensors, list(rows(model)), dtype, options)
        ids = _write_tokenizer(folder, checkpoint, manifest, options)
        _write_configuration(folder, fields, dtype, ids)
        checked: Verification | str = "Logits were not verified (--no-verify)."
        if options.verify:
            checked = verify_export(folder, tensors, model, dtype)
        name = str(dtype).removeprefix("torch.")
        card = model_card(manifest, fields, name, transformers.__version__, str(checked))
        (folder / "README.md").write_text(card, encoding="utf-8")
    return Export(checkpoint, output, fields["architectures"][0], checked)


def verify_folder(checkpoint: Path, folder: Path) -> Verification | str:
    """Compare an existing export with its checkpoint.

    Raises:
        CheckpointError: no complete checkpoint there.
        ConversionError: the logits differ, ``folder`` is no export, or the user's cache cannot be
            written.
    """
    checkpoint = find_checkpoint(checkpoint)
    model = read_manifest(checkpoint).config.model
    try:
        fields = read_json(folder / "config.json")
        name = fields["dtype"]
    except (ConversionError, KeyError) as error:
        raise ConversionError(f"{folder}: not an exported model ({error})") from None
    check_code_cache(fields)
    return verify_export(folder, CheckpointTensors(checkpoint, model), model, getattr(torch, name))


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """Yield a new folder beside ``output`` that takes its name when the block succeeds.

    Raises:
        ConversionError: ``output`` is there and not empty, or cannot be written.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConversionError(f"{output}: exists and is not empty; name another folder")
    writing = output.with_name(output.name + ".writing")
    try:
        shutil.rmtree(writing, ignore_errors=True)  # left by a run that was killed
        writing.mkdir(parents=True)
        yield writing
        writing.replace(output)
    except OSError as error:
        raise ConversionError(f"{output}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def _write_weights(
    folder: Path,
    tensors: CheckpointTensors,
    table: list[Row],
    dtype: torch.dtype,
    options: ExportOptions,
) -> None:
    dtypes = [torch.float32 if row.float32 else dtype for row in table]
    sizes = [
        (name, num_bytes(shape, row_dtype))
        for row, row_dtype in zip(table, dtypes, strict=True)
        for name, shape in zip(row.hf, row.shapes, strict=True)
    ]
    writer = ShardWriter(folder, sizes, options.max_shard_bytes)
    total = sum(size for _, size in sizes)
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="weights", disable=not options.progress
    ) as bar:
        for row, row_dtype in zip(table, dtypes, strict=True):
            for name, tensor in row.split(tensors.read(row)).items():
                writer.add(name, tensor.to(row_dtype))
                bar.update(num_bytes(tuple(tensor.shape), row_dtype))
    writer.finish()


def _write_tokenizer(
    folder: Path, checkpoint: Path, manifest: Manifest, options: ExportOptions
) -> dict[str, int]:
    """Return the ids of the special tokens for config.json."""
    if not options.tokenizer:
        return {}
    path = find_tokenizer(checkpoint)
    if path is None:
        raise ConversionError(
            f"{checkpoint}: the checkpoint has no tokenizer; --no-tokenizer exports without one"
        )
    fast = write_tokenizer(path, folder, manifest.config.data.sequence_length)
    if len(fast) > manifest.config.model.vocab_size:
        raise ConversionError(
            f"{path}: {len(fast)} pieces, but model.vocab_size is "
            f"{manifest.config.model.vocab_size}"
        )
    ids = {name: getattr(fast, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {name: index for name, index in ids.items() if index is not None}


def _write_configuration(
    folder: Path, fields: dict[str, Any], dtype: torch.dtype, ids: dict[str, int]
) -> None:
    tree = fields | ids | {"dtype": str(dtype).removeprefix("torch."), "use_cache": True}
    tree["transformers_version"] = transformers.__version__
    (folder / "config.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    transformers.GenerationConfig(**ids).save_pretrained(folder)
    if fields["model_type"] == "plt_moe":
        copy_model_code(folder)


def copy_model_code(folder: Path) -> None:
    """Put the files that transformers runs the model with into ``folder``."""
    for module in (configuration_plt_moe, modeling_plt_moe):
        source = Path(str(module.__file__))
        shutil.copyfile(source, folder / source.name)
