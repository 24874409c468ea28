"""A second job on the same folder waits, then says who has it; a job that is gone holds nothing."""

import subprocess
import sys
import time

import pytest

from pltmoe.errors import CheckpointError
from pltmoe.runtime import distributed
from pltmoe.train import ownership

OTHER_JOB = """
import sys
from pathlib import Path
from pltmoe.train import ownership
ownership.main_only = lambda action: action()
with ownership.run_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 1)


@pytest.fixture
def other_job(tmp_path):
    command = [sys.executable, "-c", OTHER_JOB, str(tmp_path)]
    job = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert job.stdout.readline() == "held\n"
    yield job
    job.kill()
    job.communicate()


def test_a_second_job_is_refused_with_the_name_of_the_first(other_job, tmp_path, caplog):
    began = time.monotonic()
    with (
        pytest.raises(CheckpointError, match="is in use by another job") as error,
        ownership.run_folder(tmp_path, patience_s=1.2),
    ):
        raise AssertionError("two jobs hold it")
    assert 1.0 < time.monotonic() - began < 30
    assert f"(process {other_job.pid} on " in str(error.value)
    assert caplog.text.count("waiting for another job on") == 1


def test_a_killed_job_leaves_the_folder_to_the_next_one_that_waits(other_job, tmp_path):
    other_job.kill()
    with ownership.run_folder(tmp_path, patience_s=60):
        assert (tmp_path / ".in_use").read_text().startswith("process ")
    with ownership.run_folder(tmp_path, patience_s=0):
        pass  # given back


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, caplog):
    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(ownership.fcntl, "lockf", none)
    with ownership.run_folder(tmp_path):
        assert "cannot be locked (Operation not supported): start no second job" in caplog.text
