"""Megatron models inside the test process: a process group of one, on the CPU or the first GPU."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pltmoe.config import ModelConfig
from pltmoe.model.initialize import global_name
from pltmoe.model.reference import ReferencePLT
from tests.state_dicts import megatron_to_hf


def device() -> torch.device:
    """Where models of this process live."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def create_single_process_groups(folder: Path) -> Any:
    """Start (once) a world of one process and return Megatron's groups."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend, init_method=f"file://{folder / 'store'}", rank=0, world_size=1
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    return ProcessGroupCollection.use_mpu_process_groups()


def build_model(
    model: ModelConfig, groups: Any, dtype: torch.dtype, transformer_impl: Any = "local"
) -> Any:
    """Return an initialised PLTModel whose gates, norms and expert biases are not constant.

    What starts at a constant would hide errors.
    """
    from pltmoe.model.initialize import initialize
    from pltmoe.model.megatron_config import transformer_config
    from pltmoe.model.plt import PLTModel

    config = transformer_config(model, params_dtype=dtype, transformer_impl=transformer_impl)
    plt = PLTModel(model, config, groups)
    initialize(plt, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, tensor in plt.state_dict(keep_vars=True).items():
            if name.endswith("_extra_state"):
                continue
            scale = 0.3 if "plt_gate" in name or "norm" in name else 0.05
            if tensor is not None and (scale == 0.3 or "expert_bias" in name):
                tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor) * scale)
    return plt


def reference_of(plt: Any, model: ModelConfig) -> ReferencePLT:
    """Return the float64 reference with the weights of ``plt``, on the same device."""
    state = {
        global_name(plt, name): tensor.double()
        for name, tensor in plt.state_dict().items()
        if isinstance(tensor, Tensor) and "_extra_state" not in name
    }
    reference = ReferencePLT(model).double().to(device())
    reference.load_state_dict(megatron_to_hf(state, model), strict=not model.tied_embeddings)
    return reference


def packed_batch(model: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels, positions [2, 19]; the second sequence holds three documents."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, model.vocab_size, (2, 20), generator=generator).to(device())
    positions = torch.arange(19).repeat(2, 1)
    positions[1, 7:12] = torch.arange(5)
    positions[1, 12:] = torch.arange(7)
    return tokens[:, :-1], tokens[:, 1:], positions.to(device())
