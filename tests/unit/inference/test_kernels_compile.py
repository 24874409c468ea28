"""The kernels compile for an H200 on a machine without a GPU: no spilled registers, fast loads.

Numbers come from the interpreter (test_kernels.py) and from a GPU (tests/gpu); this is what a
compiler alone can say, for the shapes of the 1.7B/40B model in bf16.
"""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from pltmoe.inference.kernels import decode_attention, experts, rows  # noqa: E402
from pltmoe.inference.kernels.tiles import choose_tiles  # noqa: E402

H200 = GPUTarget("cuda", 90, 32)
L40S = GPUTarget("cuda", 89, 32)
SHARED_MEMORY_BYTES = 227 * 1024
LEAST_SHARED_MEMORY_BYTES = 99 * 1024
"""Of compute capability 8.6, 8.9 and 12.0; 8.0 has 163 KiB."""
TYPES = {
    "lengths_ptr": "*i64", "window_lengths_ptr": "*i64", "acc_ptr": "*fp32",
    "top_ptr": "*fp32", "sum_ptr": "*fp32", "expert_ptr": "*i64", "block_expert_ptr": "*i32",
    "block_row_ptr": "*i32", "scale_ptr": "*fp32", "scale": "fp32", "eps": "fp32",
    "logits_ptr": "*fp32", "bias_ptr": "*fp32", "slot_ptr": "*i64", "ring_slot_ptr": "*i64",
}  # fmt: skip
HEADS = {"G": 4, "L": 2, "PER": 4, "K": 128, "BLOCK_K": 128, "ROWS": 16}
ATTEND = HEADS | {"PRECISION": "tf32"}


def compiled(
    kernel: Any,
    constants: dict[str, Any],
    weight: str = "*bf16",
    x: str = "*bf16",
    target: GPUTarget = H200,
    **options: int,
) -> Any:
    """Compile; pointers and strides are multiples of 16, as torch allocates them."""
    types, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        types[name] = TYPES.get(name, x if name.endswith("_ptr") else "i32")
        if name == "weight_ptr":
            types[name] = weight
        if name in constants:
            types[name] = "constexpr"
        elif name.endswith("_ptr") or name.startswith("stride_"):
            attributes[index,] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return triton.compile(ASTSource(kernel, types, values, attributes), target, options)


def attention(
    name: str, head: int = 128, dtype: str = "bf16", target: GPUTarget = H200, **sizes: int
) -> Any:
    """Compile a kernel of decode attention with the tile that it is started with."""
    options = decode_attention.tile(head, 4 if dtype == "fp32" else 2)
    constants = ATTEND | {"WINDOWS": True, "K": head, "BLOCK_K": head} | sizes
    constants |= {"BLOCK_N": options.pop("BLOCK_N")}
    if dtype == "fp32":
        constants["PRECISION"] = "ieee"
    kernel = getattr(decode_attention, name)
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    return compiled(kernel, constants, f"*{dtype}", f"*{dtype}", target, **options)


def assert_fits(binary: Any, tmp_path: Path) -> None:
    """No spills (LOCAL, STACK), and shared memory for at least one program per processor."""
    (tmp_path / "cubin").write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.check_output([tool, "-res-usage", tmp_path / "cubin"], text=True)
    assert re.findall(r"(STACK|LOCAL):(\d+)", usage) == [("STACK", "0"), ("LOCAL", "0")]
    assert binary.metadata.shared <= SHARED_MEMORY_BYTES


def assert_streams(binary: Any) -> None:
    """Loads are asynchronous copies of 16 bytes, and products use tensor cores."""
    assert "cp.async.cg" in binary.asm["ptx"]
    assert "cp.async.ca" not in binary.asm["ptx"], "a copy of fewer than 16 bytes"
    assert "mma.sync" in binary.asm["ptx"] or "wgmma" in binary.asm["ptx"]


@pytest.mark.parametrize("name", ["_one_pass", "_split"])
def test_attention(name: str, tmp_path: Path) -> None:
    binary = attention(name)
    assert_fits(binary, tmp_path)
    assert_streams(binary)
    assert binary.metadata.shared <= SHARED_MEMORY_BYTES // 2, "two programs per processor"


@pytest.mark.parametrize(
    "name, head, dtype, sizes",
    [
        ("_one_pass", 256, "bf16", {}),
        ("_split", 256, "bf16", {"L": 3, "PER": 16, "ROWS": 64}),
        ("_one_pass", 256, "fp32", {}),
    ],
)
def test_large_heads_fit_devices_with_little_shared_memory(
    name: str, head: int, dtype: str, sizes: dict[str, int]
) -> None:
    binary = attention(name, head, dtype, L40S, **sizes)
    assert binary.metadata.shared <= LEAST_SHARED_MEMORY_BYTES


@pytest.mark.parametrize("splits", [16, decode_attention.MOST_SPLITS])
def test_joining_splits(splits: int, tmp_path: Path) -> None:
    constants = HEADS | {"BLOCK_S": triton.next_power_of_2(splits), "WINDOWS": True}
    assert_fits(compiled(decode_attention._combine, constants, num_warps=2), tmp_path)


def test_batch_sizes_share_what_is_compiled() -> None:
    """Splits follow from batch and cache: as constants they cost a compilation for each pair."""
    varies = {"splits", "SPLITS", "parts", "PARTS", "rows", "max_blocks"}
    for kernel in (decode_attention._split, decode_attention._combine, experts._route,
                   experts._gate_up, experts._down):  # fmt: skip
        found = [p for p in kernel.params if p.name in varies]
        assert found and all(p.do_not_specialize and not p.is_constexpr for p in found)


def test_routing(tmp_path: Path) -> None:
    sizes = {"EXPERTS": 256, "BINS": 512, "CHUNK": 1024, "BLOCK_M": 16}
    assert_fits(compiled(experts._route, sizes, num_warps=4), tmp_path)


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("_heads", {"H": 16, "QK": 20, "HALF": 64, "BLOCK": 64, "NORM": True, "GATE": True}),
        ("_store", {"L": 2, "G": 4, "K": 128, "BLOCK_K": 128}),
        ("_choose", {"EXPERTS": 272, "BINS": 512, "TOP_K": 8, "BLOCK_J": 8, "ROWS_PER_SLOT": 2,
                     "BIAS": True}),
    ],
)  # fmt: skip
def test_row_kernels(name: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    weight = "*fp32" if name == "_choose" else "*bf16"
    assert_fits(compiled(getattr(rows, name), sizes, weight, num_warps=1), tmp_path)


def expert_kernel(name: str, block_m: int, x: str, weight: str, target: GPUTarget = H200) -> Any:
    """Compile a kernel of the experts with the tile that it is started with."""
    tiles = choose_tiles(block_m * 128, 256)  # each expert gets half a block
    assert tiles.block_m == block_m
    tile = tiles.gate_up if name == "_gate_up" else tiles.down
    constants = tile.arguments(4 if x == "*fp32" else 2) | {"BLOCK_M": block_m}
    constants |= {"D": 2048, "F": 1024, "TOP_K": 8, "SCALED": weight == "*fp8e4nv"}
    constants["PRECISION"] = "ieee" if x == "*fp32" else "tf32"
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
    kernel = getattr(experts, name)
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    return compiled(kernel, constants, weight, x, target, **options)


@pytest.mark.parametrize("weight", ["*bf16", "*fp8e4nv"])
@pytest.mark.parametrize("block_m", [16, 32, 64])
@pytest.mark.parametrize("name", ["_gate_up", "_down"])
def test_experts(name: str, block_m: int, weight: str, tmp_path: Path) -> None:
    binary = expert_kernel(name, block_m, "*bf16", weight)
    assert_fits(binary, tmp_path)
    assert_streams(binary)
    assert binary.metadata.shared <= SHARED_MEMORY_BYTES // 2, "two programs per processor"
    assert "cvt.bf16.f16" not in binary.asm["ptx"], "an F2F for each number"


@pytest.mark.parametrize("name", ["_gate_up", "_down"])
def test_warps_share_the_columns(name: str) -> None:
    """With 32 x 32 of two products every warp read and widened all weights, and multiplied twice.

    32 rows x 128 columns x 64 inner numbers in pieces of 16 x 8 x 16, over 4 warps: 32.
    """
    assert expert_kernel(name, 32, "*bf16", "*bf16").asm["ptx"].count("mma.sync") == 32


@pytest.mark.parametrize("name", ["_one_pass", "_split", "_gate_up", "_down"])
def test_float32_fits_too(name: str) -> None:
    """Twice the bytes an element, half the stages: more than one program per processor."""
    if hasattr(decode_attention, name):
        binary = attention(name, dtype="fp32")
    else:
        binary = expert_kernel(name, 32, "*fp32", "*fp32")
    assert binary.metadata.shared <= SHARED_MEMORY_BYTES // 2


@pytest.mark.parametrize("name", ["_gate_up", "_down"])
def test_experts_fit_devices_with_little_shared_memory(name: str) -> None:
    binary = expert_kernel(name, 64, "*bf16", "*bf16", L40S)
    assert binary.metadata.shared <= LEAST_SHARED_MEMORY_BYTES
