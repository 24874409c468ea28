"""Master weights and Adam's moments by the name of a weight, wherever a ZeRO stage keeps them.

| stage | fp32 masters and moments                                         | class             |
|-------|------------------------------------------------------------------|-------------------|
| 0     | whole on every rank; the weights are the masters                 | ``WholeState``    |
| 1, 2  | a flat tensor per parameter group, cut over ranks                | ``CutState``      |
| 3     | each weight cut, the parts of a subgroup in a flat tensor, which | ``SubgroupState`` |
|       | may lie on a disk and then is read and written as one            |                   |
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

MASTER = "param"
KINDS = (MASTER, "exp_avg", "exp_avg_sq")
"""Optimizer state of a weight, under Megatron's names."""


class WholeState:
    """Optimizer state of one rank.

    Args:
        engine: DeepSpeed's.
        adam: the optimizer whose update it calls.
        weights: the model's by name.
    """

    def __init__(self, engine: Any, adam: torch.optim.Optimizer, weights: dict[str, nn.Parameter]):
        self._engine, self._adam, self._weights = engine, adam, weights

    def allocate(self) -> None:
        """Allocate Adam's moments as the first step would, so that they can be saved and filled."""
        for group in self._adam.param_groups:
            for flat in group["params"]:
                self._allocate(flat, fused=group.get("fused", False))

    def _allocate(self, flat: Tensor, fused: bool) -> None:
        count: Tensor | int = 0
        if isinstance(self._adam, torch.optim.AdamW):
            count = torch.zeros((), device=flat.device if fused else "cpu")
        moments = {kind: torch.zeros_like(flat) for kind in KINDS[1:]}
        self._adam.state[flat] = {"step": count, **moments}

    def whole_weights(self, changed: bool = False) -> AbstractContextManager[Any]:
        """Hold whole weights where ranks have parts; keep what is ``changed``, on rank 0."""
        return nullcontext()

    def subgroups(self) -> Mapping[int, list[str]]:
        """Return the names of weights whose state is held together."""
        return {0: list(self._weights)}

    def in_memory(self, subgroup: int, changed: bool) -> AbstractContextManager[Any]:
        """Hold the state of a subgroup; write back what is ``changed``."""
        return nullcontext()

    def get(self, name: str, kind: str) -> Tensor:
        """Return state of a weight, whole; collective. In host memory if it had to be gathered."""
        weight = self._weights[name]
        return weight.detach() if kind == MASTER else self._adam.state[weight][kind]

    def set(self, name: str, kind: str, value: Tensor) -> None:
        """Take state of a weight, given whole on each rank."""
        self.get(name, kind).copy_(value)

    def set_updates(self, updates: int) -> None:
        """Set how many updates Adam has made."""
        for state in self._adam.state.values():
            if isinstance(state["step"], Tensor):
                state["step"].fill_(updates)
            else:
                state["step"] = updates

    def start(self) -> None:
        """Make masters of the model's weights."""


class CutState(WholeState):
    """Of ZeRO stages 1 and 2."""

    def allocate(self) -> None:
        """Also tell each weight where in the flat tensors its state is."""
        super().allocate()
        self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def get(self, name: str, kind: str) -> Tensor:
        """Gather it; see the base class."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        weight = self._weights[name]
        if kind == MASTER:
            value = safe_get_full_fp32_param(weight)
        else:
            value = safe_get_full_optimizer_state(weight, kind)
        return value.reshape(weight.shape).cpu()

    def set(self, name: str, kind: str, value: Tensor) -> None:
        """Take this rank's part of it."""
        self._weights[name].set_full_hp_param(value, None if kind == MASTER else kind)  # type: ignore[attr-defined]

    def start(self) -> None:
        """See the base class."""
        self._engine.optimizer.refresh_fp32_params()


class SubgroupState(WholeState):
    """Of ZeRO stage 3."""

    def allocate(self) -> None:
        """See the base class."""
        fused = self._adam.param_groups[0].get("fused", False)
        for number, flat in enumerate(self._engine.optimizer.fp32_partitioned_groups_flat):
            with self.in_memory(number, changed=True):
                self._allocate(flat, fused)

    def whole_weights(self, changed: bool = False) -> AbstractContextManager[Any]:
        """See the base class."""
        import deepspeed  # deepspeed.py has imported it, without its noise

        weights = list(self._weights.values())
        return deepspeed.zero.GatheredParameters(weights, modifier_rank=0 if changed else None)

    def subgroups(self) -> Mapping[int, list[str]]:
        """See the base class."""
        found: dict[int, list[str]] = {}
        for name in self._weights:
            found.setdefault(self._place(name)[0], []).append(name)
        return found

    @contextmanager
    def in_memory(self, subgroup: int, changed: bool) -> Iterator[None]:
        """Read a subgroup from its disk."""
        zero = self._engine.optimizer
        on_disk = zero._swappable_optimizer_subgroup(subgroup)
        if on_disk:
            zero._optimizer_states_and_gradient_swap_in(subgroup)
        yield
        if on_disk and changed:
            zero._optimizer_states_and_gradient_swap_out(subgroup)
        elif on_disk:
            zero._release_swap_buffers(subgroup)

    def get(self, name: str, kind: str) -> Tensor:
        """Gather it; see the base class."""
        weight = self._weights[name]
        part = self._part(name, kind).to(weight.device)
        whole = self._engine.optimizer._fp32_state_allgather(weight, part)
        return whole.reshape(weight.ds_shape).cpu()  # type: ignore[attr-defined]

    def set(self, name: str, kind: str, value: Tensor) -> None:
        """Take this rank's part of it."""
        part = self._part(name, kind)
        rank = self._engine.optimizer._get_param_partition_rank(self._weights[name])
        mine = value.flatten()[part.numel() * rank :][: part.numel()]
        part.zero_()[: mine.numel()].copy_(mine)  # the last rank's part is padded

    def start(self) -> None:
        """See the base class."""
        for number, names in self.subgroups().items():
            with self.in_memory(number, changed=True):
                for name in names:
                    own = self._weights[name].ds_tensor.detach()  # type: ignore[attr-defined]
                    self._part(name, MASTER).copy_(own)

    def _place(self, name: str) -> tuple[int, int, int]:
        """Return where this rank's part of a weight is: subgroup, first number, numbers."""
        zero = self._engine.optimizer
        return zero.grad_position[zero.get_param_id(self._weights[name])]

    def _part(self, name: str, kind: str) -> Tensor:
        number, start, size = self._place(name)
        flat = self._engine.optimizer.fp32_partitioned_groups_flat[number]
        whole = flat if kind == MASTER else self._adam.state[flat][kind]
        return whole.detach()[start : start + size]


STATES: dict[int, type[WholeState]] = {0: WholeState, 1: CutState, 2: CutState, 3: SubgroupState}
"""By ZeRO stage."""
