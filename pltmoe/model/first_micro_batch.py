"""What Transformer Engine has to know at the beginning of a step, in a model that loops.

Its modules carry a flag, ``is_first_microbatch``, that means two things at once: make the FP8 copy
of the weight anew, and (with fused weight gradients) let this pass's gradient *overwrite*
``main_grad`` instead of adding to it. Megatron-core raises it on every module at the first micro
batch, and a module lowers it after its first use. In a looped model that first use is loop 1, whose
backward pass comes last: it would overwrite what the later loops have added. So with fused weight
gradients the flag stays down, and the copies are thrown away instead; whoever misses one makes it.
Megatron's own linear layers (tensor_parallel/layers.py) have no such flag: Apex's product adds.

Sources: transformer_engine 2.20.2, pytorch/module/linear.py (``accumulate_wgrad_into_param_
main_grad``, ``_fp8_workspaces``); megatron-core 0.19.2, extensions/transformer_engine.py.
"""

from typing import Any

from megatron.core.transformer.module import MegatronModule


def begin_step(model: MegatronModule) -> None:
    """Let a step use its own weights, and add up the gradients of all loops.

    Call it before the first micro batch of a step (and of a validation); gradient buffers are
    zero then. Does nothing for layers that are not Transformer Engine's.
    """
    if not model.config.gradient_accumulation_fusion:
        model.set_is_first_microbatch()
        return
    for module in model.modules():
        if hasattr(module, "is_first_microbatch"):
            module.is_first_microbatch = False
            if model.config.fp8:
                module._fp8_workspaces.clear()


def keep_flags_down(wrapper: Any) -> None:
    """Keep Megatron's schedules, which are given this wrapper, from raising the flags."""
    if wrapper.config.gradient_accumulation_fusion:
        wrapper.set_is_first_microbatch = _nothing


def _nothing() -> None:
    """Stand in for ``set_is_first_microbatch``."""
