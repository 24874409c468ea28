"""A job to be stopped: tracks steps as a trainer does. Run as a process of its own by tests."""

import argparse
import json
import logging
import signal
import sys
import time
from pathlib import Path

from pltmoe.config import write_config
from pltmoe.tracking import EndStatus, build_tracker
from pltmoe.tracking.jsonl import SYSTEM_METRICS_FILE, read_lines
from tests.unit.tracking.runs import metrics_of, run_config


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--uri")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--last", type=int, default=20)
    parser.add_argument("--resume", type=int)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds per step")
    parser.add_argument("--raise-at", type=int)
    parser.add_argument("--linger", action="store_true", help="wait for a signal at the end")
    parser.add_argument("--system-metrics", action="store_true", help="ends after the first")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    args.run_dir.mkdir(parents=True, exist_ok=True)
    extra = {"tracking__system_metrics": args.system_metrics}
    config = run_config(args.run_dir, args.uri, model__num_loops=2, **extra)
    write_config(config, args.run_dir / "config.yaml")
    tracker = build_tracker(config, args.run_dir, lambda step: step * 8 * 128)
    tracker.start({"commit": "0123abc", "layout": "EP2 x DP1"}, resume_step=args.resume)
    slowest_ms = 0.0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    status: EndStatus = "FAILED"
    try:
        for step in range(args.first, args.last + 1):
            began = time.perf_counter()
            tracker.log(step, metrics_of(step, config))
            slowest_ms = max(slowest_ms, 1e3 * (time.perf_counter() - began))
            if step == args.raise_at:
                raise RuntimeError("the step went wrong")
            time.sleep(args.pause)
        (args.run_dir / "slowest.json").write_text(json.dumps(slowest_ms))
        if args.linger:
            time.sleep(120)
        until = time.monotonic() + 60
        while args.system_metrics and not any(read_lines(args.run_dir / SYSTEM_METRICS_FILE)):
            assert time.monotonic() < until, "no system metrics"
            time.sleep(0.1)
        status = "FINISHED"
    except SystemExit:
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)


if __name__ == "__main__":
    main()
