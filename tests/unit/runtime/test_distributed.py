"""Start-up from the launcher's environment, in one process."""

import resource

import pytest
import torch

from pltmoe.errors import EngineError, RankError
from pltmoe.runtime import distributed
from pltmoe.runtime.distributed import Processes

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SLURM = {
    "SLURM_JOB_ID": 7,
    "SLURM_PROCID": 5,
    "SLURM_NTASKS": 8,
    "SLURM_LOCALID": 1,
}


@pytest.fixture
def environment(monkeypatch):
    """``environment(RANK=0, WORLD_SIZE=2)``: what a launcher says; nothing of it is set before."""
    for name in (*_VARIABLES, *_SLURM, "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    # Another test may have left this process in a group of one.
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: False)

    def given(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return given


@pytest.fixture
def slurm(environment):
    """A task of a job with 8; the test says of which step."""
    environment(**_SLURM)
    return environment


def test_many_peers_may_be_connected(monkeypatch):
    """The start of a run whose shell allows few open files, and of one that allows many."""
    monkeypatch.setattr(resource, "getrlimit", lambda what: (100, hard))  # of the loop below
    given = []
    monkeypatch.setattr(resource, "setrlimit", lambda what, values: given.append(values))
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *_, **__: None)
    for hard, soft in ((5000, 5000), (10**6, 65536), (resource.RLIM_INFINITY, 65536)):
        distributed.start(Processes(0, 1, 0))
        assert given.pop() == (soft, hard)
    monkeypatch.setattr(resource, "getrlimit", lambda what: (10**5, 10**6))
    distributed.start(Processes(0, 1, 0))
    assert not given


def test_checks_that_lack_a_collective_are_turned_down(monkeypatch, caplog):
    """TORCH_DISTRIBUTED_DEBUG=DETAIL: the first step ended in "does not support reduce_scatter"."""
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *_, **__: None)
    before = distributed.dist.get_debug_level()
    distributed.dist.set_debug_level(distributed.dist.DebugLevel.DETAIL)
    try:
        distributed.start(Processes(0, 1, 0))
        assert distributed.dist.get_debug_level() == distributed.dist.DebugLevel.INFO
    finally:
        distributed.dist.set_debug_level(before)
    assert "DETAIL counts as INFO" in caplog.text


def test_without_a_launcher_one_process_runs_alone(environment):
    assert distributed.processes_from_environment() == Processes(0, 1, 0)
    environment(MASTER_ADDR="127.0.0.1")  # often left over in a shell
    assert distributed.processes_from_environment() == Processes(0, 1, 0)


def test_the_launcher_says_who_is_who(environment):
    environment(RANK=5, WORLD_SIZE=8, LOCAL_RANK=1, MASTER_ADDR="a", MASTER_PORT=1)
    assert distributed.processes_from_environment() == Processes(5, 8, 1)


def test_a_task_of_srun_takes_its_rank_from_slurm(slurm):
    slurm(SLURM_STEP_ID=0, MASTER_ADDR="node1", MASTER_PORT=20007)
    assert distributed.processes_from_environment() == Processes(5, 8, 1)
    assert not distributed.is_main()
    slurm(SLURM_STEP_NUM_TASKS=6)  # a step smaller than the job
    assert distributed.processes_from_environment() == Processes(5, 6, 1)


def test_torchrun_inside_a_step_is_believed(slurm):
    slurm(SLURM_STEP_ID=0)
    slurm(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="a", MASTER_PORT=1)
    assert distributed.processes_from_environment() == Processes(0, 2, 0)
    assert distributed.is_main()


@pytest.mark.parametrize("step", [None, "4294967291", "4294967290"], ids=["old", "batch", "salloc"])
def test_a_batch_script_or_shell_in_an_allocation_runs_alone(slurm, step):
    if step:
        slurm(SLURM_STEP_ID=step)
    assert distributed.processes_from_environment() == Processes(0, 1, 0)
    assert distributed.is_main()


def test_srun_without_an_address_is_an_error(slurm):
    slurm(SLURM_STEP_ID=0, MASTER_ADDR="node1")
    with pytest.raises(EngineError, match="srun started 8 tasks without MASTER_PORT"):
        distributed.processes_from_environment()
    slurm(SLURM_NTASKS=1, SLURM_PROCID=0, SLURM_LOCALID=0)
    assert distributed.processes_from_environment() == Processes(0, 1, 0)


def test_half_an_environment_is_an_error(environment):
    environment(RANK=0, WORLD_SIZE=2)
    with pytest.raises(EngineError, match="has RANK, WORLD_SIZE but not MASTER_ADDR, MASTER_PORT"):
        distributed.processes_from_environment()


def test_a_rank_that_is_no_number_is_an_error(environment):
    environment(WORLD_SIZE=2, MASTER_ADDR="a", MASTER_PORT=2, RANK="first")
    with pytest.raises(EngineError, match="RANK is 'first', expected a number"):
        distributed.processes_from_environment()


@pytest.mark.parametrize(
    ("rank", "world_size", "port", "said"),
    [
        (5, 2, "29500", "RANK is 5, of WORLD_SIZE 2"),  # it waited half an hour for the others
        (0, 0, "29500", "RANK is 0, of WORLD_SIZE 0"),
        (0, 2, "99999", "MASTER_PORT is 99999, expected 1"),
        (0, 2, "any", "MASTER_PORT is 'any', expected a number"),
    ],
)
def test_numbers_that_cannot_be_are_an_error(environment, rank, world_size, port, said):
    environment(RANK=rank, WORLD_SIZE=world_size, MASTER_ADDR="a", MASTER_PORT=port)
    with pytest.raises(EngineError, match=said):
        distributed.processes_from_environment()


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RankError, match="local rank 1 has no GPU: this machine has 1; .* 1 or le"):
        distributed.start(Processes(rank=1, world_size=2, local_rank=1))


def test_who_speaks_before_the_processes_have_met(environment):
    """The first of each machine, whoever has an error of its own, all in a broken environment."""
    environment(WORLD_SIZE=4, MASTER_ADDR="a", MASTER_PORT=4)
    spoken = {}
    for rank, local_rank in ((0, 0), (1, 1), (2, 0), (3, 1)):
        environment(RANK=rank, LOCAL_RANK=local_rank)
        errors = EngineError("all alike"), RankError("this one")
        spoken[rank] = [distributed.speaks_for_error(error) for error in errors]
    assert spoken == {0: [True, True], 1: [False, True], 2: [True, True], 3: [False, True]}
    environment(LOCAL_RANK="second")
    assert distributed.speaks_for_error(EngineError("LOCAL_RANK is 'second'"))
