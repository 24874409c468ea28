"""Folders: whole or not there, the newest found, the old deleted, damage named."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from pltmoe.checkpoint import folders, saving, store
from pltmoe.checkpoint.manifest import Manifest, read_manifest
from pltmoe.errors import CheckpointError
from pltmoe.runtime.files import sha256_of
from pltmoe.runtime.tokenizer_files import read_tokenizer
from tests.distributed.tiny import tiny_config


def state(values=None, size: int = 4) -> dict:
    """A sharded state of one tensor, to save (values) or to fill."""
    tensor = torch.zeros(size) if values is None else torch.tensor(values)
    return {"weight": ShardedTensor.from_rank_offsets("model.weight", tensor), "plain": 3}


def manifest(step: int) -> Manifest:
    return Manifest(config=tiny_config(), step=step)


@pytest.fixture
def saved(groups, tmp_path):
    """One real checkpoint with a tokenizer."""
    tokenizer = tmp_path / "some.model"
    tokenizer.write_bytes(b"pieces")
    directory = tmp_path / "checkpoints"
    folder = store.begin_save(
        directory, state([1.0, 2, 3, 4]), manifest(5), read_tokenizer(tokenizer)
    ).finish()
    return directory, folder


def test_saved_state_loads_back_and_latest_names_it(saved, tmp_path):
    directory, folder = saved
    assert folder.name == "step_00000005"
    assert (directory / "latest").read_text() == "step_00000005\n"
    assert folders.latest_checkpoint(tmp_path) == folder
    loaded = store.load_state(folder, state())
    assert loaded["weight"].tolist() == [1, 2, 3, 4] and loaded["plain"] == 3
    assert (folder / "tokenizer.model").read_bytes() == b"pieces"
    assert read_manifest(folder).tokenizer_sha256 == sha256_of(tmp_path / "some.model")
    names = {"latest", "step_00000005"}
    assert {path.name for path in directory.iterdir()} == names, "nothing temporary is left"


def test_the_same_step_again_replaces_the_folder(saved):
    directory, folder = saved
    store.begin_save(directory, state([9.0, 9, 9, 9]), manifest(5)).finish()
    assert store.load_state(folder, state())["weight"].tolist() == [9, 9, 9, 9]
    assert {path.name for path in directory.iterdir()} == {"latest", "step_00000005"}


def test_a_crash_before_the_end_leaves_the_older_one(saved, tmp_path, monkeypatch):
    directory, folder = saved

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "write_manifest", crash)
    with pytest.raises(KeyboardInterrupt):
        store.begin_save(directory, state([0.0] * 4), manifest(6)).finish()
    assert folders.latest_checkpoint(tmp_path) == folder
    assert folders.complete_checkpoints(directory) == [folder]
    assert [path.name for path in folders.clean_unfinished(directory)] == [".writing_step_00000006"]
    assert {path.name for path in directory.iterdir()} == {"latest", "step_00000005"}


def test_a_disk_that_cannot_be_written(saved, tmp_path, monkeypatch):
    directory, folder = saved

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_manifest", full)
    with pytest.raises(CheckpointError, match="cannot be written .No space left on device.; older"):
        store.begin_save(directory, state([0.0] * 4), manifest(6)).finish()
    assert folders.latest_checkpoint(tmp_path) == folder


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_damaged_tensors(saved, name):
    _, folder = saved
    os.truncate(folder / name, 40)
    with pytest.raises(CheckpointError, match=f"{folder}: cannot be loaded: .+"):
        store.load_state(folder, state())


def test_another_shape_and_a_missing_tensor(saved):
    _, folder = saved
    with pytest.raises(CheckpointError, match="cannot be loaded: .*(shape|Size)"):
        store.load_state(folder, state(size=6))
    other = {"gate": ShardedTensor.from_rank_offsets("model.gate", torch.zeros(4))}
    with pytest.raises(CheckpointError, match="cannot be loaded: .*model.gate"):
        store.load_state(folder, other)


def test_a_torch_whose_checkpoints_cannot_be_read(monkeypatch):
    store.check_torch()
    monkeypatch.setattr(store, "TensorProperties", lambda: SimpleNamespace(strides=(1,)))
    with pytest.raises(CheckpointError, match="Megatron-core could not read the checkpoints"):
        store.check_torch()


def test_latest_that_names_nothing_falls_back(fake_checkpoint, tmp_path, caplog):
    assert folders.latest_checkpoint(tmp_path) is None
    made = [fake_checkpoint(step) for step in (5, 10, 15)]
    pointer = tmp_path / "checkpoints" / "latest"
    pointer.write_text("step_00000010\n")
    assert folders.latest_checkpoint(tmp_path) == made[1]
    shutil.rmtree(made[1])
    (made[2] / "manifest.json").unlink()
    assert folders.latest_checkpoint(tmp_path) == made[0]
    assert "names step_00000010, which is not there" in caplog.text
    pointer.write_bytes(b"\xff\0")  # what a damaged disk makes of it
    assert folders.latest_checkpoint(tmp_path) == made[0]


def test_retention(fake_checkpoint, tmp_path):
    for step in (10, 20, 30, 40, 50):
        fake_checkpoint(step)
    directory = tmp_path / "checkpoints"
    (directory / "latest").write_text("step_00000020\n")
    assert folders.prune(directory, keep_last=2, keep_every=30) == [], "later ones do not count"
    deleted = folders.prune(directory, keep_last=1, keep_every=30)
    left = sorted(path.name for path in directory.iterdir())
    assert [path.name for path in deleted] == ["step_00000010"]
    assert left == ["latest", *(f"step_000000{step}" for step in (20, 30, 40, 50))]
    (directory / "latest").write_text("step_00000050\n")
    folders.prune(directory, keep_last=1, keep_every=None)
    assert [p.name for p in folders.complete_checkpoints(directory)] == ["step_00000050"]
