"""The parts of the GPU's checks: their order, and commands that would not waste a lent machine."""

import os
import re
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from pltmoe.reports import gpu_parts
from pltmoe.reports.style import line_style
from tests.repository import CONFIGS, REPOSITORY, run_python


def test_what_tells_most_comes_first_and_data_before_their_use() -> None:
    names = [part.name for part in gpu_parts.PARTS]
    assert len(set(names)) == len(names)
    kinds = [
        "mfu-wide-bf16", "mfu-wide-tensorwise", "speed", "tests", "train", "fp8",
        "decode-headline-plt", "tests-decode", "tests-runs", "decode", "learn-row1-seed1",
    ]  # fmt: skip
    assert sorted(kinds, key=names.index) == kinds
    for part in gpu_parts.PARTS:
        made = [other for other in gpu_parts.PARTS if other.name == part.data_of]
        assert bool(made) == bool(part.data_of)
        assert all(
            other.makes and names.index(other.name) < names.index(part.name) for other in made
        )
        uses_data = part.name.startswith(("learn-row", "learn-plt"))
        assert bool(made) == (uses_data or part.name in ("fp8", "decode"))
    run, left_out = set(), set()
    for part in gpu_parts.PARTS:
        words = part.commands[0].split() if part.name.startswith("tests") else []
        paths = {word for word in words if word.startswith("tests/")}
        ignored = {b for a, b in pairwise(words) if a == "--ignore"}
        left_out, run = left_out | ignored, run | (paths - ignored)
        assert all((REPOSITORY / path).exists() for path in paths)
    assert "tests/gpu" in run and left_out < run, "each is run by one of them"
    last = names[-6:]
    assert last == [f"learn-row{n}-seed2" for n in range(1, 7)], "second seeds when all have one"


def test_only_what_does_not_fit_is_tried_with_a_smaller_micro_batch(tmp_path: Path) -> None:
    """Any other failure would come again, and hide the first one's message."""
    part = next(part for part in gpu_parts.PARTS if part.name == "mfu-wide-bf16")
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$@" >> $WORK/calls; echo "$SAYS"; exit 1\n')
    fake.chmod(0o755)
    for says, tries in (
        ("no kernel", 1),
        ("CUDA out of memory", 2),
        ("CUBLAS_STATUS_ALLOC_FAILED", 2),
    ):
        (tmp_path / "calls").unlink(missing_ok=True)
        environment = {**os.environ, "WORK": str(tmp_path), "SAYS": says}
        command = part.commands[0].format(python=fake)
        assert subprocess.run(["bash", "-c", command], env=environment).returncode != 0
        calls = (tmp_path / "calls").read_text().splitlines()
        sizes = [re.search(r"train.micro_batch_size=(\d)", call)[1] for call in calls]
        assert sizes == ["4", "2"][:tries]


def test_the_training_parts_are_valid_runs() -> None:
    """A part that fails at its configuration would waste a lent machine."""
    from pltmoe.config import load_config
    from pltmoe.train.benchmark.configs import check

    seen, sizes = 0, {model: set() for model in gpu_parts.FULL}
    for part in gpu_parts.PARTS:
        for command in [
            one
            for all_of in part.commands
            for one in re.split(r" 2>&1 \| |'out of memory.*?'|; }", all_of.format(python="python"))
        ]:
            words = shlex.split(command)
            if not {"tools/pretrain.py", "tools/benchmark_train.py"} & set(words):
                continue
            overrides = [
                w
                for w in words
                if re.match(r"(data|model|train|optimizer|parallel|checkpoint)\.", w)
            ]
            config = load_config(REPOSITORY / words[words.index("--config") + 1], overrides)
            if "--compare" in words:
                check(words[words.index("--compare") + 1], config, 1)
            if "tools/pretrain.py" in words:  # else a new commit resumes what an old one finished
                assert words[:4] == ["rm", "-rf", str(config.train.output_dir), "&&"]
            if part.name == "fp8":
                assert config.train.precision == "fp8"
            if part.name.startswith("learn-plt2-shared-routing"):
                assert config.model.moe_loop_routing == "shared"
            if part.name.startswith("learn-"):
                assert part.name.endswith(f"-seed{config.train.seed}")
                assert str(config.train.output_dir).endswith(part.name.removeprefix("learn-"))
                assert config.train.steps % config.train.eval_interval == 0, "ends validated"
                (learned,), (compared,) = config.data.train, config.data.valid
                assert learned.path != compared.path, "near copies would decide"
            if part.name.startswith("mfu-"):
                is_bf16 = "-bf16" in part.name
                assert config.train.precision == ("bf16" if is_bf16 else "fp8")
                assert is_bf16 or part.name.endswith(config.train.fp8_recipe)
                assert config.train.gradient_accumulation_fusion == part.name.endswith("fused")
                assert (config.train.transformer_impl == "local") == part.name.endswith("local")
                assert "--profile" in words
                size = (config.train.global_batch_size, config.model)
                sizes[part.name.split("-")[1]].add(str(size))
            seen += 1
    mfu = 2 * len(gpu_parts.FULL) * len(gpu_parts.PRECISIONS)
    assert seen >= 3 + len(gpu_parts.RECIPES) + 3 + mfu + len(gpu_parts.LEARNING) + 6
    for of_model in sizes.values():
        assert len(of_model) == 1, "the same model and the same tokens in all precisions"


@pytest.mark.parametrize("model", gpu_parts.FULL)
def test_the_models_that_fill_the_device_fit_it(model: str) -> None:
    """As far as tools/plan.py knows; the larger micro batch in FP8 is the tightest."""
    from pltmoe.config import load_config
    from pltmoe.plan import check_fits, make_plan

    for precision in ("bf16", "fp8"):
        words = f"{gpu_parts.FULL_SIZES} {gpu_parts.FULL[model][1]}".split()
        overrides = [word for word in words if "=" in word]
        overrides.append(f"train.micro_batch_size={gpu_parts.FULL_MICRO_BATCHES[0]}")
        config = load_config(words[1], [*overrides, f"train.precision={precision}"])
        check_fits(make_plan(config, 1, "H200"))


def test_the_decode_parts_name_models_and_options_that_exist() -> None:
    """A part that fails at the command line would waste a lent machine."""
    from pltmoe.inference.benchmark.suite import ABLATION, HEADLINE, candidates

    names = {c.name for c in candidates(CONFIGS, [ABLATION, HEADLINE])}
    parts = [part for part in gpu_parts.PARTS if part.name.startswith("decode-")]
    options = re.findall(r"--[a-z0-9-]+", run_python("tools/benchmark_decode.py", "--help").stdout)
    assert parts
    for part in parts:
        words = shlex.split(part.commands[0])
        assert {word for word in words if word.startswith("--")} <= set(options)
        only = [words[i + 1] for i, word in enumerate(words) if word == "--only"]
        assert set(only) <= names


def test_no_two_models_in_the_picture_of_losses_look_alike() -> None:
    styles = {str(line_style(index)) for index, _ in enumerate(gpu_parts.LEARNING)}
    assert len(styles) == len(gpu_parts.LEARNING)
