"""A manifest reads back, and says what is wrong with a folder."""

import json

import pytest

from pltmoe.checkpoint.manifest import read_manifest
from pltmoe.errors import CheckpointError
from tests.distributed.tiny import tiny_config


def test_reads_back_what_was_written(fake_checkpoint):
    manifest = read_manifest(fake_checkpoint(7, tokens=900, contains=("model",)))
    assert manifest.config == tiny_config()
    assert (manifest.step, manifest.tokens, manifest.contains) == (7, 900, ("model",))
    assert manifest.files == {"__0_0.distcp": 7}
    assert manifest.versions["megatron-core"] and manifest.commit and manifest.created


def test_no_folder_and_no_manifest(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such checkpoint folder"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(
        CheckpointError, match="no manifest.json, so it is no checkpoint or was nev"
    ):
        read_manifest(tmp_path)


def test_missing_and_truncated_files(fake_checkpoint):
    folder = fake_checkpoint(7)
    (folder / "__0_0.distcp").write_text("ten")
    with pytest.raises(CheckpointError, match="__0_0.distcp: 3 bytes, but 7 were written"):
        read_manifest(folder)
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="__0_0.distcp is missing, the checkpoint is damaged"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:40], "manifest.json: cannot be read"),
        (lambda text: "[]", "expected a JSON object"),
        (lambda text: json.dumps(json.loads(text) | {"format": 9}), "format 9 is newer than this"),
        (lambda text: json.dumps(json.loads(text) | {"step": "x"}), "manifest.json: .*step"),
        (lambda text: text.replace('"num_layers"', '"layers"'), "config: .*num_layers: required"),
    ],
)
def test_unreadable_manifests(fake_checkpoint, change, message):
    path = fake_checkpoint(7) / "manifest.json"
    tree = json.loads(path.read_text())
    del tree["manifest_sha256"]  # as of a checkpoint from before there was one
    path.write_text(change(json.dumps(tree)))
    with pytest.raises(CheckpointError, match=message):
        read_manifest(path.parent)
