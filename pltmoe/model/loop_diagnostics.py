"""What each loop does to the hidden states: how far it moves them, where to; what the shift costs.

Taken on logged steps only, from H_l, the output of the stack in loop l before any norm, and from
what the cross-loop shift hands on. Sums over tokens, so they add up over micro batches and ranks.

    u_l = H_l - H_{l-1}                    the update of loop l, slot by slot
    update_size    |u_l| / |H_{l-1}|       small: the loop changes little
    update_cosine  cos(u_l, H_{l-1})       below 0 takes back, about 0 adds new, above 0 enlarges
    update_turn    cos(u_l, u_{l-1})       l > 2; near -1: loops undo each other
    slot_distance  |h[i] - h[i-1]| / |h[i]|, and slot_cosine of the two: what loop l + 1 gets from
                   slot i - 1, against the slot's own; h = H_l, normed if the model does that

The first slot of a sequence gets nothing shifted in, so later loops leave it as it was. What is
left there is rounding: tokens with an update of less than 1e-4 have a size, but no direction.

Letters: s slots, b sequences, d hidden size.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from pltmoe.config.model import ModelConfig
from pltmoe.model.reference import at_least_float32

_PREFIX = "diagnostics."
_TINY = 1e-20
_HAS_DIRECTION = 1e-4


class LoopDiagnostics(nn.Module):
    """Sums of one rank, the loop as only axis. Never saved in a checkpoint."""

    def __init__(self, model: ModelConfig, device: torch.device | int):
        super().__init__()
        loops = model.num_loops
        names = ["update_size", "updates", "update_cosine", "directions"] if loops > 1 else []
        names += ["update_turn", "turns"] if loops > 2 else []
        names += ["slot_distance", "slot_cosine", "slots"] if model.cross_loop_shift else []
        for name in names:
            zeros = torch.zeros(loops, dtype=torch.float32, device=device)
            self.register_buffer(name, zeros, persistent=False)
        self._loops, self._is_watching = loops, False
        self._before: dict[int, tuple[Tensor, Tensor | None]] = {}

    def begin_step(self, watch: bool) -> None:
        """Forget the last step; take nothing in this one unless ``watch``."""
        self._is_watching = watch
        self._before.clear()
        for buffer in self.buffers():
            buffer.zero_()

    def add_output(self, loop: int, output_sbd: Tensor, micro_batch: int = 0) -> None:
        """Record H_l of a micro batch; its loops come in order, others may come between."""
        if not self._is_watching or not torch.is_grad_enabled() or self._loops == 1:
            return
        with torch.no_grad():
            now, update = output_sbd.detach(), None
            if loop > 1:
                update = self._add_update(loop, now, *self._before.pop(micro_batch))
            if loop < self._loops:
                self._before[micro_batch] = now, update

    def add_shift(self, loop: int, own_sbd: Tensor, moved_sbd: Tensor, begins_sb: Tensor) -> None:
        """Record what slots get from loop ``loop`` of the slot before, instead of their own.

        Slots where a document begins get nothing and do not count.
        """
        if not self._is_watching or not torch.is_grad_enabled():
            return
        with torch.no_grad():
            own, moved = at_least_float32(own_sbd), at_least_float32(moved_sbd)
            counts = ~begins_sb
            distance = (own - moved).norm(dim=-1) / own.norm(dim=-1).clamp(min=_TINY)
            self.slot_distance[loop - 1] += (distance * counts).sum()
            self.slot_cosine[loop - 1] += (cosine_similarity(own, moved, -1) * counts).sum()
            self.slots[loop - 1] += counts.sum()

    def collect(self) -> dict[str, Tensor]:
        """Return copies of the sums, [loops] each, to be added up over ranks."""
        return {f"{_PREFIX}{name}": tensor.clone() for name, tensor in self.named_buffers()}

    def _add_update(
        self, loop: int, now_sbd: Tensor, before_sbd: Tensor, last_sbd: Tensor | None
    ) -> Tensor:
        before = at_least_float32(before_sbd)
        update = at_least_float32(now_sbd) - before
        size = update.norm(dim=-1) / before.norm(dim=-1).clamp(min=_TINY)
        moves = size > _HAS_DIRECTION
        self.update_size[loop - 1] += size.sum()
        self.updates[loop - 1] += size.numel()
        self.update_cosine[loop - 1] += (cosine_similarity(update, before, -1) * moves).sum()
        self.directions[loop - 1] += moves.sum()
        if last_sbd is not None:
            moves &= last_sbd.norm(dim=-1) > _HAS_DIRECTION * before.norm(dim=-1)
            self.update_turn[loop - 1] += (cosine_similarity(update, last_sbd, -1) * moves).sum()
            self.turns[loop - 1] += moves.sum()
        return update


def diagnostic_metrics(sums: dict[str, Tensor]) -> dict[str, float]:
    """Turn sums over all ranks into named metrics; what is not among them is passed over."""
    found = {n.removeprefix(_PREFIX): t for n, t in sums.items() if n.startswith(_PREFIX)}
    metrics: dict[str, float] = {}
    # Name, what it is divided by, and the first loop that has it. The last loop is not shifted.
    kinds = (
        ("update_size", "updates", 2),
        ("update_cosine", "directions", 2),
        ("update_turn", "turns", 3),
        ("slot_distance", "slots", 1),
        ("slot_cosine", "slots", 1),
    )
    for name, count, first in kinds:
        if name in found:
            means = (found[name] / found[count].clamp(min=1)).tolist()
            last = len(means) - (count == "slots")
            for loop in range(first, last + 1):
                metrics[f"plt/{name}/loop_{loop}"] = means[loop - 1]
    return metrics
