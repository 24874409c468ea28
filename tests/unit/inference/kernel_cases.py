"""Kernels against their plain versions: the cases, run by the interpreter here, by tests/gpu there.

TRITON_INTERPRET=1 python -m tests.unit.inference.kernel_cases

prints the largest error of every case, relative to the largest value, as JSON. The interpreter has
to be chosen before Triton is imported, so test_kernels.py starts this as a process of its own.
"""

import json
import os
from typing import Any

import torch
from torch import Tensor

from pltmoe.inference import attention as plain_attention
from pltmoe.inference import cache as plain_cache
from pltmoe.inference import experts as plain_experts
from pltmoe.inference import rows as plain_rows

# b, L, h, g, k, n, w; lengths: unequal, one slot, a full cache; windows: full or not yet.
ATTENTION: dict[str, dict[str, Any]] = {
    "plt2_gqa": {"L": 2, "h": 4, "g": 2},
    "plt3_gqa": {"L": 3, "h": 8, "g": 2},
    "plt2_mha": {"L": 2, "h": 3, "g": 3},
    "vanilla": {"L": 1, "h": 4, "g": 2},
    "shared_kv_without_window": {"L": 2, "h": 4, "g": 2, "window": False},
    "window_not_full": {"L": 2, "h": 4, "g": 2, "w": 64, "lengths": (1, 7, 40)},
    "odd_head_size": {"L": 2, "h": 4, "g": 2, "k": 24},
    "large_head": {"L": 2, "h": 4, "g": 2, "k": 256},
    "cache_of_a_larger_tensor": {"L": 2, "h": 4, "g": 2, "sliced": True},
}
SPLITS = (1, 3)
EXPERTS: dict[str, dict[str, Any]] = {
    "one_row": {"t": 1, "e": 8},
    "most_unused": {"t": 3, "e": 64},
    "one_expert_gets_all_rows": {"t": 40, "e": 4, "top_k": 1, "only": 2},
    "two_blocks_of_an_expert": {"t": 40, "e": 3},
    "odd_sizes": {"t": 5, "e": 5, "top_k": 3, "d": 40, "f": 24},
    "rows_not_of_16_bytes": {"t": 5, "e": 5, "d": 20, "f": 12},
    "all_used": {"t": 24, "e": 4, "top_k": 4},
    "blocks_of_64": {"t": 96, "e": 4, "top_k": 2},
    "fp8_weights": {"t": 6, "e": 4, "fp8": True},
}


def attention_inputs(
    device: str, dtype: torch.dtype, L: int, h: int, g: int, k: int = 16, n: int = 150,
    w: int = 20, lengths: tuple[int, ...] = (1, 150, 97), window: bool = True,
    sliced: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Random arguments of decode_attention; slots that must not be read hold NaN."""
    generator, b = torch.Generator(device).manual_seed(1), len(lengths)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(dtype)

    if sliced:  # one layer of a cache [b, n, layers, g, k]
        k_bgnk, v_bgnk = (random(b, n, 2, g, k)[:, :, 1].transpose(1, 2) for _ in range(2))
    else:
        k_bgnk, v_bgnk = random(b, g, n, k), random(b, g, n, k)
    length_b = torch.tensor(lengths, device=device)
    for i, length in enumerate(lengths):
        k_bgnk[i, :, length:] = v_bgnk[i, :, length:] = float("nan")
    arguments = [random(b, L, h, k), k_bgnk, v_bgnk, length_b]
    if window:
        wk, wv = random(b, L - 1, g, w, k), random(b, L - 1, g, w, k)
        gate = torch.rand(b, L, h, device=device).to(dtype)
        arguments += [wk, wv, length_b.clamp(max=w), gate]
    return tuple(arguments)


def expert_inputs(
    device: str, dtype: torch.dtype, t: int, e: int, top_k: int = 2, d: int = 48, f: int = 32,
    only: int | None = None, fp8: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Random arguments of experts; weights of unused experts are NaN: they must not be read."""
    generator = torch.Generator(device).manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    expert_te = random(t, e).argsort(-1)[:, :top_k]
    if only is not None:
        expert_te = torch.full_like(expert_te, only)
    x_td, weight_te = random(t, d), random(t, top_k).sigmoid()
    gate_up, down = random(e, 2 * f, d) / d**0.5, random(e, d, f) / f**0.5
    values = [x_td.to(dtype), expert_te, weight_te.to(dtype)]
    if fp8:
        (gate_up, gate_up_scale), (down, down_scale) = map(plain_experts.quantize, (gate_up, down))
        return (*values, gate_up, down, gate_up_scale, down_scale)
    unused = [i for i in range(e) if i not in expert_te]
    gate_up[unused] = down[unused] = float("nan")
    return (*values, gate_up.to(dtype), down.to(dtype))


PROJECT: dict[str, dict[str, Any]] = {
    "gate_of_the_query": {},
    "gate_of_the_hidden_state": {"hidden": True},
    "no_norm": {"norm": False},
    "vanilla_heads": {"gate": False},
}


def project_inputs(
    device: str, dtype: torch.dtype, norm: bool = True, gate: bool = True, hidden: bool = False
) -> tuple[Any, ...]:
    """Random arguments of ``project``: 5 rows, 4 heads (2 KV) of 24."""
    generator = torch.Generator(device).manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(dtype)

    angle = random(5, 1, 12).float().repeat(1, 1, 2)
    return (
        random(5, 32), random(32), random(8 * 24, 32) / 4, random(6, 24) if norm else None,
        random(4, 32 if hidden else 24) / 4 if gate else None, random(4) if gate else None,
        (angle.cos().to(dtype), angle.sin().to(dtype)), plain_rows.Sizes(4, 24, 1e-6, hidden),
    )  # fmt: skip


def project_error(name: str, device: str, dtype: torch.dtype) -> float:
    """Compare q, k, v and gate with the plain version's in float64; return the worst."""
    from pltmoe.inference.kernels.rows import project

    inputs = project_inputs(device, dtype, **PROJECT[name])
    exact = [x.double() if isinstance(x, Tensor) else x for x in inputs]
    exact[6] = tuple(x.double() for x in inputs[6])
    pairs = zip(project(*inputs), plain_rows.project(*exact), strict=True)
    assert PROJECT[name].get("gate", True) == (project(*inputs)[3] is not None)
    return max(relative_error(a, b) for a, b in pairs if a is not None)


CHOOSE = {
    "one_loop": (False, 1),
    "biased": (True, 1),
    "slots": (False, 3),
    "biased_slots": (True, 2),
}
"""Whether with a bias, and rows of a slot."""


def choose_error(name: str, device: str) -> float:
    """Compare weights with the plain version's; other experts are an infinite error."""
    from pltmoe.inference.kernels.rows import choose

    biased, rows_per_slot = CHOOSE[name]
    generator = torch.Generator(device).manual_seed(4)
    logits_te = torch.randn(6, 20, device=device, generator=generator)
    bias_e = torch.randn(20, device=device, generator=generator) if biased else None
    expert_tj, weight_tj = choose(logits_te, bias_e, 3, rows_per_slot)
    expected_tj, plain_tj = plain_rows.choose(logits_te, bias_e, 3, rows_per_slot)
    same = torch.equal(expert_tj, expected_tj)
    return relative_error(weight_tj, plain_tj) if same else float("inf")


def store_error(rings: bool, device: str, dtype: torch.dtype) -> float:
    """Compare caches and rings; k and v are parts of larger tensors, as after a product."""
    from pltmoe.inference.kernels.rows import store

    loops = 3 if rings else 1
    generator = torch.Generator(device).manual_seed(5)
    qkv = torch.randn(2, loops, 8, 24, device=device, generator=generator).to(dtype)
    slot_b = torch.tensor([0, 6], device=device)
    written = []
    for write in (store, plain_cache.store):
        full = torch.zeros(2, 2, 2, 2, 9, 24, device=device, dtype=dtype)[:, :, 1]
        ring = torch.zeros(2, 2, 2, 2, 5, 24, device=device, dtype=dtype)
        into = (*ring, slot_b % 5) if rings else ()
        write(qkv[..., 4:6, :], qkv[..., 6:, :], *full, slot_b, *into)
        written.append(torch.cat([full.flatten(), ring.flatten()]))
    return relative_error(*written)


def far_error() -> float:
    """Use a cache whose third head begins 2^31 numbers after its first."""
    from pltmoe.inference.kernels.decode_attention import decode_attention
    from pltmoe.inference.kernels.rows import store

    sizes: dict[str, Any] = {"L": 2, "h": 3, "g": 3, "n": 40, "lengths": (29,), "window": False}
    q_bLhk, near, _, length_b = attention_inputs("cpu", torch.float16, **sizes)
    far = torch.empty(2**31 + near[0, 0].numel(), dtype=near.dtype)
    far = far.as_strided(near.shape, (0, 2**30, near.size(3), 1)).copy_(near)
    both = [
        torch.cat([decode_attention(q_bLhk, x, x, length_b, splits=splits) for splits in SPLITS])
        for x in (near, far)
    ]
    for x in (near, far):
        store(q_bLhk, q_bLhk, x, x, length_b)
    written = [x[:, :, :30].reshape(3, -1) for x in (near, far)]
    return max(relative_error(*both), relative_error(*written))


STEPS = ("plt2", "plt3_normed", "plt2_routing", "clp")
"""Models of tests/unit/inference/models.py that decode through the kernels."""


def step_error(name: str) -> float:
    """Read two prompts of unequal lengths and decode three slots with kernels and without."""
    from pltmoe.inference.cache import StaticCache
    from pltmoe.inference.kernels.decode_attention import decode_attention
    from pltmoe.inference.kernels.experts import experts
    from pltmoe.inference.kernels.rows import choose, project, store
    from pltmoe.inference.model import Kernels, PLTDecoder
    from pltmoe.inference.prefill import prefill
    from pltmoe.inference.weights import random_weights
    from tests.unit.inference.models import model

    weights, logits = random_weights(model(name), "cpu", torch.float32), []
    for kernels in (Kernels(), Kernels(decode_attention, experts, project, store, choose)):
        decoder = PLTDecoder(weights, 32, kernels)
        cache = StaticCache(decoder.m, 2, 32, "cpu", torch.float32)
        prefill(PLTDecoder(weights, 32), cache, [[1, 2, 3, 4, 5, 6, 7, 8, 9], [3]])
        steps = [decoder.step(torch.tensor([5 + i, 11 - i]), cache) for i in range(3)]
        logits.append(torch.stack(steps))
    return relative_error(logits[1], logits[0])


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return the largest error, relative to the largest expected value; NaN stays NaN."""
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def attention_error(name: str, splits: int | None, device: str, dtype: torch.dtype) -> float:
    """Compare one case with the plain version in float64."""
    from pltmoe.inference.kernels.decode_attention import decode_attention

    inputs = attention_inputs(device, dtype, **ATTENTION[name])
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    exact[1:3] = [x.nan_to_num() for x in exact[1:3]]  # the plain version multiplies by zero
    expected = plain_attention.decode_attention(*exact)
    return relative_error(decode_attention(*inputs, splits=splits), expected)


def expert_error(name: str, device: str, dtype: torch.dtype) -> float:
    """Compare one case with the plain version, in float64 unless the weights are FP8."""
    from pltmoe.inference.kernels.experts import experts

    inputs = expert_inputs(device, dtype, **EXPERTS[name])
    exact = [x.double() if x.dtype in (dtype, torch.float32) else x for x in inputs]
    if EXPERTS[name].get("fp8"):
        exact = [x.float() if x.dtype == torch.float64 else x for x in exact]
    return relative_error(experts(*inputs), plain_experts.experts(*exact))


def let_the_interpreter_count() -> None:
    """NumPy 2.4 and later refuse ``int`` of an array of one element, Triton 3.6 asks for it."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def main() -> None:
    """Run every case on the CPU."""
    assert os.environ.get("TRITON_INTERPRET") == "1"
    let_the_interpreter_count()
    errors = {
        f"{name}-{splits}": attention_error(name, splits, "cpu", torch.float32)
        for name in ATTENTION
        for splits in SPLITS
    }
    errors |= {name: expert_error(name, "cpu", torch.float32) for name in EXPERTS}
    errors |= {name: project_error(name, "cpu", torch.float32) for name in PROJECT}
    errors |= {name: choose_error(name, "cpu") for name in CHOOSE}
    errors |= {
        f"store-{rings}": store_error(rings, "cpu", torch.float32) for rings in (False, True)
    }
    errors["store-far"] = far_error()
    errors |= {f"step-{name}": step_error(name) for name in STEPS}
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
