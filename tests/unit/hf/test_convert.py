"""Checkpoint -> Hugging Face: complete, verified, whole or not at all."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from pltmoe.checkpoint.find import find_checkpoint
from pltmoe.checkpoint.manifest import read_manifest, write_manifest
from pltmoe.config.counts import count_parameters
from pltmoe.data.tokenizer import load_tokenizer
from pltmoe.errors import CheckpointError, ConversionError
from pltmoe.hf import convert, shards, verify
from pltmoe.hf.checkpoint_tensors import CheckpointTensors
from pltmoe.hf.convert import ExportOptions, export_checkpoint, verify_folder
from pltmoe.hf.convert_back import import_folder
from pltmoe.hf.mapping import rows
from pltmoe.hf.verify import Verification
from tests.unit.hf.checkpoints import (
    check_round_trip,
    model_of,
    run_config,
    weights_of,
    write_checkpoint,
)
from tests.unit.hf.models import small_model

QUIET = ExportOptions(progress=False)
UNCHECKED = ExportOptions(progress=False, verify=False)


def edited_copy(checkpoint, folder, **model_changes):
    """Copy a checkpoint and change the model section of its manifest."""
    shutil.copytree(checkpoint, folder)
    manifest = read_manifest(folder)
    tree = manifest.config.model_dump(mode="json")
    tree["model"] |= model_changes
    config = type(manifest.config).model_validate(tree)
    write_manifest(folder, manifest.model_copy(update={"config": config}))
    return folder


def test_the_export_is_complete(plt_export):
    files = {path.name for path in plt_export.folder.iterdir()}
    assert files >= {
        "config.json", "generation_config.json", "README.md", "configuration_plt_moe.py",
        "modeling_plt_moe.py", "model.safetensors.index.json", "tokenizer.json",
        "tokenizer_config.json", "tokenizer.model",
    }  # fmt: skip
    assert not list(plt_export.folder.parent.glob("*.writing"))
    card = (plt_export.folder / "README.md").read_text()
    for fact in ("# small", "license: apache-2.0", "| step | 7 |", "| tokens | 224 |"):
        assert fact in card
    assert str(plt_export.checked) in card
    generation = json.loads((plt_export.folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (2, 3)


def test_logits_were_verified_in_float64(plt_export):
    assert isinstance(plt_export.checked, Verification)
    assert plt_export.checked.dtype == torch.float64
    assert plt_export.checked.max_difference < 1e-10
    assert verify_folder(plt_export.checkpoint, plt_export.folder) == plt_export.checked


def check_against_megatron(run, folder):
    """The table of names is on both sides of ``verify_export``; Megatron itself knows no table."""
    kept = torch.load(run / "logits.pt")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        found = model(kept["tokens"]).logits
    assert (found - kept["logits"]).abs().max() < 1e-4  # float32, logits up to 5


def test_the_export_computes_what_the_megatron_model_computes(plt_run, plt_export):
    check_against_megatron(plt_run, plt_export.folder)


def test_shared_routing_is_exported_and_comes_back(tmp_path, tokenizer_model):
    """The weights look the same; the folder, its card and the way back must say it."""
    m = model_of("plt3_shared_routing", moe_z_loss_coeff=0.01)
    checkpoint = write_checkpoint(tmp_path / "run", m, tokenizer_model)
    export = export_checkpoint(checkpoint, tmp_path / "hf", QUIET)
    assert isinstance(export.checked, Verification) and export.checked.max_difference < 1e-10
    check_against_megatron(tmp_path / "run", export.folder)
    assert json.loads((export.folder / "config.json").read_text())["plt_loop_routing"] == "shared"
    assert "| experts of later loops | loop 1's" in (export.folder / "README.md").read_text()
    import_folder(export.folder, tmp_path / "back", run_config(m), progress=False)
    independent = m.model_copy(update={"moe_loop_routing": "independent"})
    with pytest.raises(ConversionError, match="moe_loop_routing: folder shared, config independ"):
        import_folder(export.folder, tmp_path / "other", run_config(independent))


def test_shards_are_small_and_indexed(plt_export):
    shards = sorted(plt_export.folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert shards[-1].name == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"
    index = json.loads((plt_export.folder / "model.safetensors.index.json").read_text())
    weights = weights_of(plt_export.folder)
    assert set(index["weight_map"]) == set(weights)
    assert index["metadata"]["total_size"] == sum(x.numel() * 4 for x in weights.values())
    sizes = {name: x.numel() * 4 for name, x in weights.items()}
    for shard in shards:
        inside = [size for name, size in sizes.items() if index["weight_map"][name] == shard.name]
        assert sum(inside) <= 30_000 or len(inside) == 1


def test_the_contract_of_the_weight_names(plt_export):
    m = model_of("plt2_expert_bias")
    weights, layer = weights_of(plt_export.folder), "model.layers.1."
    assert weights[layer + "self_attn.plt_gate.weight"].shape == (4, 8)
    assert weights[layer + "self_attn.plt_gate.bias"].shape == (4,)
    assert weights[layer + "self_attn.k_proj.weight"].shape == (16, 16)
    assert weights[layer + "mlp.experts.3.down_proj.weight"].shape == (16, 12)
    assert weights[layer + "mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert weights["lm_head.weight"].shape == (m.vocab_size, 16)


ELSEWHERE = """
import json, sys
from importlib.abc import MetaPathFinder

class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pltmoe", "megatron"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model, report = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, output_loading_info=True
)
batch = tokenizer(["def test(", "x"], return_tensors="pt", padding=True)
ids = model.generate(**batch, max_new_tokens=5, do_sample=False)
again = model.generate(**batch, max_new_tokens=5, do_sample=False, use_cache=False)
model.save_pretrained(sys.argv[2])
assert not [name for name in sys.modules if name.split(".")[0] == "pltmoe"]
print(json.dumps({
    "class": type(model).__name__, "ids": ids.tolist(), "again": again.tolist(),
    "missing": list(report["missing_keys"]), "unexpected": list(report["unexpected_keys"]),
}))
"""


def test_it_works_where_pltmoe_cannot_be_imported(plt_export, tmp_path):
    """Only torch and transformers are there; generate with and without cache; saved again."""
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(plt_export.folder), str(tmp_path / "again")],
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["class"] == "PLTMoEForCausalLM"
    assert found["ids"] == found["again"]
    assert found["missing"] == found["unexpected"] == []
    before, after = weights_of(plt_export.folder), weights_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("name", "changes", "architecture"),
    [
        ("vanilla", {"moe_ffn_hidden_size": 10}, "Qwen3MoeForCausalLM"),
        ("dense_vanilla", {"tied_embeddings": True}, "Qwen3ForCausalLM"),
    ],
)
def test_a_vanilla_model_is_a_stock_model(name, changes, architecture, tmp_path, tokenizer_model):
    """No custom code, no field of ours; the tokenizer of the folder is used, not Qwen's.

    Experts may have any width: rows of 10 are no whole 16 bytes, which grouped products need.
    """
    m = model_of(name, **changes)
    checkpoint = write_checkpoint(tmp_path / "run", m, tokenizer_model)
    export = export_checkpoint(checkpoint, tmp_path / "hf", QUIET)
    assert export.architecture == architecture
    assert isinstance(export.checked, Verification)
    assert not list(export.folder.glob("*.py"))
    assert "plt" not in (export.folder / "config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(export.folder)
    assert type(model).__name__ == architecture
    check_against_megatron(tmp_path / "run", export.folder)
    text = "def test_odd(x):\n\treturn  'é\u2581😀'"
    assert AutoTokenizer.from_pretrained(export.folder, trust_remote_code=True)(text)[
        "input_ids"
    ] == load_tokenizer(tokenizer_model).encode(text)
    check_round_trip(checkpoint, export.folder, tmp_path / "back", m)


def test_bfloat16_there_and_back_again(tmp_path, tokenizer_model):
    m = model_of("dense_plt3_normed")
    run = tmp_path / "run"
    checkpoint = write_checkpoint(run, m, tokenizer_model, dtype=torch.bfloat16)
    export = export_checkpoint(run, tmp_path / "hf", QUIET)
    assert weights_of(export.folder)["model.norm.weight"].dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(
        export.folder, trust_remote_code=True, dtype="auto"
    ).dtype == torch.bfloat16  # fmt: skip
    check_round_trip(checkpoint, export.folder, tmp_path / "back", m)
    assert read_manifest(tmp_path / "back").precision == "bf16"


def test_another_dtype_on_request(plt_run, tmp_path):
    """Weights are rounded, the expert bias is not; the check compares with rounded weights."""
    options = ExportOptions(progress=False, dtype=torch.bfloat16)
    export = export_checkpoint(plt_run, tmp_path / "hf", options)
    weights = weights_of(export.folder)
    assert weights["lm_head.weight"].dtype == torch.bfloat16
    bias = "model.layers.0.mlp.gate.e_score_correction_bias"
    assert weights[bias].dtype == torch.float32
    assert export.checked.max_difference < 1e-10
    model = AutoModelForCausalLM.from_pretrained(
        export.folder, trust_remote_code=True, dtype="auto"
    )
    assert torch.equal(model.get_buffer(bias), weights[bias]), "float32 even in a bfloat16 model"


def test_wrong_logits_are_found_and_leave_nothing(plt_run, tmp_path, monkeypatch):
    """The comparison bites: the model that is shipped computes something else."""
    monkeypatch.setattr(convert.ShardWriter, "add", _forget_a_gate(convert.ShardWriter.add))
    with pytest.raises(ConversionError, match="other logits than the checkpoint"):
        export_checkpoint(plt_run, tmp_path / "hf", QUIET)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_error_and_leaves_nothing(plt_run, tmp_path, monkeypatch):
    """safetensors raises what is no OSError."""

    def full(tensors, path, metadata):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(ConversionError, match=r"safetensors: cannot be written \(.*No space left"):
        export_checkpoint(plt_run, tmp_path / "hf", QUIET)
    assert not list(tmp_path.iterdir())


def _forget_a_gate(add):
    def wrong(self, name, tensor):
        add(self, name, torch.zeros_like(tensor) if name.endswith("plt_gate.bias") else tensor)

    return wrong


def test_a_home_that_cannot_be_written_is_said_before_the_work(plt_run, plt_export, monkeypatch):
    """It was "OUTPUT: cannot be written", after it had been."""
    monkeypatch.setattr(transformers.utils, "HF_MODULES_CACHE", "/proc/no/modules")
    monkeypatch.setattr(convert, "_write_weights", lambda *_: pytest.fail("too late"))
    said = r"^/proc/no/modules: cannot be written .*set HF_HOME"
    with pytest.raises(ConversionError, match=said):
        export_checkpoint(plt_run, plt_run / "new", QUIET)
    with pytest.raises(ConversionError, match=said):
        verify_folder(plt_run, plt_export.folder)


def test_too_large_to_verify_is_said(plt_run, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "fitting_dtype", lambda m: None)
    export = export_checkpoint(plt_run, tmp_path / "hf", QUIET)
    assert "NOT verified" in export.checked and "--verify-only" in export.checked
    assert "NOT verified" in (tmp_path / "hf/README.md").read_text()


def test_memory_decides_the_precision(monkeypatch):
    """float64 if it fits, then float32, then nothing; transformers' own models never in float64."""

    def free_bytes(number):
        memory = SimpleNamespace(available=number)
        monkeypatch.setattr(verify.psutil, "virtual_memory", lambda: memory)

    m, vanilla = model_of("plt2"), model_of("vanilla")
    size = count_parameters(m).total
    for per_parameter, dtype in ((11, torch.float64), (6, torch.float32), (5, None)):
        free_bytes(per_parameter * size)
        assert verify.fitting_dtype(m) == dtype
    free_bytes(10**12)
    assert verify.fitting_dtype(vanilla) == torch.float32


def test_only_single_tensors_are_in_memory(plt_run):
    """A stacked expert tensor is read expert by expert."""
    checkpoint = find_checkpoint(plt_run)
    m = read_manifest(checkpoint).config.model
    row = next(row for row in rows(m) if row.expert == 2 and row.layout == "gate_up")
    assert CheckpointTensors(checkpoint, m).read(row).shape == (24, 16)


def test_an_output_that_is_there_is_not_touched(plt_run, plt_export, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConversionError, match="exists and is not empty"):
        export_checkpoint(plt_run, tmp_path, UNCHECKED)
    with pytest.raises(ConversionError, match="exists and is not empty"):
        import_folder(plt_export.folder, tmp_path, run_config(model_of("plt2_expert_bias")))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_output_folder_is_used(plt_run, tmp_path):
    export_checkpoint(plt_run, tmp_path, UNCHECKED)
    assert "not verified (--no-verify)" in (tmp_path / "README.md").read_text()


def test_the_newest_checkpoint_is_the_one_that_a_run_would_resume_from(plt_run, tmp_path):
    """Also when somebody has deleted a bad one, and ``latest`` names it still."""
    shutil.copytree(plt_run, tmp_path / "run")
    directory = tmp_path / "run/checkpoints"
    (directory / "latest").write_text("step_99999999\n")
    expected = directory / find_checkpoint(plt_run).name
    assert find_checkpoint(tmp_path / "run") == find_checkpoint(directory) == expected


def test_no_checkpoint_there(tmp_path):
    with pytest.raises(CheckpointError, match="neither a checkpoint folder"):
        export_checkpoint(tmp_path, tmp_path / "hf", QUIET)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 3}, r"tensor missing: model\.layers\.2\."),
        ({"num_layers": 1}, r"tensor model\.layers\.1\..* is unknown"),
        ({"head_dim": 16}, "has shape .* but the model configuration says"),
    ],
)
def test_tensors_that_do_not_fit_are_named(changes, message, plt_run, tmp_path):
    folder = edited_copy(find_checkpoint(plt_run), tmp_path / "edited", **changes)
    with pytest.raises(ConversionError, match=message):
        export_checkpoint(folder, tmp_path / "hf", QUIET)
    assert not (tmp_path / "hf").exists()


def test_damaged_files_are_reported(plt_run, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(find_checkpoint(plt_run), folder)
    for path in folder.glob("*.distcp"):
        path.write_bytes(bytes(path.stat().st_size))  # same size: only the checksum can tell
    with pytest.raises(CheckpointError, match="__0_0.distcp has changed since it was written"):
        export_checkpoint(folder, tmp_path / "hf", QUIET)
    old = read_manifest(folder).model_copy(update={"checksums": {}})
    write_manifest(folder, old)  # from before there were checksums
    with pytest.raises(CheckpointError, match="cannot be read"):
        export_checkpoint(folder, tmp_path / "hf", QUIET)
    shutil.copytree(find_checkpoint(plt_run), tmp_path / "empty")
    (tmp_path / "empty/.metadata").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="no readable torch_dist checkpoint"):
        CheckpointTensors(tmp_path / "empty", model_of("plt2_expert_bias"))
    assert not (tmp_path / "hf").exists()


def test_without_a_tokenizer(plt_run, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(find_checkpoint(plt_run), folder)
    (folder / "tokenizer.model").unlink()
    manifest = read_manifest(find_checkpoint(plt_run))
    left = {name: sum for name, sum in manifest.checksums.items() if name != "tokenizer.model"}
    write_manifest(folder, manifest.model_copy(update={"checksums": left}))
    with pytest.raises(ConversionError, match="no tokenizer; --no-tokenizer"):
        export_checkpoint(folder, tmp_path / "hf", QUIET)
    options = ExportOptions(progress=False, tokenizer=False)
    export = export_checkpoint(folder, tmp_path / "hf", options)
    assert isinstance(export.checked, Verification)
    assert not (export.folder / "tokenizer.json").exists()


def test_a_tokenizer_that_is_too_large(tmp_path, tokenizer_model):
    checkpoint = write_checkpoint(tmp_path / "run", small_model("dense_vanilla"), tokenizer_model)
    with pytest.raises(ConversionError, match="400 pieces, but model.vocab_size is 61"):
        export_checkpoint(checkpoint, tmp_path / "hf", QUIET)
