"""A process group of one, so that Megatron's modules can be built inside the test process."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pltmoe.config import ModelConfig


@pytest.fixture(scope="session")
def pg_collection(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Megatron's process groups for a single process."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if not dist.is_initialized():
        store = tmp_path_factory.mktemp("store") / "store"
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    return ProcessGroupCollection.use_mpu_process_groups()


@pytest.fixture
def build(pg_collection: Any) -> Callable[..., Any]:
    """``build(model_config, dtype)`` returns an initialised PLTModel with gates away from 0."""
    from pltmoe.model.initialize import initialize
    from pltmoe.model.megatron_config import transformer_config
    from pltmoe.model.plt import PLTModel

    def build_model(model: ModelConfig, dtype: torch.dtype = torch.float64) -> PLTModel:
        plt = PLTModel(model, transformer_config(model, params_dtype=dtype), pg_collection)
        initialize(plt, seed=3)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for name, tensor in plt.state_dict(keep_vars=True).items():
                # What starts at a constant would hide errors: gates, norms, expert biases.
                if tensor is not None and ("plt_gate" in name or "norm" in name):
                    tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.3)
                if tensor is not None and "expert_bias" in name:
                    tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.05)
        return plt

    return build_model
