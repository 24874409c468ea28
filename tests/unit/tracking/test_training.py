"""Real training (tools/pretrain.py) while MLflow is away, slow, or the process is killed.

The speed of the loop is measured in one run while MLflow answers, is slow, and is gone, by turns,
so that whatever else the machine does meets all three alike. What is compared is what a step costs
in processor time, and in time of the training thread without the time it stood in the queue for a
processor (/proc/PID/schedstat): computing, and waiting for anything, MLflow too, but not waiting
for other processes of a busy machine.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from pltmoe.tracking.journal import Journal
from pltmoe.tracking.jsonl import read_jobs, read_lines
from tests.distributed.run_files import make_files, start_ranks
from tests.unit.tracking.conftest import ROOT, Server
from tests.unit.tracking.proxy import Proxy
from tests.unit.tracking.test_delivery import has_run, job, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("mlflow")]
ROUNDS = int(os.environ.get("PLTMOE_FAULT_ROUNDS", "2"))
SLOW_S = 5.0
PHASE_S = SLOW_S + 2.0
PHASE_STEPS = 12
"""A phase lasts until both are over."""
_TICKS = os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def proxy(server: Server):
    proxy = Proxy(server.port)
    yield proxy
    proxy.down()


def train(config: Path, run_dir: Path, uri: str, **settings: object) -> subprocess.Popen[str]:
    """Start a run that logs every step; its output is read away so that it never waits."""
    quiet = {"train__eval_interval": "null", "tracking__system_metrics": "false"}
    settings = quiet | {"checkpoint__save_interval": "null"} | settings
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    overrides += [f"train.output_dir={run_dir}", f"tracking.mlflow_uri={uri}"]
    (process,) = start_ranks(config, *overrides, "tracking.experiment=training")
    process.log = []  # type: ignore[attr-defined]
    threading.Thread(target=lambda: process.log.extend(process.stdout), daemon=True).start()
    return process


def steps_done(run_dir: Path) -> int:
    return max((line["step"] for line in read_lines(run_dir / "metrics.jsonl")), default=0)


def wait_for_step(process: Any, run_dir: Path, step: int) -> None:
    wait_until(lambda: steps_done(run_dir) >= step or process.poll() is not None, 300)
    assert process.poll() is None, "".join(process.log)


def queued_s(pid: int) -> float:
    """Time that the main thread could have run, and others did."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[1]) / 1e9


def processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def points(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    from mlflow.tracking import MlflowClient

    return [(p.step, p.value) for p in MlflowClient(uri).get_metric_history(run_id, key)]


def assert_nothing_is_missing(run_dir: Path, server: Server, run_id: str) -> int:
    lines = list(read_lines(run_dir / "metrics.jsonl"))
    for key in ("train/loss", "optim/grad_norm", "perf/tokens_per_second"):
        expected = [(line["step"], line[key]) for line in lines if key in line]
        assert sorted(points(server.uri, run_id, key)) == expected, key
    return len(lines)


class Watch:
    """What the steps cost in each state of MLflow."""

    def __init__(self, process: Any, run_dir: Path) -> None:
        self._pid, self._run_dir = process.pid, run_dir
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * 4)

    def phase(self, name: str) -> None:
        before = self._counters()
        time.sleep(PHASE_S)
        wait_until(lambda: steps_done(self._run_dir) >= before[0] + PHASE_STEPS)
        passed = [b - a for a, b in zip(before, self._counters(), strict=True)]
        self._sums[name] = [a + b for a, b in zip(self._sums[name], passed, strict=True)]

    def report(self) -> dict[str, dict[str, float]]:
        return {
            name: {
                "steps": steps,
                "wall_ms": round(1e3 * wall / steps, 1),
                "own_ms": round(1e3 * (wall - queued) / steps, 1),
                "processor_ms": round(1e3 * processor / steps, 1),
            }
            for name, (steps, wall, queued, processor) in self._sums.items()
        }

    def _counters(self) -> tuple[float, ...]:
        now = time.monotonic(), queued_s(self._pid), processor_s(self._pid)
        return (steps_done(self._run_dir), *now)


def test_training_is_as_fast_while_mlflow_is_slow_or_gone_and_nothing_is_missing(
    server, proxy, config, tmp_path
):
    """Gone at the start; then by turns there, 5 s a call, gone; gone at the end; sent later."""
    run_dir = tmp_path / "run"
    process = train(
        config, run_dir, proxy.uri, train__steps=100_000, checkpoint__save_interval="null"
    )
    wait_for_step(process, run_dir, 20)
    assert Journal(run_dir).state(proxy.uri) == {}  # MLflow was never there yet
    proxy.up()
    wait_until(lambda: "run_id" in Journal(run_dir).state(proxy.uri))
    run_id = Journal(run_dir).state(proxy.uri)["run_id"]
    watch = Watch(process, run_dir)
    for _ in range(ROUNDS):
        proxy.up()
        watch.phase("there")
        proxy.up(delay_s=SLOW_S)
        watch.phase("slow")
        proxy.down()
        watch.phase("gone")
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert process.wait(180) == 143, "".join(process.log)
    end_s = time.monotonic() - began
    report = watch.report()
    print(json.dumps(report, indent=1), f"slow calls {proxy.slow_calls}, end took {end_s:.1f} s")
    assert proxy.slow_calls >= ROUNDS
    for fault in ("slow", "gone"):  # a loop that waited for MLflow would take 5000 ms a step
        for cost in ("own_ms", "processor_ms"):
            assert report[fault][cost] < 1.5 * report["there"][cost], (fault, cost)

    with Journal(run_dir).lock(wait_s=120.0) as free:  # the sender gives up by itself
        assert free
    proxy.up()
    tool = [sys.executable, "tools/sync_mlflow.py", str(run_dir)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(tool, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Journal(run_dir).state(proxy.uri)["run_id"] == run_id
    lines = assert_nothing_is_missing(run_dir, server, run_id)
    print(f"{lines} lines, all on the server")
    from mlflow.tracking import MlflowClient

    assert MlflowClient(server.uri).get_run(run_id).info.status == "KILLED"


def test_a_killed_run_continues_the_same_mlflow_run_and_ends_finished(server, config, tmp_path):
    """``kill -9`` between two checkpoints, then the same command: same run and steps, FINISHED."""
    from mlflow.tracking import MlflowClient

    client, run_dir = MlflowClient(server.uri), tmp_path / "run"
    settings = {"train__steps": 120, "checkpoint__save_interval": 20}
    first = train(config, run_dir, server.uri, **settings)
    wait_for_step(first, run_dir, 50)
    first.kill()
    first.wait()
    died_at = steps_done(run_dir)
    wait_until(lambda: "run_id" in Journal(run_dir).state(server.uri))
    run_id = Journal(run_dir).state(server.uri)["run_id"]
    wait_until(lambda: client.get_run(run_id).info.status == "FAILED")
    sent = dict(points(server.uri, run_id, "train/loss"))

    second = train(config, run_dir, server.uri, **settings)
    wait_until(lambda: client.get_run(run_id).info.status != "FAILED" or second.poll() is not None)
    assert second.wait(300) == 0, "".join(second.log)
    run = client.get_run(run_id)
    resumed_from = int(run.data.tags["resumed_from_step"])
    assert resumed_from % 20 == 0 and 0 < resumed_from <= died_at
    assert Journal(run_dir).state(server.uri)["run_id"] == run_id
    assert run.info.status == "FINISHED"
    found = points(server.uri, run_id, "train/loss")
    assert sorted(step for step, _ in found) == list(range(1, 121))
    assert sent.items() <= dict(found).items()
    # Steps done again give the same numbers, so what was sent first is also what the file has.
    lines = read_lines(run_dir / "metrics.jsonl")
    assert sorted(found) == [(m["step"], m["train/loss"]) for m in lines if "train/loss" in m]
    assert [job["status"] for job in read_jobs(run_dir)] == ["RUNNING", "FINISHED"]


def test_job_and_sender_killed_together_then_resumed(server, tmp_path):
    """A lost node, or a scheduler that kills all of a job: nobody is left to say FAILED."""
    from mlflow.tracking import MlflowClient

    run_dir = tmp_path / "run"
    first = job(run_dir, server.uri, "--last", 30, "--linger")
    wait_until(lambda: has_run(run_dir, server))
    (sender,) = psutil.Process(first.pid).children()
    first.kill()
    sender.kill()
    first.wait()
    run_id = Journal(run_dir).state(server.uri)["run_id"]
    (run_dir / "mlflow/state.json").write_text('{"torn')  # as a lost machine may leave it
    second = job(run_dir, server.uri, "--resume", 20, "--first", 21, "--last", 40)
    assert second.wait(120) == 0
    assert Journal(run_dir).state(server.uri)["run_id"] == run_id
    assert MlflowClient(server.uri).get_run(run_id).info.status == "FINISHED"
    assert sorted(s for s, _ in points(server.uri, run_id, "train/loss")) == list(range(1, 41))
