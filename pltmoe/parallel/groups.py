"""Process groups. Only this file calls Megatron's ``parallel_state``; others get a collection."""

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from pltmoe.parallel.layout import Layout


def create_groups(layout: Layout) -> ProcessGroupCollection:
    """Create the groups of ``layout`` over the running processes.

    Megatron still looks some groups up in its global state, so they are made there and handed out
    from there.
    """
    if not parallel_state.model_parallel_is_initialized():
        staged = layout.pipeline_parallel_size > 1 and layout.loop_chunks > 1
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor_parallel_size,
            pipeline_model_parallel_size=layout.pipeline_parallel_size,
            virtual_pipeline_model_parallel_size=layout.loop_chunks if staged else None,
            context_parallel_size=layout.context_parallel_size,
            expert_model_parallel_size=layout.expert_parallel_size,
            expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
            create_gloo_process_groups=False,
        )
    return ProcessGroupCollection.use_mpu_process_groups()


def destroy_groups() -> None:
    """Forget all groups; harmless when there are none."""
    parallel_state.destroy_model_parallel()
