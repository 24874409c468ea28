"""The scales of FP8's delayed recipe, which come of earlier passes: saved, and taken back.

Without them a run goes on with scales of 1, in which small gradients vanish, until the next pass
has set them. Transformer Engine would keep them in an "extra state" of every module; that is a
pickle, which it refuses to load by default, and it would be part of the weights. Here they are
plain tensors beside the weights, each rank's own, and a checkpoint without them is whole.

Source: transformer_engine 2.20.2, pytorch/module/base.py (``get_extra_state``,
``set_extra_state``).
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from pltmoe.model.initialize import global_name
from pltmoe.model.plt import PLTModel

_DIRECTIONS = ("scaling_fwd", "scaling_bwd")
_TENSORS = ("scale", "amax_history")


def fp8_scales(model: PLTModel) -> dict[str, Any]:
    """Return the scales of every module that has run, by its name in the whole model.

    Each has ``products`` (how many share the module), and for both directions ``scale`` [tensors]
    and ``amax_history`` [passes, tensors].
    """
    found = {}
    for name, module in _modules(model):
        if all(hasattr(module.fp8_meta.get(way), "amax_history") for way in _DIRECTIONS):
            found[name] = {"products": module.fp8_meta["num_gemms"]} | {
                f"{way}.{what}": getattr(module.fp8_meta[way], what).cpu()
                for way in _DIRECTIONS
                for what in _TENSORS
            }
    return found


def restore_fp8_scales(model: PLTModel, saved: dict[str, Any]) -> None:
    """Take back what ``fp8_scales`` returned, on the same rank of the same layout."""
    from megatron.core.fp8_utils import get_fp8_recipe

    modules = dict(_modules(model))
    for name, scales in saved.items():
        meta = modules[name].fp8_meta
        meta["num_gemms"] = scales["products"]
        modules[name].init_fp8_meta_tensors(get_fp8_recipe(model.config))
        for way in _DIRECTIONS:
            for what in _TENSORS:
                getattr(meta[way], what).copy_(scales[f"{way}.{what}"])


def forget_what_was_not_trained(model: PLTModel) -> None:
    """Drop what must not enter the next scales; to be called between steps.

    Passes without gradients collect in the first row of a history, which is zero else. A step that
    was skipped may have left what is not finite: its scales would stand still until it has left
    the history.
    """
    for _, module in _modules(model):
        for way in _DIRECTIONS:
            if hasattr(module.fp8_meta.get(way), "amax_history"):
                history = module.fp8_meta[way].amax_history
                history[0].zero_()
                history.nan_to_num_(nan=0.0, posinf=0.0)


def _modules(model: PLTModel) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if hasattr(module, "fp8_meta"):
            yield global_name(model, name), module
