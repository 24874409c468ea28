"""Check on a GPU what continuous integration cannot: tests/gpu and every benchmark, part by part.

    python tools/gpu_check.py                      all parts that this commit has not passed yet
    python tools/gpu_check.py --parts tests        one part
    python tools/gpu_check.py --again              also those that were done

Every part takes less than ten minutes and remembers its result in --work, so a machine that is
lent for a short while can do them one after another; those that tell most come first. The pages
docs/gpu_results.md and docs/profile.md and the picture docs/gpu_learning.png are made from what was
measured; a part that was not run is said to be not run.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pltmoe.reports import gpu_tables, learning

REPOSITORY = Path(__file__).resolve().parents[1]
LIMIT_S = 590
TRAIN_STEPS = 200
MODELS = ("vanilla", "loop2", "plt2")
RECIPES = ("tensorwise", "delayed", "blockwise")
"""Of FP8, on Hopper."""
FULL_RECIPES = ("tensorwise", "blockwise")
LEARN_STEPS = 150
SEEDS = (1, 2)
NORMED = "model.normalize_per_loop=true model.hidden_scale=0.053"
LEARNING = {
    "row1": ("row1_vanilla", ""),
    "row2": ("row2_loop2", ""),
    "row3": ("row3_clp", ""),
    "row4": ("row4_shared_kv", ""),
    "row5": ("row5_plt2", ""),
    "row6": ("row6_plt3", ""),
    "plt2-normed": ("row5_plt2", NORMED),
    "plt3-normed": ("row6_plt3", NORMED),
    "plt2-shared-routing": ("row5_plt2", "model.moe_loop_routing=shared"),
}
"""What is trained to compare losses: file of configs/ablation_680m_13b, and changes."""
LEARN_SIZES = (
    "model.vocab_size=8192 model.num_layers=8 model.hidden_size=640 model.num_attention_heads=10 "
    "model.num_kv_heads=5 model.head_dim=64 model.num_experts=64 model.moe_ffn_hidden_size=640 "
    "data.sequence_length=1024 train.global_batch_size=128 train.micro_batch_size=16 "
    "parallel.expert_parallel_size=1 optimizer.lr=0.001 optimizer.min_lr=0.0001"
)
"""100M active of 0.7B parameters."""
FULL_SIZES = (
    "--config configs/plt_moe_1b_7b.yaml --rounds 8 --profile parallel.expert_parallel_size=1 "
    "model.num_layers=10 train.global_batch_size=32"
)
"""One model that fills 139 GiB: 4.33B parameters of 18 bytes, 0.81B active."""
FULL_MICRO_BATCHES = (4, 2)
"""The first that fits is measured. tools/plan.py expects of 4 122 GiB in bf16, 130 GiB in FP8."""
SPEED_SIZES = (
    "--config configs/plt_moe_1b_7b.yaml --rounds 10 parallel.expert_parallel_size=1 "
    "model.num_layers=4 train.micro_batch_size=2 train.global_batch_size=4"
)
"""Two models of these must fit the device, optimizers included."""


PYTEST = "{python} -m pytest -q -rs --durations 5"


@dataclass(frozen=True)
class Part:
    """One check: shell commands in order, run in the repository with $WORK set."""

    name: str
    what: str
    commands: tuple[str, ...]


def _pretrain(model: str, name: str, more: str = "") -> str:
    return (
        f"rm -rf $WORK/runs/{name} && "
        f"{{python}} tools/pretrain.py --config configs/quickstart_{model}.yaml "
        "data.tokenizer=$WORK/tokenizer.model 'data.train=[{{path: '$WORK/corpus'}}]' "
        f"parallel.expert_parallel_size=1 train.output_dir=$WORK/runs/{name} "
        f"train.steps={TRAIN_STEPS} train.eval_interval={TRAIN_STEPS} train.micro_batch_size=8 "
        f"checkpoint.save_interval={TRAIN_STEPS} {more}"
    ).strip()


def _precision_name(precision: str) -> str:
    return precision if precision == "bf16" else f"FP8 {precision}"


def _full(precision: str, changes: str) -> Part:
    """Time one model that fills the device, in a process of its own."""
    command = "{python} tools/benchmark_train.py --compare mfu --output $WORK/mfu-" + precision
    tries = (
        f"{command} {FULL_SIZES} train.micro_batch_size={size} {changes}".strip()
        for size in FULL_MICRO_BATCHES
    )
    what = f"MFU of PLT-2, ten layers of 1B/7B, {_precision_name(precision)}"
    more = "export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True; "
    return Part(f"mfu-{precision}", what, (more + " || ".join(tries),))


def _learning(name: str, seed: int) -> Part:
    """Train one model of about 100M active parameters on the sources of installed packages."""
    file, changes = LEARNING[name]
    command = (
        f"rm -rf $WORK/learn/{name}-seed{seed} && "
        f"{{python}} tools/pretrain.py --config configs/ablation_680m_13b/{file}.yaml "
        "data.tokenizer=$WORK/learn/tokenizer.model "
        "'data.train=[{{path: '$WORK/learn/corpus'}}]' "
        f"train.output_dir=$WORK/learn/{name}-seed{seed} train.seed={seed} "
        f"train.steps={LEARN_STEPS} train.eval_interval={LEARN_STEPS // 10} train.eval_steps=5 "
        f"optimizer.warmup_steps={LEARN_STEPS // 10} "
        f"checkpoint.save_interval={LEARN_STEPS} {LEARN_SIZES} {changes}"
    ).strip()
    what = f"{file}{', ' + changes if changes else ''}, seed {seed}: {LEARN_STEPS} steps"
    return Part(f"learn-{name}-seed{seed}", what, (command,))


def _decoding(name: str, what: str, options: str) -> Part:
    """One share of the decode benchmark; all of them add to $WORK/decode/decode.json."""
    folder = _decode_folder(name)
    command = f"{{python}} tools/benchmark_decode.py --output $WORK/{folder} {options}"
    return Part(f"decode-{name}", what, (command,))


def _decode_folder(name: str) -> str:
    """Return where a share writes: other weights or other kernels never come into one table."""
    own = [kind for kind in ("fp8", "fused") if name.endswith(kind)]
    return "-".join(["decode", *own])


PARTS = (
    Part(
        "tests",
        "tests/gpu but for whole runs",
        (f"{PYTEST} tests/gpu --ignore tests/gpu/test_training.py",),
    ),
    Part(
        "tests-runs",
        "tests/gpu/test_training.py: runs that resume, repeat, or began on a CPU",
        (f"{PYTEST} tests/gpu/test_training.py",),
    ),
    Part(
        "speed",
        "PLT-2 step / vanilla step, and our vanilla step / Megatron-core's, four layers of 1B/7B",
        (
            "{python} tools/benchmark_train.py --compare loops,megatron --output $WORK/speed "
            f"--profile {SPEED_SIZES}",
        ),
    ),
    _full("bf16", "train.precision=bf16"),
    *(_full(recipe, f"train.precision=fp8 train.fp8_recipe={recipe}") for recipe in FULL_RECIPES),
    Part(
        "speed-fp8",
        "a step of the same PLT-2 in FP8 / in bf16",
        (
            "{python} tools/benchmark_train.py --compare precision --output $WORK/speed "
            f"--profile {SPEED_SIZES}",
        ),
    ),
    Part(
        "train",
        f"{TRAIN_STEPS} steps of the quickstart's three models in bf16 on one GPU",
        (
            "{python} tools/build_corpus.py --output $WORK/text.jsonl --max-bytes 8000000",
            "{python} tools/train_tokenizer.py $WORK/text.jsonl --output $WORK/tokenizer.model "
            "--vocab-size 2048",
            "{python} tools/preprocess_data.py $WORK/text.jsonl --tokenizer $WORK/tokenizer.model "
            "--output $WORK/corpus",
            *(_pretrain(model, model) for model in MODELS),
        ),
    ),
    Part(
        "fp8",
        f"{TRAIN_STEPS} steps of the quickstart's PLT-2 in FP8 beside bf16, on the data of train",
        tuple(
            _pretrain("plt2", f"plt2-{recipe}", f"train.precision=fp8 train.fp8_recipe={recipe}")
            for recipe in RECIPES
        ),
    ),
    Part(
        "decode",
        "decoding of the three exported models through the engine",
        (
            *(
                f"rm -rf $WORK/hf/{m} && {{python}} tools/convert_to_hf.py "
                f"--checkpoint $WORK/runs/{m} --output $WORK/hf/{m}"
                for m in MODELS
            ),
            "{python} tools/benchmark_decode.py --output $WORK/decode.json "
            + " ".join(f"--model {m}=$WORK/hf/{m}" for m in MODELS),
        ),
    ),
    _decoding(
        "one-size",
        "680M/13B: vanilla, loop-2, + CLP, + shared KV, PLT-2, PLT-3, batch 1 to 32",
        "--compare ablation --batches 1,4,16,32 --prefill 0",
    ),
    _decoding(
        "one-size-large",
        "the same, batch 64 to 256",
        "--compare ablation --batches 64,128,256 --prefill 0",
    ),
    _decoding("prefill", "the same, prefill of 1k to 32k", "--compare ablation --batches 0"),
    _decoding(
        "headline-vanilla",
        "vanilla 2.5B/60B, batch 1 to 256, prefill",
        "--compare headline --only 'vanilla 2.5B/60B'",
    ),
    _decoding(
        "headline-fp8",
        "PLT-2 1.7B/40B and vanilla 2.5B/60B with experts in FP8, batch 4 to 64",
        "--compare headline --fp8 --batches 4,16,64 --prefill 0",
    ),
    _decoding(
        "headline-fused",
        "PLT-2 1.7B/40B with what lies between the large kernels compiled, batch 4 to 64",
        "--compare headline --only 'PLT-2 1.7B/40B' --only 'PLT-2 1.7B/40B, shared routing' "
        "--fuse --batches 4,16,64 --prefill 0",
    ),
    _decoding(
        "headline-plt",
        "PLT-2 1.7B/40B, both routings, batch 1 to 256, prefill; the ratios",
        "--compare headline --only 'PLT-2 1.7B/40B' --only 'PLT-2 1.7B/40B, shared routing'",
    ),
    Part(
        "learn-data",
        "150 MB of source text of installed packages, for the parts that follow",
        (
            "mkdir -p $WORK/learn",
            "{python} tools/build_corpus.py --output $WORK/learn/text.jsonl --max-bytes 150000000 "
            "--library $({python} -c 'import sysconfig; print(sysconfig.get_path(\"purelib\"))')",
            "{python} tools/train_tokenizer.py $WORK/learn/text.jsonl --vocab-size 8192 "
            "--output $WORK/learn/tokenizer.model",
            "{python} tools/preprocess_data.py $WORK/learn/text.jsonl --workers 8 "
            "--tokenizer $WORK/learn/tokenizer.model --output $WORK/learn/corpus",
        ),
    ),
    *(_learning(name, SEEDS[0]) for name in LEARNING),
    *(_learning(row, seed) for seed in SEEDS[1:] for row in LEARNING if row.startswith("row")),
)
LAST_DECODING = [part.name for part in PARTS if part.name.startswith("decode-")][-1]
PROFILES = (
    ("PLT-2 and vanilla, four layers of 1B/7B", "speed", "loops"),
    ("Our vanilla model and Megatron-core's, four layers", "speed", "megatron"),
    *(
        (f"PLT-2, ten layers of 1B/7B, {_precision_name(precision)}", f"mfu-{precision}", "mfu")
        for precision in ("bf16", *FULL_RECIPES)
    ),
    ("PLT-2 in FP8 and in bf16, four layers", "speed", "precision"),
)
"""Title, folder and comparison, in the order of docs/profile.md."""


def main() -> int:
    """Run the parts, then write the page; the exit code is 1 if a part failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", default=",".join(names), help=f"of {','.join(names)}")
    parser.add_argument("--again", action="store_true", help="run parts that were done, too")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "runs" / "gpu_check")
    parser.add_argument("--page", type=Path, default=REPOSITORY / "docs" / "gpu_results.md")
    args = parser.parse_args()
    if unknown := sorted(set(args.parts.split(",")) - set(names)):
        parser.error(f"unknown part {unknown[0]}; there are {', '.join(names)}")
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
    for part in PARTS:
        if part.name in args.parts.split(","):
            _run_part(part, args.work, where, args.again)
    _write_pages(args.work, args.page)
    results = [_read(args.work, part) for part in PARTS]
    return int(any(result and not result["passed"] for result in results))


def _run_part(part: Part, work: Path, where: dict[str, Any], again: bool) -> None:
    before = _read(work, part)
    if before and before["passed"] and before["where"]["commit"] == where["commit"] and not again:
        print(f"[gpu_check] {part.name}: done already for {where['commit']}")
        return
    print(f"[gpu_check] {part.name}: {part.what}", flush=True)
    started, passed, output = time.monotonic(), True, ""
    for command in part.commands:
        left = LIMIT_S - (time.monotonic() - started)
        code, text = _run(command.format(python=shlex.quote(sys.executable)), work, left)
        output += text
        if code != 0:
            passed = False
            output += f"\n[gpu_check] exit code {code}: {command}\n"
            break
    (work / f"{part.name}.log").write_text(output)
    result = {
        "passed": passed,
        "seconds": round(time.monotonic() - started, 1),
        "where": where,
        "command": f"python tools/gpu_check.py --parts {part.name}",
        "summary": _summary(part.name, work, output) if passed else output[-1500:],
    }
    (work / f"{part.name}.json").write_text(json.dumps(result, indent=2))
    print(f"[gpu_check] {part.name}: {'passed' if passed else 'FAILED'} in {result['seconds']} s")


def _run(command: str, work: Path, limit_s: float) -> tuple[int, str]:
    """Run one shell command, show its output as it comes, and keep it."""
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "WORK": str(work), "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        ["timeout", str(max(1, int(limit_s))), "bash", "-c", command],
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
    text = (work / _decode_folder(name) / "decode.md").read_text()
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
        gpu_tables.targets_table(work, FULL_RECIPES),
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
