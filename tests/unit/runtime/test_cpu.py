"""What stands in for CUDA: devices, dtype names, random state, and nothing else."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pltmoe.runtime import cpu
from pltmoe.runtime.cpu import is_standing_in, stand_in_for_cuda
from tests.distributed.run_files import finish, make_files, start_ranks
from tests.repository import REPOSITORY, run_python

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a GPU: nothing stands in for it"
)


def test_standing_in_twice_changes_nothing() -> None:
    before = torch.zeros
    assert stand_in_for_cuda() and is_standing_in()
    assert torch.zeros is before


def test_cuda_devices_mean_the_cpu() -> None:
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.tensor([1.0], device=torch.device("cuda", 0)).device.type == "cpu"
    assert torch.zeros(2).to("cuda:0").device.type == "cpu"
    assert torch.zeros(2).cuda().device.type == "cpu"
    assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"
    assert torch.zeros(2).to(torch.float64).dtype == torch.float64


def test_types_have_the_names_megatron_compares_with() -> None:
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1).bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64


def test_device_context_still_reaches_the_factories() -> None:
    """Modules that transformers builds on "meta" once held garbage, without an error."""
    with torch.device("meta"):
        assert torch.zeros(2).device.type == "meta"
        assert torch.arange(3).device.type == "meta"
        assert torch.nn.Linear(2, 2).weight.device.type == "meta"
    assert torch.zeros(2).device.type == "cpu"


def test_random_state_round_trip() -> None:
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_nothing_is_touched_where_there_is_a_gpu() -> None:
    script = (
        "import torch; torch.cuda.is_available = lambda: True;"
        "before = torch.zeros, torch.Tensor.to;"
        "from pltmoe.runtime.cpu import stand_in_for_cuda, is_standing_in;"
        "assert not stand_in_for_cuda() and not is_standing_in();"
        "assert (torch.zeros, torch.Tensor.to) == before; print('untouched')"
    )
    done = run_python("-c", script)
    assert done.stdout.strip() == "untouched", done.stderr


def test_kernels_of_a_gpu_are_not_called_because_they_can_be_imported(
    groups: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Transformer Engine on a machine without a GPU the router's product once ended the run.

    Here stands what Megatron leaves behind when it could import the library.
    """
    import megatron.core.optimizer as optimizers
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
    from megatron.core.transformer.moe import moe_utils

    def kernel(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Found no NVIDIA driver on your system")

    for module, names in {
        moe_utils: ("te_general_gemm",),
        optimizers: ("Adam", "SGD"),
        distrib_optimizer: ("Adam",),
        optimizer: ("multi_tensor_applier", "multi_tensor_scale_impl"),
        clip_grads: ("multi_tensor_applier", "multi_tensor_scale_impl", "l2_norm_impl",
                     "multi_tensor_scale_tensor_impl"),
    }.items():  # fmt: skip
        for name in names:
            monkeypatch.setattr(module, name, kernel)
    monkeypatch.setattr(optimizers, "USING_PYTORCH_OPTIMIZER", False)
    for name in ("HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER"):
        monkeypatch.setattr(distrib_optimizer, name, True)
    cpu._put_torch_arithmetic_back()
    weight = torch.ones(4, 8, requires_grad=True)
    scores = moe_utils.router_gating_linear(torch.ones(2, 8), weight, None, torch.float32)
    scores.sum().backward()
    assert torch.equal(scores, torch.full((2, 4), 8.0)) and weight.grad is not None
    norm = clip_grads.get_grad_norm_fp32([weight.grad])
    assert isinstance(norm, float) and norm == pytest.approx(2 * 32**0.5)
    clip_grads.clip_grad_by_total_norm_fp32([weight], 1.0, norm)
    assert weight.grad.norm() == pytest.approx(1.0, rel=1e-4)
    flag = torch.zeros(1, dtype=torch.int32)
    optimizer._multi_tensor_copy_this_to_that([torch.ones(2)], [copy := torch.zeros(2)], flag)
    assert copy.tolist() == [1.0, 1.0]
    assert optimizers.Adam is torch.optim.AdamW and optimizers.USING_PYTORCH_OPTIMIZER
    assert not distrib_optimizer.HAVE_APEX_OR_TE and not distrib_optimizer.USING_TE_OPTIMIZER


def test_a_run_trains_and_resumes_where_transformer_engine_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")
    config = make_files(tmp_path)
    paths = {"PYTHONPATH": ":".join(filter(None, [str(REPOSITORY), *sys.path]))}
    for steps in ("4", "8"):
        more = (f"train.steps={steps}", "optimizer.decay_steps=8")
        codes, outputs = finish(start_ranks(config, *more, **paths))
        assert codes == [0], outputs[0]
        assert re.search(r"^  optimizer +torch \(there is no GPU\)$", outputs[0], re.MULTILINE)
    assert "step 8/8" in outputs[0] and "resume" in outputs[0]
