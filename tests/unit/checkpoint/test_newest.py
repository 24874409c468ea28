"""A damaged checkpoint is found before it is loaded, and the one before takes its place."""

import json
import os
import random
import tracemalloc

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from pltmoe.checkpoint import folders, store
from pltmoe.checkpoint.integrity import check_files, checksum
from pltmoe.checkpoint.manifest import Manifest, read_manifest
from pltmoe.checkpoint.newest import leave_later, newest_intact
from pltmoe.errors import CheckpointError, DamagedCheckpointError
from pltmoe.runtime.tokenizer_files import read_tokenizer
from tests.distributed.tiny import tiny_config


@pytest.fixture
def run(groups, tmp_path):
    """A run with checkpoints of steps 5, 6 and 7."""
    tokenizer = tmp_path / "some.model"
    tokenizer.write_bytes(b"pieces")
    for step in (5, 6, 7):
        state = {"weight": ShardedTensor.from_rank_offsets("model.weight", torch.full((9,), step))}
        manifest = Manifest(config=tiny_config(), step=step)
        store.begin_save(
            tmp_path / "checkpoints", state, manifest, read_tokenizer(tokenizer)
        ).finish()
    return tmp_path


def folder(run, step: int):
    return run / "checkpoints" / folders.step_folder(step)


def flip_bit(path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position // 8] ^= 1 << position % 8
    path.write_bytes(data)


def test_an_intact_one_is_taken_without_a_word(run, caplog):
    found, manifest = newest_intact(run, verify=True)
    assert (found, manifest.step) == (folder(run, 7), 7)
    assert not caplog.records


def test_no_run_has_no_checkpoint(groups, tmp_path):
    assert newest_intact(tmp_path, verify=True) is None


def test_a_flipped_bit_anywhere_is_found(run):
    """Every file of a checkpoint, 20 random bits of each."""
    bits = random.Random(3)
    names = {path.name for path in folder(run, 7).iterdir()}
    assert {"__0_0.distcp", ".metadata", "tokenizer.model", "manifest.json"} <= names
    for name in sorted(names):
        path = folder(run, 7) / name
        good = path.read_bytes()
        for _ in range(20):
            flip_bit(path, bits.randrange(8 * len(good)))
            with pytest.raises(DamagedCheckpointError):
                check_files(path.parent, read_manifest(path.parent))
            path.write_bytes(good)
    check_files(folder(run, 7), read_manifest(folder(run, 7)))


def test_the_run_goes_on_from_the_one_before_and_says_why(run, caplog):
    flip_bit(folder(run, 7) / "__0_0.distcp", 700)
    found, manifest = newest_intact(run, verify=True)
    assert (found, manifest.step) == (folder(run, 6), 6)
    said = [record.message for record in caplog.records]
    assert len(said) == 2 and all(record.levelname == "WARNING" for record in caplog.records)
    assert said[0] == (
        f"{folder(run, 7)}: __0_0.distcp has changed since it was written: the checkpoint is "
        "damaged; resume from another one"
    )
    assert said[1] == f"going on from {folder(run, 6)}, the newest checkpoint that is intact"
    assert (run / "checkpoints/latest").read_text() == "step_00000006\n"
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"latest", "step_00000005", "step_00000006", "damaged_step_00000007"}
    assert newest_intact(run, verify=True)[0] == folder(run, 6)


def truncate(path):
    os.truncate(path / "__0_0.distcp", 40)


def delete(path):
    (path / ".metadata").unlink()


def spoil_manifest(path):
    (path / "manifest.json").write_text("{")


@pytest.mark.parametrize("damage", [truncate, delete, spoil_manifest])
def test_other_damage_and_two_in_a_row(run, caplog, damage):
    damage(folder(run, 7))
    damage(folder(run, 6))
    assert newest_intact(run, verify=False)[0] == folder(run, 5)
    assert len(caplog.records) == 3


def test_none_is_left(run):
    before = {}
    for step in (5, 6, 7):
        truncate(folder(run, step))
        before |= {path: path.stat().st_size for path in folder(run, step).iterdir()}
    with pytest.raises(CheckpointError, match="no checkpoint is intact .*step_00000007.*_00000005"):
        newest_intact(run, verify=True)
    assert all(path.stat().st_size == size for path, size in before.items()), "left as they are"


def test_checkpoints_from_before_there_were_checksums(run):
    path = folder(run, 7) / "manifest.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in tree.items() if k in ("config", "step", "files")}))
    flip_bit(folder(run, 7) / "__0_0.distcp", 700)
    assert newest_intact(run, verify=True)[1].step == 7, "sizes only"
    truncate(folder(run, 7))
    assert newest_intact(run, verify=True)[1].step == 6


def test_a_branch_that_was_left_is_kept_and_not_counted(run, caplog, monkeypatch):
    """The run goes back to step 5 and saves at other steps, which is then all that it has."""
    for _ in range(2):
        if not folder(run, 6).exists():
            os.rename(run / "checkpoints" / "left_step_00000006", folder(run, 6))
            (run / "checkpoints" / "left_step_00000006").mkdir()
        folders.point_to(folder(run, 5))
        leave_later(folder(run, 5))
        assert folders.complete_checkpoints(run / "checkpoints") == [folder(run, 5)]
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert {"left_step_00000006_2", "left_step_00000007", "step_00000005", "latest"} <= names
    assert "going on from" in caplog.text and "is now left_step_00000007" in caplog.text
    os.rename(run / "checkpoints" / "left_step_00000007", folder(run, 7))
    monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only")))
    with pytest.raises(CheckpointError, match="step_00000007 cannot be renamed: Read-only"):
        leave_later(folder(run, 5))


def test_checks_can_be_turned_off(run):
    flip_bit(folder(run, 7) / "__0_0.distcp", 700)
    assert newest_intact(run, verify=False)[1].step == 7


def test_a_newer_format_is_not_taken_for_damage(run):
    path = folder(run, 7) / "manifest.json"
    tree = json.loads(path.read_text()) | {"format": 2}
    del tree["manifest_sha256"]
    path.write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match="format 2 is newer than this pltmoe reads"):
        newest_intact(run, verify=True)
    assert folder(run, 7).is_dir()


def test_a_file_that_cannot_be_read(run):
    manifest = read_manifest(folder(run, 7))
    (folder(run, 7) / ".metadata").unlink()
    with pytest.raises(DamagedCheckpointError, match=".metadata cannot be read .No such file"):
        check_files(folder(run, 7), manifest)


def test_a_checksum_is_that_of_the_whole_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(20 << 20))
    before = checksum(path)
    flip_bit(path, (19 << 23) + 5)
    assert before.startswith("xxh3_128:") and checksum(path) != before
    (tmp_path / "empty").write_bytes(b"")
    assert checksum(tmp_path / "empty") == "xxh3_128:99aa06d3014798d86001c324468d497f"


def test_a_checksum_needs_little_memory(tmp_path):
    """Each save's thread leaves its buffer in another arena of malloc: 8 MiB made 130 of them."""
    path = tmp_path / "file"
    path.write_bytes(bytes(20 << 20))
    tracemalloc.start()
    checksum(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20
