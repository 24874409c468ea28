"""DeepSpeed's engine trains what Megatron's does, and each continues the other's runs."""

import json
import re
import signal
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pltmoe.checkpoint import folders
from pltmoe.engines.deepspeed_offload import compile_folder
from pltmoe.hf.convert import ExportOptions, export_checkpoint
from tests.distributed.run_files import curve_of, finish, start_ranks, wait_for
from tests.distributed.tiny import DENSE, MOE
from tests.launch import Ranks

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group(__name__)]
CASES = "tests.distributed.deepspeed_cases"
EP2 = {"parallel__expert_parallel_size": 2}
BF16 = {"train__precision": "bf16"}
OFFLOAD = {"deepspeed__zero_optimization__offload_optimizer": {"device": "cpu"}}
TP2 = {"parallel__tensor_parallel_size": 2}


@pytest.fixture
def warm_ranks(nursery) -> Iterator[Callable[..., list[Any]]]:
    """As the module's, but for one test: ZeRO 3 never lets its process groups go."""
    kept: dict[int, Ranks] = {}
    yield lambda n, target, **kwargs: kept.setdefault(n, Ranks(n, nursery=nursery)).run(
        target, **kwargs
    )
    for ranks in kept.values():
        ranks.close()


def assert_same_curve(got, expected):
    for key in ("losses", "norms"):
        assert got[key] == pytest.approx(expected[key], rel=1e-5), key
    assert got["rates"] == expected["rates"]
    assert got["valid"] == pytest.approx(expected["valid"], rel=1e-5)
    for mine, theirs in zip(got["metrics"], expected["metrics"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("expert_parallel", [1, 2])
def test_twenty_steps_equal_the_megatron_engine(warm_ranks, expert_parallel):
    """ZeRO 0, 1, 2; L = 1, 2, 3; three micro batches; clipping, schedule and router losses on."""
    stages = [None, 0, 1, 2]
    rank, other = warm_ranks(
        2, f"{CASES}:three_micro_batches", stages=stages, expert_parallel=expert_parallel
    )
    for (loops, stage), got in rank.items():
        expected = rank[loops, None]
        assert len(got["losses"]) == 20 and min(got["norms"]) > 0.5, "it is clipped"
        assert_same_curve(got, expected)
        assert other[loops, stage]["losses"] == got["losses"]
        if stage is not None:
            assert f"ZeRO stage {stage}" in got["optimizer"]


@pytest.mark.parametrize(
    ("stages", "ranks", "changes"),
    [
        ([3], 2, {}),
        ([3], 2, {"model": MOE | {"tied_embeddings": True}, "parallel__recompute": "full"}),
        ([3], 2, {"model": DENSE} | TP2),
        ([0, 1, 2], 2, TP2),
        ([1, 2], 4, TP2 | EP2),
        ([1, 2], 2, EP2 | {"parallel__recompute": "full"}),
        ([1, 2], 2, EP2 | {"parallel__overlap_grad_reduce": True}),
    ],
    ids=str,
)
def test_other_stages_and_layouts_equal_the_megatron_engine(warm_ranks, stages, ranks, changes):
    overlap = {"parallel__overlap_grad_reduce"}
    plain = {key: value for key, value in changes.items() if key not in overlap}
    expected = warm_ranks(ranks, f"{CASES}:curve", stage=None, steps=4, **plain)[0]
    found = warm_ranks(ranks, f"{CASES}:curves", stages=stages, steps=4, **changes)[0]
    for stage in stages:
        assert_same_curve(found[stage], expected)


@pytest.mark.parametrize(("stage", "changes"), [(2, EP2), (3, {})], ids=str)
def test_optimizer_state_in_host_memory_trains_the_same(warm_ranks, stage, changes):
    """DeepSpeedCPUAdam, compiled here: the same numbers as torch's AdamW on the device."""
    mark = compile_folder() / "cpu_adam/lock"
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()  # PyTorch's, as a run killed while it compiled leaves it
    expected = warm_ranks(2, f"{CASES}:curve", stage=None, steps=4, **changes)[0]
    offloaded = {"stage": stage, "steps": 4, **changes, **OFFLOAD}
    got = warm_ranks(2, f"{CASES}:curve", timeout_s=900, **offloaded)[0]
    assert "DeepSpeedCPUAdam" in got["optimizer"]
    assert_same_curve(got, expected)


HEADERS = any(Path(root, "libaio.h").exists() for root in ("/usr/include", "/usr/local/include"))
WIDE = {"model": DENSE | {"hidden_size": 128, "ffn_hidden_size": 1024}}
"""Enough weights that DeepSpeed swaps a rank's part of them: a mebibyte."""


@pytest.mark.skipif(
    not HEADERS, reason="DeepSpeed's async_io is compiled, in minutes, against libaio-dev"
)
def test_optimizer_state_on_a_disk_trains_and_resumes_the_same(warm_ranks, tmp_path):
    """What was swapped is saved and loaded: Megatron and NVMe continue each other's runs.

    And a step that is skipped leaves what is swapped as it was.
    """
    disk = {"device": "nvme", "nvme_path": str(tmp_path), "buffer_count": 4}
    nvme = {"deepspeed__zero_optimization__offload_optimizer": disk, **WIDE}
    expected = warm_ranks(2, f"{CASES}:curve", stage=None, steps=6, **WIDE)[0]
    legs = [(None, WIDE), (3, nvme), (3, nvme), (None, WIDE)]
    losses, norms = [], []
    for number, (stage, changes) in enumerate(legs):
        report = warm_ranks(
            2,
            f"{CASES}:curve",
            timeout_s=900,
            stage=stage,
            steps=2 if number < 2 else 1,
            load_from=tmp_path / f"{number - 1}" if number else None,
            save_to=tmp_path / f"{number}",
            **changes,
        )[0]
        losses += report["losses"]
        norms += report["norms"]
    assert losses == pytest.approx(expected["losses"], rel=1e-5)
    assert norms == pytest.approx(expected["norms"], rel=1e-5)
    swapped = [file.stat().st_size for file in tmp_path.glob("pltmoe_*/**/rank1/*.tensor.swp")]
    assert len([size for size in swapped if size >= 2**20]) >= 3, "masters and both moments"
    (report, _) = warm_ranks(2, f"{CASES}:sick_step", stage=3, kind="gradient", **nvme)
    assert report["skipped"] == [False, False, True, False, False]
    assert report["untouched"] and report["moved"] and report["counts"] == [4.0]


def test_bf16_learns_as_the_megatron_engine_does(warm_ranks):
    """Weights and sums of loops are bf16, so the curves part; masters and gradients are fp32."""
    for layout, stages in ((EP2, [(1, {}), (2, {}), (2, OFFLOAD)]), (TP2 | EP2, [(1, {})])):
        changes = {"steps": 8, "optimizer__lr": 1e-3, **BF16, **layout}
        expected = warm_ranks(2, f"{CASES}:curve", stage=None, **changes)[0]
        for stage, more in stages:
            got = warm_ranks(2, f"{CASES}:curve", stage=stage, **changes, **more)[0]
            assert got["losses"] == pytest.approx(expected["losses"], rel=0.01)
            assert got["norms"][:2] == pytest.approx(expected["norms"][:2], rel=0.005)


JOURNEY = [
    (2, 2, EP2),
    (None, 1, {}),
    (1, 2, EP2),
    (3, 2, {}),
    (2, 2, EP2 | OFFLOAD),
    (0, 2, {}),
    (None, 2, EP2),
]
"""Stage (None: Megatron), processes, layout of each leg of two steps."""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_moves_between_stages_and_engines(warm_ranks, tmp_path, precision):
    """What is loaded is bit-equal (weights, masters, moments, each expert), and the curve goes on.

    Each rank loading the first experts, or moments that stay behind, would show in the copies;
    moments that are not the ones in use, in the losses that follow.
    """
    legs = [leg for leg in JOURNEY if precision == "fp32" or leg[0] != 0]
    # At the usual 1e-2, what bf16 rounds away sends tokens to other experts after ten steps.
    rate = {"fp32": 1e-2, "bf16": 1e-3}[precision]
    changes = {"train__precision": precision, "train__steps": 20, "optimizer__lr": rate}
    straight = warm_ranks(1, f"{CASES}:curve", stage=None, steps=2 * len(legs), **changes)[0]
    folders = [tmp_path / f"{number}" for number in range(len(legs) + 1)]
    losses, norms = [], []
    for number, (stage, ranks, layout) in enumerate(legs):
        report = warm_ranks(
            ranks,
            f"{CASES}:curve",
            stage=stage,
            steps=2,
            load_from=folders[number] / "end" if number else None,
            copy_to=folders[number] / "copy" if number else None,
            save_to=folders[number + 1] / "end",
            **changes,
            **layout,
        )[0]
        losses += report["losses"]
        norms += report["norms"]
    close = {"rel": 1e-5} if precision == "fp32" else {"rel": 0.01}
    assert losses == pytest.approx(straight["losses"], **close)
    assert norms == pytest.approx(straight["norms"], rel=1e-4 if precision == "fp32" else 0.1)

    ends = [folder / "end" for folder in folders[1:]]
    copies = [folder / "copy" for folder in folders[1:-1]]
    ends = warm_ranks(1, f"{CASES}:tensors", folders=ends)[0]
    copies = warm_ranks(1, f"{CASES}:tensors", folders=copies)[0]
    for number, (end, copy) in enumerate(zip(ends, copies, strict=False), 1):
        assert copy.keys() == end.keys()
        kinds = {key.split(".")[2] for key in end if key.startswith("optimizer.")}
        assert kinds == {"param", "exp_avg", "exp_avg_sq"}
        for key, value in end.items():
            assert torch.equal(copy[key], value), f"leg {number}: {key}"
    for before, after in pairwise(ends):
        still = [k for k in before if "exp_avg" in k and torch.equal(before[k], after[k])]
        assert not still, "moments that no longer move"


def test_a_new_run_starts_from_weights(warm_ranks, tmp_path):
    """Masters are the new weights, moments are zero, at every stage; as the Megatron engine's."""
    warm_ranks(1, f"{CASES}:curve", stage=None, steps=3, save_to=tmp_path)
    new = {"load_from": tmp_path, "parts": (), "train__seed": 5, "steps": 3}
    expected = warm_ranks(2, f"{CASES}:curve", stage=None, **new)[0]
    for stage in range(4):
        assert_same_curve(warm_ranks(2, f"{CASES}:curve", stage=stage, **new)[0], expected)


@pytest.mark.parametrize(
    ("stage", "changes"),
    [(1, EP2), (2, EP2), (3, {}), (1, EP2 | BF16), (2, EP2 | BF16 | OFFLOAD), (3, BF16)],
    ids=str,
)
def test_a_resumed_run_is_bit_equal(warm_ranks, tmp_path, stage, changes):
    straight = warm_ranks(2, f"{CASES}:curve", stage=stage, steps=4, **changes)[0]
    warm_ranks(2, f"{CASES}:curve", stage=stage, steps=2, save_to=tmp_path, **changes)
    resumed = warm_ranks(2, f"{CASES}:curve", stage=stage, steps=2, load_from=tmp_path, **changes)
    assert resumed[0]["losses"] == straight["losses"][2:]
    assert resumed[0]["norms"] == straight["norms"][2:]


@pytest.mark.parametrize(
    ("stage", "kind", "changes"),
    [
        (0, "gradient", EP2),
        (1, "loss", EP2),
        (1, "gradient", EP2 | BF16),
        (2, "spike", EP2),
        (2, "gradient", BF16),
        (2, "loss", EP2 | BF16 | OFFLOAD),
        (1, "gradient", EP2 | BF16 | OFFLOAD),
        (2, "gradient", OFFLOAD),
        (3, "gradient", {}),
        (3, "spike", {}),
    ],
    ids=str,
)
def test_a_skipped_step_changes_nothing(warm_ranks, stage, kind, changes):
    """Weights, masters, moments, expert biases, Adam's count: as before; the rate moves on."""
    for report in warm_ranks(2, f"{CASES}:sick_step", stage=stage, kind=kind, **changes):
        assert report["skipped"] == [False, False, True, False, False]
        assert report["totals"] == [0, 0, 1, 1, 1]
        assert report["untouched"] and report["moved"]
        assert report["counts"] == [4.0]
        assert report["rates"][1] < report["rates"][2] > report["rates"][3]


def test_start_up_is_quiet_and_compiles_nothing(warm_ranks):
    printed, compiled, loads_a_compiler = warm_ranks(1, f"{CASES}:quiet_start")[0]
    assert not compiled and not loads_a_compiler
    ours = ("UserWarning", "warnings.warn(", "FutureWarning")  # Python's, of PyTorch and Megatron
    assert not [line for line in printed.splitlines() if not any(w in line for w in ours)], printed


def test_its_json_says_what_the_configuration_says(warm_ranks):
    report = warm_ranks(2, f"{CASES}:curve", stage=2, steps=1, **EP2)[0]
    text = json.loads(report["files"]["deepspeed.json"])
    assert text["train_batch_size"] == 8 and text["train_micro_batch_size_per_gpu"] == 2
    assert text["gradient_accumulation_steps"] == 2 and text["gradient_clipping"] == 1.0
    assert text["zero_optimization"] == {"stage": 2, "overlap_comm": False}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("wrong value", "deepspeed: DeepSpeed refuses its JSON: 1 validation error"),
        ("bf16 by itself", "deepspeed.zero_optimization.stage (0) trains in fp32 only, and train."),
        ("no compiler", "needs DeepSpeedCPUAdam, which cannot be compiled here"),
        ("no disk", "/gone) is no folder on "),
        ("a file", ") cannot be written: [Errno 17] File exists"),
        ("no libaio", "needs DeepSpeed's async_io, which cannot be compiled here"),
    ],
)
def test_what_deepspeed_or_the_machine_cannot_do_is_one_message(warm_ranks, case, message):
    told = warm_ranks(1, f"{CASES}:refused", case=case)[0]
    assert message in told and "\n" not in told


ZERO2 = ("engine=deepspeed", "deepspeed.zero_optimization.stage=2")
TWO_EXPERT_RANKS = ("parallel.expert_parallel_size=2", "train.steps=8")


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory) -> tuple[Path, str]:
    """Eight steps of ZeRO 2 with expert parallelism, by the tool: its folder and its log."""
    output = tmp_path_factory.mktemp("straight")
    arguments = (*ZERO2, *TWO_EXPERT_RANKS, f"train.output_dir={output}")
    codes, logs = finish(start_ranks(config, *arguments, nprocs=2))
    assert codes == [0, 0], logs
    return output, logs[0]


def test_a_run_says_what_it_is_and_nothing_of_deepspeeds(straight):
    output, log = straight
    assert re.search(r"^  optimizer +DeepSpeed \(ZeRO stage 2, AdamW\)$", log, re.M)
    assert "deepspeed 0." in log and "step 8/8" in log
    for noise in ("[INFO]", "[WARNING]", "DeepSpeed info", "built successfully", "MA ", "Time to"):
        assert noise not in log, log
    text = json.loads((output / "deepspeed.json").read_text())
    assert text["zero_optimization"]["stage"] == 2
    written = yaml.safe_load((output / "config.yaml").read_text())
    assert written["engine"] == "deepspeed"
    assert written["deepspeed"] == {"zero_optimization": {"stage": 2}}


def test_a_killed_run_resumes_bit_for_bit(config, straight, tmp_path):
    arguments = (*ZERO2, *TWO_EXPERT_RANKS, f"train.output_dir={tmp_path}")
    ranks = start_ranks(config, *arguments, nprocs=2)
    wait_for(ranks[0], "step 6/8")
    ranks[1].send_signal(signal.SIGSEGV)
    ranks[0].kill()
    codes, logs = finish(ranks)
    assert codes == [-signal.SIGKILL, -signal.SIGSEGV]
    assert "Fatal Python error: Segmentation fault" in logs[1], "a crash in C code says where"
    assert "pltmoe/train/trainer.py" in logs[1]
    assert folders.latest_checkpoint(tmp_path).name == "step_00000004"
    codes, logs = finish(start_ranks(config, *arguments, nprocs=2))
    assert codes == [0, 0] and "(step 4)" in logs[0], logs
    assert curve_of(tmp_path) == curve_of(straight[0])


def test_all_experts_of_all_ranks_are_in_the_converted_model(
    config, straight, warm_ranks, tmp_path
):
    """Each expert once, as the Megatron engine has it after the same eight steps."""
    arguments = ["--config", str(config), *TWO_EXPERT_RANKS, f"train.output_dir={tmp_path}/run"]
    ran = warm_ranks(2, "tests.distributed.pretrain_cases:run_many", cases={"": arguments})[0][""]
    assert ran[0] == 0, ran[1]
    exported = []
    for name, run in (("megatron", tmp_path / "run"), ("deepspeed", straight[0])):
        export_checkpoint(run, tmp_path / name, ExportOptions())
        files = sorted((tmp_path / name).glob("*.safetensors"))
        exported.append({k: v for file in files for k, v in load_file(file).items()})
    theirs, ours = exported
    assert ours.keys() == theirs.keys()
    experts = {key: value for key, value in ours.items() if "experts" in key}
    assert experts
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-3, atol=1e-5, msg=key)
    for key, value in experts.items():
        assert len({part.sum().item() for part in value}) == len(value), f"{key}: one expert twice"
