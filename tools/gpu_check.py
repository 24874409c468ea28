"""Check on a GPU what continuous integration cannot: tests/gpu and every benchmark, part by part.

    python tools/gpu_check.py                      all parts that this commit has not passed yet
    python tools/gpu_check.py --parts tests,speed  two parts
    python tools/gpu_check.py --minutes 9.5        as many as there is time for
    python tools/gpu_check.py --again              also those that were done

Every part takes less than ten minutes and remembers its result in --work, so a machine that is
lent for a short while can do them one after another; those that tell most come first. After each,
the pages docs/gpu_results.md and docs/profile.md and the picture docs/gpu_learning.png are made
from what was measured; a part that was not run is said to be not run.
"""

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from pltmoe.reports import gpu_tables, learning
from pltmoe.reports.gpu_parts import (
    LAST_DECODING,
    LEARN_STEPS,
    LEARNING,
    MODELS,
    PARTS,
    PROFILES,
    RECIPES,
    Part,
    decode_folder,
)

REPOSITORY = Path(__file__).resolve().parents[1]
LIMIT_S = 540
"""Of a part."""
LEAST_S = 60
"""No part is begun with less time than this."""


def main() -> int:
    """Run the parts, then write the page; the exit code is 1 if a part failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", default=",".join(names), help=f"of {','.join(names)}")
    parser.add_argument("--again", action="store_true", help="run parts that were done, too")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end after so many")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "runs" / "gpu_check")
    parser.add_argument("--page", type=Path, default=REPOSITORY / "docs" / "gpu_results.md")
    args = parser.parse_args()
    if unknown := sorted(set(args.parts.split(",")) - set(names)):
        parser.error(f"unknown part {unknown[0]}; there are {', '.join(names)}")
    deadline = time.monotonic() + 60 * args.minutes
    import torch

    from pltmoe.runtime.versions import commit, versions

    if not torch.cuda.is_available():
        print("error: gpu_check needs an NVIDIA GPU (torch.cuda.is_available() is false)")
        return 2
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    installed = ", ".join(f"{name} {version}" for name, version in versions().items())
    where = {
        "device": f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})",
        "versions": installed,
        "commit": commit(),
    }
    if where["commit"] == "unknown":
        print(
            "[gpu_check] no git repository here, so no part counts as done already; "
            "PLTMOE_COMMIT may say which commit this is"
        )
    for part in PARTS:
        if part.name not in args.parts.split(","):
            continue
        left = deadline - time.monotonic()
        if left < LEAST_S:
            print(f"[gpu_check] {part.name} and what follows: no time left")
            break
        _run_part(part, args.work, where, args.again, min(LIMIT_S, left))
        _write_pages(args.work, args.page)
    results = [_read(args.work, part) for part in PARTS]
    return int(any(result and not result["passed"] for result in results))


def _run_part(
    part: Part, work: Path, where: dict[str, Any], again: bool, limit_s: float = LIMIT_S
) -> None:
    if _is_done(part, work, where["commit"]) and not again:
        print(f"[gpu_check] {part.name}: done already for {where['commit']}")
        return
    print(f"[gpu_check] {part.name}: {part.what}", flush=True)
    started, output, failure = time.monotonic(), "", ""
    with (work / f"{part.name}.log").open("w") as log:
        for command in part.commands:
            left = limit_s - (time.monotonic() - started)
            code, text = _run(command.format(python=shlex.quote(sys.executable)), work, left, log)
            output += text
            if code != 0:
                failure = f"\n[gpu_check] exit code {code}: {command}\n"
                break
    seconds = round(time.monotonic() - started, 1)
    summary = (output + failure)[-1500:]
    if not failure:
        try:
            summary = _summary(part.name, work, output)
        except Exception:  # the parts that follow are worth their time
            failure = summary = f"cannot say what it measured:\n{traceback.format_exc()}"
            print(failure)
    if failure and limit_s < LIMIT_S and seconds >= limit_s - 1:
        print(f"[gpu_check] {part.name}: stopped after {seconds} s: no time left")
        return
    result = {
        "passed": not failure,
        "seconds": seconds,
        "where": where,
        "command": f"python tools/gpu_check.py --parts {part.name}",
        "summary": summary,
    }
    (work / f"{part.name}.json").write_text(json.dumps(result, indent=2))
    print(f"[gpu_check] {part.name}: {'FAILED' if failure else 'passed'} in {seconds} s")


def _is_done(part: Part, work: Path, commit: str) -> bool:
    """Whether it passed with the same sources, and what it made is still there."""
    before = _read(work, part)
    return (
        before is not None
        and before["passed"]
        and before["where"]["commit"] == commit
        and commit != "unknown"
        and all((work / path).exists() for path in part.makes)
    )


def _run(command: str, work: Path, limit_s: float, log: TextIO) -> tuple[int, str]:
    """Run one shell command; show its output as it comes, and keep it."""
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "WORK": str(work), "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        ["timeout", "--kill-after=5", str(max(1, int(limit_s))), "bash", "-c", command],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    with process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            print(line, end="", file=log, flush=True)
            lines.append(line)
    return process.returncode, "".join(lines)


def _summary(name: str, work: Path, output: str) -> str:
    """Say in Markdown what a passed part measured."""
    if name.startswith("tests"):
        closing = re.findall(r"^(?:=+ )?(\d+ passed.*?)(?: =+)?$", output, re.MULTILINE)
        return closing[-1] if closing else "no closing line"
    if name == "train":
        return gpu_tables.training_table(work / "runs", MODELS)
    if name == "fp8":
        runs = ("plt2", *(f"plt2-{recipe}" for recipe in RECIPES))
        return gpu_tables.training_table(work / "runs", runs)
    if name.startswith(("speed", "mfu")):
        return _reports(name, work)
    if name == "learn-data":
        return output.strip().splitlines()[-1]
    if name.startswith("learn-"):
        return gpu_tables.training_table(work / "learn", [name.removeprefix("learn-")])
    if name.startswith("decode-"):
        return _decode_section(name, work)
    return gpu_tables.decoding_table(work / "decode.json")


def _reports(name: str, work: Path) -> str:
    """Return what benchmark_train.py wrote, its headings below those of the page."""
    files = {"speed": ("speed/loops", "speed/megatron"), "speed-fp8": ("speed/precision",)}
    texts = [(work / f"{file}.md").read_text() for file in files.get(name, (f"{name}/mfu",))]
    return re.sub(r"^#+", "###", "\n".join(texts), flags=re.MULTILINE)


def _decode_section(name: str, work: Path) -> str:
    """Return the ratios so far; with the last part, all that the decode benchmark wrote."""
    text = (work / decode_folder(name) / "decode.md").read_text()
    text = re.sub(r"^#", "###", text, flags=re.MULTILINE)
    if name == LAST_DECODING:
        return text
    return text[text.index("#### The paper's ratios") :].split("\n#### ")[0]


def _learned(work: Path) -> list[str]:
    """Put the learn parts side by side; the picture is drawn by ``_write_pages``."""
    rows = learning.read_rows(work / "learn", list(LEARNING))
    if not rows:
        return [gpu_tables.NOT_RUN]
    picture = ["", "![Validation losses of the rows](gpu_learning.png)"]
    return [learning.losses_table(rows), "", learning.order(rows), *picture]


def _write_pages(work: Path, page: Path) -> None:
    """Write the page of results and, beside it, the profiles and the picture."""
    page.write_text(_page(work))
    profiles = page.with_name("profile.md")
    profiles.write_text(gpu_tables.profile_page(work, PROFILES))
    written = [page, profiles]
    if rows := learning.read_rows(work / "learn", list(LEARNING)):
        written.append(page.with_name("gpu_learning.png"))
        title = f"Ablation rows at 100M active parameters, {LEARN_STEPS} steps"
        learning.draw(rows, written[-1], title)
    print("wrote", *written)


def _page(work: Path) -> str:
    """Write the page from the results of all parts."""
    lines = [
        "# GPU results",
        "",
        "Written by `python tools/gpu_check.py` from what it measured; not edited by hand.",
        "",
        "## Targets",
        "",
        gpu_tables.targets_table(work),
        "",
        "What a step's time goes to: [profile.md](profile.md).",
        "",
        "## Learning",
        "",
        *_learned(work),
        "",
    ]
    for part in PARTS:
        result = _read(work, part)
        lines += [f"## {part.name}: {part.what}", ""]
        if result is None:
            lines += ["Not run.", ""]
            continue
        where = result["where"]
        lines += [
            f"{'Passed' if result['passed'] else 'FAILED'} in {result['seconds']} s on "
            f"{where['device']}, commit {where['commit']}, {where['versions']}; "
            f"`{result['command']}`",
            "",
            result["summary"] if result["passed"] else f"```\n{result['summary']}\n```",
            "",
        ]
    return "\n".join(lines)


def _read(work: Path, part: Part) -> dict[str, Any] | None:
    path = work / f"{part.name}.json"
    return json.loads(path.read_text()) if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
