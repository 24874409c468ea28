"""Samples the machine with MLflow's own monitors into system_metrics.jsonl.

MLflow's ready-made monitor stops for good at the first request that fails, and what it sampled is
gone. Written to a file first, samples survive an outage as the other metrics do.
"""

import importlib.util
import logging
import os
import threading
import time
from pathlib import Path

from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor

from pltmoe.tracking.jsonl import encode_line, last_lines

_INTERVAL = "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"
_DEFAULT_INTERVAL_S = 10.0

log = logging.getLogger(__name__)


class SystemSampler(threading.Thread):
    """Appends one line of ``system/...`` metrics every few seconds until stopped.

    The interval follows MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL. Steps count samples, and go on
    counting where an earlier job of the same run stopped.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(name="system-metrics", daemon=True)
        self._path = path
        self._stop_event = threading.Event()
        self._interval_s = _interval_s()
        self._next_step = 1 + max((line["step"] for line in last_lines(path)), default=-1)

    def run(self) -> None:
        """Sample until ``stop``."""
        monitors = available_monitors()
        if not monitors:
            return
        _sample(monitors)  # the first CPU reading has nothing to compare with
        with self._path.open("a", encoding="utf-8") as file:
            while not self._stop_event.wait(self._interval_s):
                values = {f"system/{key}": value for key, value in _sample(monitors).items()}
                line = {"step": self._next_step, "time": round(time.time(), 3)} | values
                file.write(encode_line(line))
                file.flush()
                self._next_step += 1

    def stop(self) -> None:
        """End the thread."""
        self._stop_event.set()


def _interval_s() -> float:
    setting = os.environ.get(_INTERVAL) or _DEFAULT_INTERVAL_S
    try:
        if 0 < (seconds := float(setting)) < threading.TIMEOUT_MAX:
            return seconds
    except ValueError:
        pass
    log.warning("%s is %r, no time in seconds: %g s is taken", _INTERVAL, setting,
                _DEFAULT_INTERVAL_S)  # fmt: skip
    return _DEFAULT_INTERVAL_S


def available_monitors() -> list[BaseMetricsMonitor]:
    """Return MLflow's monitors for what this machine has; none without psutil."""
    if importlib.util.find_spec("psutil") is None:
        log.warning("no system metrics: psutil is not installed")
        return []
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    if has_nvidia_gpu():
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

        monitors.append(GPUMonitor())
    return monitors


def has_nvidia_gpu() -> bool:
    """Whether NVML is installed, loads, and sees a GPU."""
    if importlib.util.find_spec("pynvml") is None:
        return False
    import pynvml

    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetCount() > 0
    except pynvml.NVMLError:
        return False


def _sample(monitors: list[BaseMetricsMonitor]) -> dict[str, float]:
    values: dict[str, float] = {}
    for monitor in monitors:
        monitor.collect_metrics()
        values |= monitor.aggregate_metrics()
        monitor.clear_metrics()
    return values
