"""Saving while the state changes: what is saved is what it was; errors come back; never half."""

import errno
import gc
import subprocess
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from pltmoe.checkpoint import folders, saving, store
from pltmoe.checkpoint.integrity import check_files
from pltmoe.checkpoint.manifest import Manifest, read_manifest
from pltmoe.errors import CheckpointError
from tests.distributed.tiny import tiny_config
from tests.small_disk import files_end_at, fill_disk

BOTH = pytest.mark.parametrize("background", [False, True], ids=["waiting", "background"])
LARGE = 3 << 18
"""Numbers in a tensor of 3 MiB."""


def state(tensor: torch.Tensor) -> dict:
    shards = {"weight": ShardedTensor.from_rank_offsets("model.weight", tensor)}
    # A view into a buffer, as all of Megatron's parameters are.
    shards["part"] = ShardedTensor.from_rank_offsets("model.part", tensor[1:])
    return shards


def loaded(folder: Path, size: int) -> dict[str, torch.Tensor]:
    return store.load_state(folder, state(torch.zeros(size)))


def begin(directory: Path, tensor: torch.Tensor, step: int, background: bool = True):
    manifest = Manifest(config=tiny_config(), step=step)
    return store.begin_save(directory, state(tensor), manifest, background=background)


def test_what_is_saved_is_the_state_when_the_save_began(groups, tmp_path, gate):
    values = torch.arange(6.0)
    save = begin(tmp_path / "checkpoints", values, 5)
    assert not save.is_written()
    values.fill_(-1)  # training goes on
    assert folders.latest_checkpoint(tmp_path) is None, "it is not whole"
    assert folders.complete_checkpoints(tmp_path / "checkpoints") == []
    gate.set()
    folder = save.finish()
    assert loaded(folder, 6)["weight"].tolist() == [0, 1, 2, 3, 4, 5]
    assert loaded(folder, 6)["part"].tolist() == [1, 2, 3, 4, 5]
    assert folders.latest_checkpoint(tmp_path) == folder


def test_a_save_in_the_background_copies_each_tensor_once(groups, tmp_path, gate, monkeypatch):
    """Of the view, Megatron's planning has made a copy that nobody else changes."""
    copied, empty_like = [], torch.empty_like
    monkeypatch.setattr(
        torch, "empty_like", lambda t, **more: copied.append(t.numel()) or empty_like(t, **more)
    )
    values = torch.ones(1001)
    save = begin(tmp_path / "checkpoints", values, 5)
    assert copied == [1001]
    gc.collect()
    alive = [t for t in gc.get_objects() if torch.is_tensor(t) and t.numel() in (1000, 1001)]
    storages = {t.untyped_storage().data_ptr() for t in alive}
    assert len(storages - {values.untyped_storage().data_ptr()}) == 2
    gate.set()
    save.finish()


def test_background_and_waiting_write_the_same(groups, tmp_path):
    values = torch.randn(1000)
    folders = [
        begin(tmp_path / str(background), values, 5, background).finish()
        for background in (False, True)
    ]
    names = {path.name for path in folders[0].iterdir()}
    assert names == {path.name for path in folders[1].iterdir()}
    waiting, behind = (loaded(folder, 1000) for folder in folders)
    assert all(torch.equal(waiting[name], behind[name]) for name in ("weight", "part"))
    for folder in folders:
        manifest = read_manifest(folder)
        assert manifest.checksums.keys() == manifest.files.keys() == names - {"manifest.json"}
        check_files(folder, manifest)


def test_a_background_error_comes_back_and_the_older_one_stays(groups, tmp_path, gate):
    directory = tmp_path / "checkpoints"
    gate.set()
    older = begin(directory, torch.ones(4), 5).finish()
    gate.error = OSError(errno.ENOSPC, "no space")
    save = begin(directory, torch.ones(4), 6)
    with pytest.raises(CheckpointError) as error:
        save.finish()
    assert str(error.value) == (
        f"{directory}/step_00000006: cannot be written (rank 0: No space left on device); "
        "older checkpoints are untouched"
    )
    assert folders.latest_checkpoint(tmp_path) == older
    assert {path.name for path in directory.iterdir()} == {"latest", older.name}


def test_an_abandoned_save_ends_soon_and_leaves_nothing_complete(groups, tmp_path, gate):
    save = begin(tmp_path / "checkpoints", torch.ones(4), 5)
    save.abandon()
    gate.set()
    with pytest.raises(CheckpointError, match="rank 0: the run ended"):
        save.finish()
    assert folders.complete_checkpoints(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("last", ["point_to", "_appear"])
def test_a_crash_around_the_rename_leaves_no_newer_folder_than_latest_names(
    groups, tmp_path, monkeypatch, last
):
    """A newer one would be taken for a branch that somebody left (checkpoint/newest.py)."""

    class Killed(BaseException):
        pass

    def kill(*arguments):
        before(*arguments)
        raise Killed

    begin(tmp_path / "checkpoints", torch.ones(4), 5).finish()
    before = getattr(saving, last)
    monkeypatch.setattr(saving, last, kill)
    with pytest.raises(Killed):
        begin(tmp_path / "checkpoints", torch.ones(4), 6).finish()
    every = folders.complete_checkpoints(tmp_path / "checkpoints")
    assert folders.latest_checkpoint(tmp_path) == every[-1]
    assert [path.name[-1] for path in every] == (["5"] if last == "point_to" else ["5", "6"])


@BOTH
def test_a_full_disk(groups, small_disk, background):
    """Room for one checkpoint of 6 MiB, not for two; freed again when the second fails."""
    directory = small_disk / "checkpoints"
    older = begin(directory, torch.ones(LARGE), 5, background).finish()
    with pytest.raises(CheckpointError, match="cannot be written .*No space left on device.*older"):
        begin(directory, torch.zeros(LARGE), 6, background).finish()
    still_there(older, small_disk)


@BOTH
def test_a_disk_that_is_full_when_only_the_index_is_missing(groups, small_disk, background):
    """The tensors fit, what rank 0 writes at the end does not."""
    directory = small_disk / "checkpoints"
    older = begin(directory, torch.ones(8), 5, background).finish()
    save = begin(directory, torch.zeros(8), 6, background)
    while background and not save.is_written():
        pass
    fill_disk(small_disk / "filler")
    with pytest.raises(CheckpointError, match="cannot be written .*No space left on device.*older"):
        save.finish()
    still_there(older, small_disk, size=8)


@BOTH
def test_a_disk_that_became_read_only(groups, small_disk, background):
    directory = small_disk / "checkpoints"
    older = begin(directory, torch.ones(8), 5, background).finish()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match="cannot be written .*Read-only file system"):
        begin(directory, torch.zeros(8), 6, background).finish()
    still_there(older, small_disk, size=8)


@BOTH
def test_a_file_that_may_not_grow(groups, tmp_path, background):
    directory = tmp_path / "checkpoints"
    older = begin(directory, torch.ones(LARGE), 5, background).finish()
    message = "cannot be written .*File too large.*older"
    with files_end_at(1 << 20), pytest.raises(CheckpointError, match=message):
        begin(directory, torch.zeros(LARGE), 6, background).finish()
    still_there(older, tmp_path)


def still_there(older: Path, run: Path, size: int = LARGE) -> None:
    """The older checkpoint is the latest, whole, and nothing half-written takes up room."""
    assert folders.latest_checkpoint(run) == older
    check_files(older, read_manifest(older))
    assert loaded(older, size)["weight"].eq(1).all()
    assert {path.name for path in older.parent.iterdir()} == {"latest", older.name}
