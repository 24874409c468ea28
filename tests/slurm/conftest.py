"""One real Slurm cluster and one tiny run's files for all tests of this folder."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pltmoe.tracking.legs import BRANCHES_TAG
from tests.repository import REPOSITORY
from tests.slurm.cluster import Cluster, wait_until, why_not

PATIENCE_S = 400.0
"""For anything that a started job does: importing torch on four ranks of a busy core is slow."""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Five nodes with 8 pretended GPUs each."""
    if reason := why_not():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm_", dir="/tmp"))  # short: it holds a socket
    running = Cluster(folder, nodes=5)
    try:
        running.start()
        yield running
    finally:
        running.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpus, tokenizer and configuration of a tiny run; returns the YAML file."""
    from tests.distributed.run_files import make_files  # imports Megatron: not for those who skip

    return make_files(tmp_path_factory.mktemp("files"))


class Site:
    """What a user of the cluster has: the repository, a folder, an MLflow store, a shell."""

    def __init__(self, cluster: Cluster, files: Path, folder: Path):
        self.cluster, self.files, self.folder = cluster, files, folder
        self.store = f"sqlite:///{folder}/mlflow.db"
        self.mlflow_runs()  # makes the store: two jobs that do so at once get in each other's way
        self.environment = {
            **cluster.environment,
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            # Job numbers begin at 1, so another cluster on this machine would take the same ports.
            "PORT_BASE": str(10_000 + os.getpid() % 20_000),
            "MAX_CRASH_RESTARTS": "0",
            "NODES": "1",
            "GPUS_PER_NODE": "1",
            "SBATCH_OUTPUT": str(folder / "job-%j.out"),
        }

    def config(self, name: str, **train: object) -> Path:
        """Write the configuration of a run that reports to the store; its folder is ``name``."""
        tree = yaml.safe_load(self.files.read_text())
        tree["name"] = name
        tree["train"] |= {"output_dir": str(self.folder / name), **train}
        tree["train"]["eval_interval"] = None
        tree["optimizer"]["decay_steps"] = 1_000_000
        tree["checkpoint"]["save_interval"] = 5
        tree["tracking"] = {"mlflow_uri": self.store, "system_metrics": False}
        path = self.folder / f"{name}.yaml"
        path.with_suffix(".part").write_text(yaml.safe_dump(tree))
        os.replace(path.with_suffix(".part"), path)
        return path

    def submit(self, script: str, *arguments: str, **environment: object) -> str:
        """``bash slurm/SCRIPT ARGUMENTS``; returns the number of the job."""
        done = self.shell("bash", f"slurm/{script}", *arguments, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def shell(self, *command: str, **environment: object) -> subprocess.CompletedProcess[str]:
        """Run a command in the repository as a user of the cluster would."""
        added = {name: str(value) for name, value in environment.items()}
        return subprocess.run(command, cwd=REPOSITORY, text=True, capture_output=True,
                              env=self.environment | added)  # fmt: skip

    def log(self, job: str) -> str:
        """What a job has printed so far."""
        path = self.folder / f"job-{job}.out"
        return path.read_text() if path.exists() else ""

    def rank_log(self, name: str, leg: int, rank: int = 0) -> str:
        """The log of one rank of a leg of the only job of a run."""
        paths = [*(self.folder / name / "logs").glob(f"job_*/leg_{leg}/rank_{rank}.log")]
        return paths[0].read_text() if paths else ""

    def wait_for_step(self, name: str, leg: int) -> int:
        """Wait until a leg has taken three steps; returns the last step seen."""

        def steps() -> list[str]:
            assert "giving up" not in self.logs(), self.logs()
            return re.findall(r" step (\d+)/", self.rank_log(name, leg))

        wait_until(lambda: len(steps()) >= 3, PATIENCE_S, f"{name} leg {leg} takes steps",
                   lambda: self.logs())  # fmt: skip
        return int(steps()[-1])

    def ended(self, job: str, *states: str) -> dict[str, str]:
        """Wait for the end of a job; anything but one of ``states`` fails with the logs."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
        found = self.cluster.wait_for(job, *ends, timeout_s=PATIENCE_S)
        assert found["JobState"] in states, f"{found['JobState']}\n{self.logs()}"
        return found

    def logs(self) -> str:
        """Everything that the jobs of this site printed."""
        return "\n".join(f"{p.name}\n{p.read_text()[-6000:]}" for p in self.folder.glob("job-*"))

    def mlflow_runs(self) -> dict[str, tuple[str, list[int]]]:
        """Runs in the store: name -> (status, steps of train/loss, sorted, of no branch given up).

        A leg that crashed may have sent steps which the next one, with other settings, did again.
        """
        from mlflow import MlflowClient

        client = MlflowClient(self.store)
        runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
        names = [run.info.run_name for run in runs]
        assert len(names) == len(set(names)), f"a run was begun twice: {names}"
        found = {}
        for run in runs:
            points = client.get_metric_history(run.info.run_id, "train/loss")
            for time_s, step in json.loads(run.data.tags.get(BRANCHES_TAG, "[]")):
                points = [m for m in points if m.step <= step or m.timestamp >= 1000 * time_s]
            found[run.info.run_name] = (run.info.status, sorted(m.step for m in points))
        return found


@pytest.fixture(scope="module")
def site(cluster: Cluster, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A folder and an MLflow store of its own for each test module."""
    yield Site(cluster, files, tmp_path_factory.mktemp("site"))
    cluster.run("scancel", "--user=root", check=False)
    time.sleep(1)
