"""Hugging Face -> checkpoint: bit-exact, and a folder that does not fit is refused by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from pltmoe.checkpoint.compatible import check_weights
from pltmoe.checkpoint.manifest import read_manifest
from pltmoe.errors import ConversionError
from pltmoe.hf.convert_back import import_folder
from pltmoe.hf.fields import to_hf_fields
from tests.unit.hf.checkpoints import check_round_trip, model_of, run_config, weights_of
from tests.unit.hf.models import random_reference


def test_there_and_back_again_is_bit_exact(plt_export, tmp_path):
    m, output = model_of("plt2_expert_bias"), tmp_path / "back"
    check_round_trip(plt_export.checkpoint, plt_export.folder, output, m)
    manifest = read_manifest(output)
    assert manifest.contains == ("model",)
    assert (manifest.step, manifest.precision) == (0, "fp32")
    config = run_config(m)
    data = config.data.model_copy(update={"tokenizer": plt_export.checkpoint / "tokenizer.model"})
    check_weights(output, manifest, config.model_copy(update={"data": data}))


def test_a_folder_that_does_not_fit_the_run(plt_export, tmp_path):
    config = run_config(model_of("plt2_expert_bias", num_loops=3, window_keys=5))
    with pytest.raises(ConversionError, match="window_keys: folder 4, config 5") as error:
        import_folder(plt_export.folder, tmp_path / "back", config)
    assert "model.num_loops: folder 2, config 3" in str(error.value)


def test_a_vanilla_folder_for_a_plt_run(tmp_path):
    fields = to_hf_fields(model_of("vanilla"), 32)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConversionError, match="folder's model there: a PLT run may start from its"):
        import_folder(tmp_path, tmp_path / "back", run_config(model_of("plt2")))


def _store_twice(folder):
    index = folder / "model.safetensors.index.json"
    tree = json.loads(index.read_text())
    tree["weight_map"]["other"] = "z.safetensors"
    index.write_text(json.dumps(tree))
    save_file({"model.norm.weight": torch.zeros(16)}, folder / "z.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json: cannot be read"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), "nor model.safetensors"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text("{}"),
            "not a safetensors index",
        ),
        (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "not a JSON object"),
        (lambda f: (f / "config.json").write_text("null"), "not a JSON object: None"),
        (_store_twice, "norm.weight is in another file of the folder, too"),
        (lambda f: next(f.glob("*.safetensors")).write_bytes(b"123"), "cannot be read"),
    ],
)
def test_a_broken_folder_is_reported(damage, message, plt_export, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(plt_export.folder, folder)
    damage(folder)
    with pytest.raises(ConversionError, match=message):
        import_folder(folder, tmp_path / "back", run_config(model_of("plt2_expert_bias")))
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("plt2", lambda x: x.to(torch.int8), "is I8; only F64, .* .quantised weights cannot"),
        ("plt2", lambda x: x.bfloat16(), "experts.1.*is BF16; a checkpoint has one type: choose"),
        ("tied", None, "lm_head.weight is not model.embed_tokens.weight, but tie_word_embeddings"),
    ],
)
def test_what_a_checkpoint_cannot_hold(name, edit, message, tmp_path):
    """Expert 1 of another type than the rest; a tied model with a head of its own."""
    m, folder = model_of(name), tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_hf_fields(m)))
    weights = dict(random_reference(m, dtype=torch.float32).state_dict())
    for key, value in weights.items():
        weights[key] = edit(value) if edit and "experts.1." in key else value.clone()
    if edit is None:
        save_file(weights, folder / "model.safetensors")  # before any index, as transformers
        (folder / "model.safetensors.index.json").write_text("{}")
        import_folder(folder, tmp_path / "repeated", run_config(m))
        weights["lm_head.weight"] += 1
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ConversionError, match=message):
        import_folder(folder, tmp_path / "back", run_config(m))
    assert not (tmp_path / "back").exists()
    if "type" in message:
        import_folder(folder, tmp_path / "back", run_config(m), torch.bfloat16)


def test_missing_and_unknown_tensors_of_a_folder(plt_export, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    shutil.copy(plt_export.folder / "config.json", folder)
    weights, config = weights_of(plt_export.folder), run_config(model_of("plt2_expert_bias"))
    gate = weights.pop("model.layers.0.self_attn.plt_gate.bias")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ConversionError, match="missing: model.layers.0.self_attn.plt_gate.bias"):
        import_folder(folder, tmp_path / "back", config)
    save_file(weights | {"model.layers.0.other": gate}, folder / "model.safetensors")
    with pytest.raises(ConversionError, match="unknown.*model.layers.0.other"):
        import_folder(folder, tmp_path / "back", config)
