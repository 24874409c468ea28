"""Steps on the virtual GPU (tests/virtual_gpu.py), which needs a process of its own.

TRITON_INTERPRET=1 python -m tests.unit.virtual_gpu_cases

prints, for every case, where the host waited during one step, as JSON.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from tests import virtual_gpu

virtual_gpu.install()

from pltmoe.inference.engine import Engine, Session  # noqa: E402
from pltmoe.inference.sampling import SamplingOptions  # noqa: E402
from pltmoe.parallel.groups import destroy_groups  # noqa: E402
from pltmoe.train.benchmark.candidates import random_batches  # noqa: E402
from tests.configs import ONE_LOOP  # noqa: E402
from tests.distributed.tiny import build_engine, tiny_config  # noqa: E402
from tests.gpu.test_engine import SLOTS, prompts, weights_on  # noqa: E402

SIZES = {"hidden_size": 64, "head_dim": 16}
"""What PyTorch's grouped product takes."""
LOCAL = {"train__precision": "bf16", "train__transformer_impl": "local"}
TRAINING: dict[str, dict[str, Any]] = {
    "PLT-2": {},
    "vanilla": {f"model__{key}": value for key, value in ONE_LOOP.items()},
    "shared routing": {"model__num_loops": 3, "model__moe_loop_routing": "shared"},
    "recompute all": {"parallel__recompute": "full"},
    "recompute some": {"parallel__recompute": "selective"},
}


def training_step(changes: dict[str, Any], watch: bool = False) -> None:
    """Take a second step in bf16, without Transformer Engine."""
    sizes = {f"model__{key}": value for key, value in SIZES.items()}
    config = tiny_config(**(sizes | LOCAL | changes))
    engine = build_engine(config)
    for step in (1, 2):
        virtual_gpu.HOST_WAITS.clear()
        engine.train_step(random_batches(config, engine.capabilities.layout, step), step, watch)


@torch.no_grad()
def decode_step(name: str, fp8: bool = False) -> None:
    """Decode one slot, after a prefill; drawing from the best tokens, with log-probabilities."""
    dtype = torch.bfloat16 if fp8 else torch.float32
    engine = Engine(weights_on("cuda", name, dtype, fp8=fp8, num_layers=2), SLOTS)
    session = Session(engine.decoder, 3, SLOTS, graph=False)
    options = [SamplingOptions(temperature=1.0, top_k=20, top_p=0.9, seed=s) for s in range(3)]
    session.set_options(options, logprobs=True)
    session.begin(prompts(engine.decoder.m.vocab_size))
    virtual_gpu.HOST_WAITS.clear()
    session.step()


def deliberate() -> None:
    """Mix devices, which raises, and wait in every way that is looked for, a line each."""
    x = torch.arange(4.0, device="cuda")
    with pytest.raises(RuntimeError, match="add: tensors on cuda:0 and on cpu"):
        x + torch.ones(4)
    with pytest.raises(RuntimeError, match="index: tensors on cuda:0 and on cpu"):
        torch.ones(4)[x.long()]
    with pytest.raises(TypeError, match="cannot become an array"):
        x.numpy()
    virtual_gpu.HOST_WAITS.clear()
    x.sum().item()
    x.tolist()
    x.cpu()
    x[x > 1]
    x.copy_(torch.ones(4))
    torch.cuda.Event().synchronize()
    x[x > 1] = 0  # does not
    x.to("cpu", non_blocking=True)


def main() -> None:
    """Run all."""
    cases: dict[str, Callable[[], None]] = {
        **{name: partial(training_step, changes) for name, changes in TRAINING.items()},
        "deliberate": deliberate,
        "watched": partial(training_step, {}, watch=True),
        **{f"decode {name}": partial(decode_step, name) for name in ("plt3", "vanilla")},
        "decode plt2 fp8": partial(decode_step, "plt2", fp8=True),
    }
    found = {}
    for name, case in cases.items():
        with virtual_gpu.VirtualGPU():
            case()
        found[name] = dict(virtual_gpu.HOST_WAITS)
        destroy_groups()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
