"""The pretraining scripts on a real Slurm: legs, signals, crashes, lost nodes, arrays, refusals."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from pltmoe.runtime.heartbeat import HANG_EXIT_CODE, RANKS_BEHIND
from tests.repository import REPOSITORY
from tests.slurm.cluster import wait_until
from tests.slurm.conftest import PATIENCE_S, Site

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("slurm")]
LONG = 1_000_000
"""Steps of a run that a test ends in its own time."""


def pid_of(site: Site, name: str, rank: int) -> int:
    """The Python process of a rank, found by its environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if f"SLURM_PROCID={rank}".encode() in environment and (
            f"{site.folder}/{name}.yaml".encode() in command and b"task.sh" not in command
        ):
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")


def test_legs_of_one_run_signal_crash_and_end(site):
    """2 nodes x 2 tasks: stopped before the limit, resumed, a rank killed, resumed elsewhere."""
    config = site.config("legs", steps=LONG)
    job = site.submit(
        "pretrain_plt_moe.sh", "parallel.expert_parallel_size=2",
        CONFIG=config, NODES=2, GPUS_PER_NODE=2, MAX_CRASH_RESTARTS=1,
    )  # fmt: skip
    first = site.wait_for_step("legs", leg=0)
    # To the batch script alone, as Slurm does it for --signal=B:USR1@300.
    site.cluster.run("scancel", "--batch", "--signal=USR1", job)
    site.wait_for_step("legs", leg=1)
    assert "stopped with work left: requeueing job" in site.log(job)
    stopped = int(re.search(r"stopped at step (\d+)", site.rank_log("legs", 0))[1])
    assert stopped >= first
    assert re.search(rf"resumed from \S+ \(step {stopped}\)", site.rank_log("legs", 1))

    last = stopped + 30
    os.kill(pid_of(site, "legs", 3), signal.SIGSTOP)  # the others wait for it in their next step
    killed_after = int(re.findall(r" step (\d+)/", site.rank_log("legs", 1))[-1])
    site.config("legs", steps=max(last, killed_after + 10))
    os.kill(pid_of(site, "legs", 3), signal.SIGKILL)
    found = site.ended(job, "COMPLETED")
    log = site.log(job)
    assert "rank 3 on node2 ended first, with exit code 137" in log, log
    assert found["Restarts"] == "2" and found["ExcNodeList"] == "node2"
    assert "node2" not in found["NodeList"] and found["ExitCode"] == "0:0"
    for leg in range(3):
        for rank in range(4):
            assert f"rank {rank} on node" in site.rank_log("legs", leg, rank)
    status, steps = site.mlflow_runs()["legs"]
    assert status == "FINISHED"
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= last


def test_a_request_requeues_and_a_cancel_does_not(site):
    config = site.config("asked", steps=LONG)
    # Signals reach every process of a rank: its loader must not die of them, nor MLflow's sender.
    job = site.submit("pretrain_vanilla_moe.sh", "data.num_workers=1", CONFIG=config)
    site.wait_for_step("asked", leg=0)
    site.cluster.run("scancel", "--signal=TERM", job)  # to the ranks alone
    site.wait_for_step("asked", leg=1)
    site.cluster.run("scancel", job)
    found = site.ended(job, "CANCELLED")
    assert found["Restarts"] == "1"
    log = site.rank_log("asked", 1)
    assert "SIGTERM: finishing this step, then saving and stopping" in log
    # What follows the checkpoint may be cut short: Slurm kills after KillWait.
    wait_until(lambda: "saved" in site.rank_log("asked", 1).split("SIGTERM")[1], 10, "saved",
               site.logs)  # fmt: skip
    assert site.rank_log("asked", leg=2) == ""


def test_a_node_that_is_gone_costs_a_restart(site):
    """The survivors fail because of it, but it is the lost node that is named and left out."""
    config = site.config("lost", steps=LONG)
    job = site.submit("pretrain_plt_moe.sh", CONFIG=config, NODES=2, MAX_CRASH_RESTARTS=1)
    site.wait_for_step("lost", leg=0)
    wait_until(lambda: any((site.folder / "lost" / "checkpoints").glob("step_*")), PATIENCE_S,
               "a checkpoint", site.logs)  # fmt: skip
    nodes = site.cluster.run("scontrol", "show", "hostnames", site.cluster.job(job)["NodeList"])
    site.config("lost", steps=12)
    number = int(nodes.split()[1].removeprefix("node"))
    site.cluster.power_off(number)
    try:
        found = site.ended(job, "COMPLETED")
        log = site.log(job)
        assert found["Restarts"] == "1" and "resumed from" in log, log
        if f"Node failure on node{number}" in log:  # on a busy core Slurm finds out first
            assert "the job was cancelled or preempted: what follows is Slurm's" in log
        else:
            assert f"node{number} does not answer or does not see {REPOSITORY}: lost" in log, log
            assert found["ExcNodeList"] == f"node{number}"
    finally:
        site.cluster.start_node(number)


def test_crashes_in_a_row_have_an_end_and_exclude_who_is_to_blame(site):
    """A hang, a node that does not see the files, a stop before the first step, a crash; the end.

    Submitted from a shell in a task of another array, whose variables say nothing of this job.
    """
    broken = site.folder / "python"
    logs = site.folder / "crashing" / "logs"
    broken.write_text(
        "#!/bin/sh\n"
        'case "$SLURM_RESTART_COUNT $SLURM_PROCID $*" in\n'
        "*--print* | *tools/plan.py* | *import*) ;;\n"
        f"' 0 '*) echo 1 >{logs}/{RANKS_BEHIND}; exit {HANG_EXIT_CODE} ;;\n"
        f"' 1 '*) sleep 2; exit {HANG_EXIT_CODE} ;;\n"  # who is behind ends last
        "'1 '*) sleep 3; exit 1 ;;\n"  # because of the other node
        "'2 '*) exit 143 ;;\n"  # asked to stop, and no checkpoint
        "*) echo no such GPU; exit 1 ;;\n"
        "esac\n"
        f'exec {site.environment["PYTHON"]} "$@"\n'
    )
    broken.chmod(0o755)
    config = site.config("crashing", steps=LONG)
    wait_until(lambda: site.cluster.idle() == 5, 60, "all nodes idle", site.cluster.logs)
    site.cluster.run("scontrol", "update", "NodeName=node[4-5]", "State=DRAIN", "Reason=test")
    another = {"ENVIRONMENT": "BATCH", "SLURM_JOB_ID": 999, "SLURM_ARRAY_JOB_ID": 999}
    try:
        with site.cluster.hidden(3, REPOSITORY):
            job = site.submit("pretrain_plt_moe.sh", CONFIG=config, PYTHON=broken, NODES=2,
                              MAX_CRASH_RESTARTS=3, SLURM_ARRAY_TASK_ID=7, **another)  # fmt: skip
            wait_until(lambda: "stays allowed" in site.log(job), PATIENCE_S, "2 legs", site.logs)
        found = site.ended(job, "FAILED")
    finally:
        site.cluster.run("scontrol", "update", "NodeName=node[4-5]", "State=RESUME")
    log = site.log(job)
    assert (found["Restarts"], found["ExitCode"]) == ("3", "1:0"), log
    assert f"rank 0 on node1 ended first, with exit code {HANG_EXIT_CODE}" in log
    assert "a hang; behind were: rank 1 on node2" in log and "excluded node2\n" in log, log
    assert f"node3 does not answer or does not see {REPOSITORY}: lost" in log, log
    assert "too few other nodes in debug: node3 stays allowed" in log, log  # others are drained
    assert found["ExcNodeList"] == "node2"
    assert re.search(r"rank [01] on node[13] ended first, with exit code 1;", log), log
    assert "no such GPU" in log
    assert "asked to stop before the first step: a time limit has to be longer" in log, log
    assert "crash 3 since checkpoint none: requeueing" in log, log
    assert "MAX_CRASH_RESTARTS is 3: giving up" in log


def test_the_array_trains_one_row_per_task(site):
    for number in range(1, 8):
        site.config(f"row{number}_x", steps=6)
    job = site.submit("ablation.sh", ABLATION=site.folder, SBATCH_ARRAY_INX="2,7")
    for task in (2, 7):
        site.ended(f"{job}_{task}", "COMPLETED")
    runs = site.mlflow_runs()
    for task in (2, 7):
        assert runs[f"row{task}_x"] == ("FINISHED", [1, 2, 3, 4, 5, 6])
    assert "row1_x" not in runs


def test_what_cannot_fit_is_refused_before_it_is_queued(site):
    done = site.shell("bash", "slurm/pretrain_vanilla_moe.sh", NODES=1, GPUS_PER_NODE=8)
    assert done.returncode == 2 and done.stdout == ""
    assert "does not fit on 8 x H200" in done.stderr and "stage 0 needs 153" in done.stderr
    assert site.cluster.run("squeue", "--noheader", "--name=vanilla-2.5b-60b") == ""


def test_data_that_are_missing_are_refused_before_they_are_queued(site):
    config = site.config("nodata", steps=6)
    missing = f"data.train=[{{path: {site.folder}/nowhere}}]"
    done = site.shell("bash", "slurm/pretrain_plt_moe.sh", missing, CONFIG=config)
    assert done.returncode == 2 and done.stdout == ""
    assert f"no such file: {site.folder}/nowhere.bin (data.train), " in done.stderr
    assert "CHECK_DATA=no submits from a machine that does not see" in done.stderr


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("5", "a time limit of 5 leaves no time to train: Slurm sends --signal=B:USR1@300 up to"),
        ("00:06:00", "a time limit of 00:06:00 leaves no time"),
        ("0-0:06", "a time limit of 0-0:06 leaves no time"),
        ("08:09", "does not fit on 8 x H200"),
        ("1-0", "does not fit on 8 x H200"),
        ("UNLIMITED", "does not fit on 8 x H200"),
    ],
)
def test_a_time_limit_must_be_longer_than_the_signal_before_it(site, limit, message):
    signal = {"SBATCH_SIGNAL": "B:USR1@0300"} if ":" in limit else {}
    done = site.shell("bash", "slurm/pretrain_vanilla_moe.sh", NODES=1, GPUS_PER_NODE=8,
                      SBATCH_TIMELIMIT=limit, **signal)  # fmt: skip
    assert done.returncode == 2 and message in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("options", "overrides", "message"),
    [
        (("--time=5",), (), "a time limit of 5:00 leaves no time to train"),
        ((), (), "does not fit on 8 x H200"),
        (("--nodes=2",), ("train.stepz=3",), "train.stepz: unknown key"),
    ],
)
def test_a_plain_sbatch_is_refused_as_its_first_act(site, options, overrides, message):
    """The same check inside the job: ended, not requeued, before any rank was started."""
    sizes = ("--nodes=1", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=1")
    done = site.shell("sbatch", "--parsable", *sizes, *options, "slurm/pretrain_vanilla_moe.sh",
                      *overrides, CONFIG="configs/vanilla_2.5b_60b.yaml")  # fmt: skip
    found = site.ended(done.stdout.strip(), "FAILED")
    assert (found["ExitCode"], found["Restarts"]) == ("2:0", "0")
    assert message in site.log(done.stdout.strip())


def test_the_body_of_the_scripts_is_none_itself(tmp_path):
    """It was submitted, unchecked and without nodes."""
    command = ["bash", "slurm/pretrain.sh"]
    environment = os.environ | {"SLURM_CONF": str(tmp_path / "none")}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "pretrain.sh is what others source: run slurm/" in done.stderr


def test_scripts_pass_shellcheck():
    try:
        done = subprocess.run(["shellcheck", "-x", *map(str, sorted(Path("slurm").glob("*.sh")))],
                              capture_output=True, text=True)  # fmt: skip
    except FileNotFoundError:
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    assert done.returncode == 0, done.stdout
