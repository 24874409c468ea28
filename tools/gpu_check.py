"""Check on a GPU what continuous integration cannot: tests/gpu and every benchmark, part by part.

    python tools/gpu_check.py                      all parts that this commit has not passed yet
    python tools/gpu_check.py --parts tests,speed  two parts
    python tools/gpu_check.py --minutes 9.5        as many as there is time for; call it again
    python tools/gpu_check.py --again              also those that were done

Every part takes less than ten minutes and remembers its result in --work, so a machine that is
lent for a short while can do them one after another; those that tell most come first, and those
that failed at this commit are tried again when all others have a result. A part is begun only if
as much time is left as it is thought to take; one that takes twice as long has failed. After each,
the pages docs/gpu_results.md and docs/profile.md and the picture docs/gpu_learning.png are made
from what was measured; a part that was not run is said to be not run.

A machine without a network needs as wheels what it lacks of the packages in setup.py (MLflow,
nvidia-ml-py and backports.zstd may be missing: no part needs them), pytest and pytest-xdist; for
Transformer Engine transformer-engine, transformer-engine-cu13, transformer-engine-torch (built
against its PyTorch), einops and onnxscript; for DeepSpeed hjson, msgpack and py-cpuinfo. There:

    python -m pip install --no-index --no-deps --target SITE *.whl
    PYTHONPATH=SITE:. PLTMOE_COMMIT=$COMMIT python tools/gpu_check.py --minutes 9.5

PLTMOE_COMMIT names the sources where they came without their repository.
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pltmoe.reports import gpu_tables, learning
from pltmoe.reports.gpu_parts import (
    LAST_DECODING,
    LEARN_STEPS,
    LEARNING,
    MODELS,
    PARTS,
    PROFILES,
    RECIPES,
    TRANSFORMER_ENGINE,
    Part,
    decode_folder,
)

REPOSITORY = Path(__file__).resolve().parents[1]
LIMIT_S = 510
"""Of a part: of --minutes 9.5 a minute is left to start in."""
STOPPED = (124, 137)
"""What timeout(1) returns of what it has ended, or killed."""


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
    absent, too_long = _absent(), []
    written = _write_pages(args.work, args.page, absent)
    for part in _in_order(args.parts.split(","), args.work, where["commit"]):
        if _is_done(part, args.work, where["commit"]) and not args.again:
            print(f"[gpu_check] {part.name}: done already for {where['commit']}")
            continue
        if why_not := _blocked(part, args.work, absent):
            print(f"[gpu_check] {part.name}: not run: {why_not}")
            continue
        left = deadline - time.monotonic()
        if left < (wanted := _wanted_s(part, args.work, where["commit"])):
            too_long.append(f"{part.name} (about {wanted:.0f} s)")
            continue
        _run_part(part, args.work, where, left)
        written = _write_pages(args.work, args.page, absent)
    if too_long:
        print(f"[gpu_check] no time left for {', '.join(too_long)}; these are guesses. Call again")
    results = [_read(args.work, part) for part in PARTS]
    return int(not written or any(result and not result["passed"] for result in results))


def _absent() -> dict[str, str]:
    """Return which software that parts need is not here, and why."""
    import torch

    from pltmoe.runtime import devices

    found = devices.transformer_impl("auto", torch.bfloat16)
    return {} if found.choice == "TE" else {TRANSFORMER_ENGINE: found.reason}


def _in_order(names: Sequence[str], work: Path, commit: str) -> list[Part]:
    """Return parts in their order; those that failed at this commit, and their users, come last."""
    failed = {part.name for part in PARTS if _has_failed(part, work, commit)}
    parts = [part for part in PARTS if part.name in names]
    return sorted(parts, key=lambda part: bool({part.name, part.data_of} & failed))


def _has_failed(part: Part, work: Path, commit: str) -> bool:
    before = _read(work, part)
    return before is not None and not before["passed"] and before["where"]["commit"] == commit


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


def _blocked(part: Part, work: Path, absent: Mapping[str, str]) -> str:
    """Say why it cannot be run here; nothing if it can."""
    if part.needs in absent:
        return absent[part.needs]
    data = [path for other in PARTS if other.name == part.data_of for path in other.makes]
    gone = [path for path in data if not (work / path).exists()]
    return f"{part.data_of} has not made {gone[0]}" if gone else ""


def _wanted_s(part: Part, work: Path, commit: str) -> float:
    """Return the seconds to begin it with: a guess, but more than what was too little before."""
    before = _load(work / f"{part.name}.stopped.json")
    if before is None or before["commit"] != commit:
        return part.seconds
    return min(LIMIT_S, max(part.seconds, 1.1 * before["seconds"]))


def _run_part(part: Part, work: Path, where: dict[str, Any], left_s: float = math.inf) -> None:
    """Run it for ``left_s`` at most, and twice what it wants: one that hangs takes no other's time.

    Stopped for the first reason it has no result; for the second it has failed.
    """
    own_limit_s = min(LIMIT_S, 2 * _wanted_s(part, work, where["commit"]))
    limit_s = min(own_limit_s, left_s)
    print(f"[gpu_check] {part.name}: {part.what}", flush=True)
    started, output, failure, code = time.monotonic(), "", "", 0
    log, stopped = work / f"{part.name}.log", work / f"{part.name}.stopped.json"
    log.write_text("", encoding="utf-8")
    for command in part.commands:
        left = limit_s - (time.monotonic() - started)
        code, text = _run(command.format(python=shlex.quote(sys.executable)), work, left, log)
        output += text
        if code != 0:
            failure = f"\n[gpu_check] exit code {code}: {command}\n"
            break
    seconds = round(time.monotonic() - started, 1)
    was_stopped = code in STOPPED and seconds >= limit_s - 1
    if was_stopped:
        failure += f"[gpu_check] stopped after {seconds} s\n"
        _save(stopped, {"commit": where["commit"], "seconds": seconds})
    summary = (output + failure)[-1500:]
    if not failure:
        try:
            summary = _summary(part.name, work, output)
        except Exception:  # the parts that follow are worth their time
            failure = summary = f"cannot say what it measured:\n{traceback.format_exc()}"
            print(failure)
    if was_stopped and limit_s < own_limit_s:
        print(f"[gpu_check] {part.name}: stopped after {seconds} s: no time left")
        return
    result = {
        "passed": not failure,
        "seconds": seconds,
        "where": where,
        "command": f"python tools/gpu_check.py --parts {part.name}",
        "summary": summary,
    }
    _save(work / f"{part.name}.json", result)
    print(f"[gpu_check] {part.name}: {'FAILED' if failure else 'passed'} in {seconds} s")


def _run(command: str, work: Path, limit_s: float, log: Path) -> tuple[int, str]:
    """Run one shell command; show its output as it comes, and add it to ``log``.

    A process that it leaves behind may go on writing there, but is not waited for.
    """
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "WORK": str(work), "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    output = b""
    with log.open("ab") as written, log.open("rb") as read:
        read.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            ["timeout", "--kill-after=5", f"{max(1, limit_s):.1f}", "bash", "-c", command],
            cwd=REPOSITORY,
            env=environment,
            stdout=written,
            stderr=subprocess.STDOUT,
        )
        try:
            code = None
            while code is None:
                time.sleep(0.1)
                code = process.poll()  # first, so that what is read last is all of it
                new = read.read()
                output += new
                sys.stdout.buffer.write(new)  # as it is: who knows in which encoding
                sys.stdout.buffer.flush()
        finally:
            process.terminate()
    return code, output.decode("utf-8", "replace").replace("\r", "\n")


def _summary(name: str, work: Path, output: str) -> str:
    """Say in Markdown what a passed part measured."""
    if name.startswith("tests"):
        closing = re.findall(r"^(?:=+ )?(\d+ (?:passed|skipped).*?)(?: =+)?$", output, re.MULTILINE)
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
    texts = [
        (work / f"{file}.md").read_text(encoding="utf-8")
        for file in files.get(name, (f"{name}/mfu",))
    ]
    return re.sub(r"^#+", "###", "\n".join(texts), flags=re.MULTILINE)


def _decode_section(name: str, work: Path) -> str:
    """Return the ratios so far; with the last part, all that the decode benchmark wrote."""
    text = (work / decode_folder(name) / "decode.md").read_text(encoding="utf-8")
    text = re.sub(r"^#", "###", text, flags=re.MULTILINE)
    if name == LAST_DECODING:
        return text
    return text[text.index("#### The paper's ratios") :].split("\n#### ")[0]


def _learned(work: Path) -> str:
    """Put the learn parts side by side; the picture is drawn by ``_write_pages``."""
    rows = learning.read_rows(work / "learn", list(LEARNING))
    if not rows:
        return gpu_tables.NOT_RUN
    picture = ["", "![Validation losses of the rows](gpu_learning.png)"]
    return "\n".join([learning.losses_table(rows), "", learning.order(rows), *picture])


def _or_why_not(text: Callable[[Path], str], work: Path) -> str:
    """Return a text made from ``work``: one file of older sources there costs that text alone."""
    try:
        return text(work)
    except Exception as error:
        traceback.print_exc()
        return f"Cannot say what was measured: {type(error).__name__}: {error}"


def _write_pages(work: Path, page: Path, absent: Mapping[str, str] | None = None) -> bool:
    """Write the page of results and, beside it, the profiles and the picture; say if it went well.

    Nothing that goes wrong here ends the parts that follow.
    """
    profiles, picture = page.with_name("profile.md"), page.with_name("gpu_learning.png")
    try:
        page.write_text(_page(work, absent or {}), encoding="utf-8")
        text = _or_why_not(lambda work: gpu_tables.profile_page(work, PROFILES), work)
        profiles.write_text(text, encoding="utf-8")
        if rows := learning.read_rows(work / "learn", list(LEARNING)):
            title = f"Ablation rows at 100M active parameters, {LEARN_STEPS} steps"
            learning.draw(rows, picture, title)
    except Exception:
        traceback.print_exc()
        print(f"[gpu_check] not all of {page}, {profiles.name}, {picture.name} could be written")
        return False
    print("wrote", page, profiles, *([picture] if rows else []))
    return True


def _page(work: Path, absent: Mapping[str, str]) -> str:
    """Write the page from the results of all parts; ``absent``: see ``_absent``."""
    lines = [
        "# GPU results",
        "",
        "Written by `python tools/gpu_check.py` from what it measured; not edited by hand.",
        "",
        "## Targets",
        "",
        _or_why_not(gpu_tables.targets_table, work),
        "",
        "What a step's time goes to: [profile.md](profile.md).",
        "",
        "## Learning",
        "",
        _or_why_not(_learned, work),
        "",
    ]
    not_run = []
    for part in PARTS:
        result = _read(work, part)
        if result is None or (part.needs in absent and not result["passed"]):
            why = f" ({absent[part.needs]})" if part.needs in absent else ""
            not_run.append(f"{part.name}: {part.what}{why}")
            continue
        where = result["where"]
        lines += [
            f"## {part.name}: {part.what}",
            "",
            f"{'Passed' if result['passed'] else 'FAILED'} in {result['seconds']} s on "
            f"{where['device']}, commit {where['commit']}, {where['versions']}; "
            f"`{result['command']}`",
            "",
            result["summary"] if result["passed"] else f"```\n{result['summary']}\n```",
            "",
        ]
    return "\n".join(lines + gpu_tables.not_run_list(not_run))


def _read(work: Path, part: Part) -> dict[str, Any] | None:
    """Return the last result of a part."""
    return _load(work / f"{part.name}.json")


def _load(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _save(path: Path, tree: Mapping[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(tree, indent=2), encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
