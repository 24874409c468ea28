"""What FP8 can do on a device: which recipes run, and what each attention branch computes in.

The one table of it. Linear layers and experts follow the recipe; router, gate, norms, embedding
and output head stay as in bf16. The sources are the checks of Transformer Engine 2.20
(pytorch/quantization.py, attention/dot_product_attention/utils.py, to which a test holds this
table) and, for what cuDNN itself refuses, its frontend's sdpa_fp8_bwd.h.

| recipe     | scales                        | runs on                    | attention in FP8       |
|------------|-------------------------------|----------------------------|------------------------|
| delayed    | per tensor, of earlier steps  | 8.9 and newer              | 9.0 and newer          |
| tensorwise | per tensor, of this one       | 8.9 and newer              | 10.0 and newer         |
| blockwise  | 1 x 128 and 128 x 128         | 9.x, CUDA 12.9 and newer   | never                  |
| mxfp8      | 1 x 32                        | 10.x and 11.x              | 10.x and 11.x          |

A sliding window in FP8 needs 10.0 and cuDNN 9.21: on Hopper the local branch is always bf16.
"""

from dataclasses import dataclass
from typing import Any, Literal

from pltmoe.config.run import Fp8Recipe

Version = tuple[int, ...]
ADA, HOPPER, BLACKWELL, CONSUMER_BLACKWELL = (8, 9), (9, 0), (10, 0), (12, 0)
BLOCKWISE_CUDA = (12, 9)
WINDOW_CUDNN = MXFP8_CUDNN = (9, 21)
BROKEN_MXFP8_CUDNN = ((9, 23, 0), (9, 23, 1))
TENSORWISE_CUDNN = (9, 14)
DETERMINISTIC_BLACKWELL_CUDNN, DETERMINISTIC_CUDNN = (9, 18), (9, 19)
HOPPER_HEAD_DIM = 128


@dataclass(frozen=True)
class Machine:
    """What decides."""

    capability: Version
    """Compute capability of the GPU, e.g. (9, 0)."""
    cudnn: Version
    cuda: Version


@dataclass(frozen=True)
class Branch:
    """What one attention branch computes in, and why."""

    precision: Literal["fp8", "bf16"]
    reason: str

    def __str__(self) -> str:
        return f"{self.precision} ({self.reason})"


def this_machine() -> Machine | None:
    """Describe the current GPU; None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    cudnn = torch.backends.cudnn.version() or 0
    return Machine(
        torch.cuda.get_device_capability(),
        (cudnn // 10000, cudnn // 100 % 100, cudnn % 100),
        tuple(int(part) for part in (torch.version.cuda or "0").split(".")),
    )


def why_recipe_cannot_run(recipe: Fp8Recipe, machine: Machine) -> str | None:
    """Say what is missing for a recipe's matrix products, or return None."""
    capability = machine.capability
    has = f"this is {_dotted(capability)}"
    if recipe in ("delayed", "tensorwise") and capability < ADA:
        return f"recipe {recipe} needs compute capability 8.9 or newer; {has}"
    if recipe == "blockwise" and not HOPPER <= capability < BLACKWELL:
        return f"recipe blockwise is for compute capability 9.x (Hopper); {has}: use mxfp8 there"
    if recipe == "blockwise" and machine.cuda < BLOCKWISE_CUDA:
        return f"recipe blockwise needs CUDA 12.9 or newer; this is {_dotted(machine.cuda)}"
    if recipe == "mxfp8" and not BLACKWELL <= capability < CONSUMER_BLACKWELL:
        return f"recipe mxfp8 is for compute capability 10.x and 11.x (Blackwell); {has}"
    return None


def attention_precision(
    recipe: Fp8Recipe,
    machine: Machine,
    *,
    window: bool,
    head_dim: int,
    deterministic: bool = False,
) -> Branch:
    """Decide what a branch computes in when attention in FP8 is wanted.

    Args:
        recipe: of the run; one that can run.
        machine: where.
        window: the local branch (a sliding window), or the global one.
        head_dim: of queries, keys and values.
        deterministic: only kernels that repeat bit for bit.
    """
    for broken, reason in (
        (recipe == "blockwise", "Transformer Engine has no FP8 attention for recipe blockwise"),
        (machine.capability < HOPPER, "FP8 attention needs compute capability 9.0"),
        (machine.capability >= CONSUMER_BLACKWELL, "no FP8 attention on compute capability 12.x"),
        *_hopper(recipe, machine, window, head_dim),
        *_cudnn(recipe, machine, window, deterministic),
    ):
        if broken:
            return Branch("bf16", reason)
    return Branch("fp8", f"cuDNN {_dotted(machine.cudnn)}, recipe {recipe}")


def _hopper(
    recipe: Fp8Recipe, machine: Machine, window: bool, head_dim: int
) -> tuple[tuple[bool, str], ...]:
    if machine.capability >= BLACKWELL:
        return ()
    return (
        (recipe != "delayed", f"on Hopper recipe {recipe} has no FP8 attention"),
        (window, "on Hopper no cuDNN has a sliding window in FP8"),
        (head_dim != HOPPER_HEAD_DIM, f"on Hopper FP8 needs heads of 128, not {head_dim}"),
    )


def _cudnn(
    recipe: Fp8Recipe, machine: Machine, window: bool, deterministic: bool
) -> tuple[tuple[bool, str], ...]:
    has = _dotted(machine.cudnn)
    blackwell = machine.capability >= BLACKWELL
    return (
        (window and machine.cudnn < WINDOW_CUDNN, f"a window in FP8 needs cuDNN 9.21, not {has}"),
        (
            recipe == "tensorwise" and machine.cudnn < TENSORWISE_CUDNN,
            f"recipe tensorwise needs cuDNN 9.14 for attention, not {has}",
        ),
        (
            recipe == "mxfp8" and machine.cudnn < MXFP8_CUDNN,
            f"recipe mxfp8 needs cuDNN 9.21 for attention, not {has}",
        ),
        (
            recipe == "mxfp8" and machine.cudnn[:3] in BROKEN_MXFP8_CUDNN,
            f"mxfp8 attention of cuDNN {has} is broken",
        ),
        (
            deterministic and blackwell and machine.cudnn < DETERMINISTIC_BLACKWELL_CUDNN,
            f"deterministic FP8 attention needs cuDNN 9.18, not {has}",
        ),
        (
            deterministic and machine.cudnn < DETERMINISTIC_CUDNN,
            f"deterministic FP8 attention needs cuDNN 9.19, not {has}",
        ),
    )


def _dotted(version: Any) -> str:
    return ".".join(map(str, version))
