"""What is worth watching in each loop of each layer: routing, gates. Sums on the device, no sync.

Every quantity is a sum over tokens or router calls, so it may be added up over microbatches and
data-parallel ranks before ``loop_metrics`` turns it into the numbers a person reads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pltmoe.config.model import ModelConfig


class LoopStats(nn.Module):
    """Accumulators of one layer, each with the loop as first axis. Never saved in a checkpoint.

    Balance (``expert_counts``, ``aux_loss``) is only of the loops that choose experts.
    """

    expert_counts: Tensor
    aux_loss: Tensor
    z_loss: Tensor
    router_calls: Tensor
    overlap: Tensor
    routed_tokens: Tensor
    gate_sum: Tensor
    gate_count: Tensor

    def __init__(self, model: ModelConfig, device: torch.device | int):
        super().__init__()
        shapes: dict[str, tuple[int, ...]] = {}
        if model.is_moe:
            shapes["expert_counts"] = (model.choosing_loops, model.num_experts or 0)
            shapes["aux_loss"] = (model.choosing_loops,)
            for name in ("z_loss", "router_calls", "overlap", "routed_tokens"):
                shapes[name] = (model.num_loops,)
        if model.gated_swa:
            shapes["gate_sum"] = shapes["gate_count"] = (model.num_loops,)
        for name, shape in shapes.items():
            zeros = torch.zeros(shape, dtype=torch.float32, device=device)
            self.register_buffer(name, zeros, persistent=False)
        self.is_watching = True

    def begin_step(self, watch: bool) -> None:
        """Forget the last step; what is asked to record looks at ``is_watching`` first."""
        self.is_watching = watch
        for buffer in self.buffers():
            buffer.zero_()

    @torch.no_grad()
    def add_routing(
        self,
        loop: int,
        aux_loss: Tensor | None,
        z_loss: Tensor,
        routing_map: Tensor,
        first_map: Tensor,
        ranks: int,
    ) -> None:
        """Record one router call.

        Args:
            loop: counts from 1.
            aux_loss: this rank's share of the balancing loss, without its coefficient; None in a
                loop that takes loop 1's experts.
            z_loss: this rank's share of the z-loss.
            routing_map: experts [t, e] that this loop chose, or would have chosen.
            first_map: loop 1's.
            ranks: how many ranks share the call (each sees its own slots).
        """
        index, tokens = loop - 1, routing_map.size(0)
        if aux_loss is not None:
            self.expert_counts[index] += routing_map.sum(0).float()
            self.aux_loss[index] += aux_loss
        self.z_loss[index] += z_loss
        self.router_calls[index] += 1 / ranks
        both = (routing_map & first_map).sum() / routing_map.sum()
        self.overlap[index] += both * tokens
        self.routed_tokens[index] += tokens

    @torch.no_grad()
    def add_gate(self, loop: int, gate: Tensor) -> None:
        """Record g, the weight of the local window, of one attention call."""
        self.gate_sum[loop - 1] += gate.float().sum()
        self.gate_count[loop - 1] += gate.numel()


def collect_loop_stats(
    layers: nn.ModuleList, numbers: Sequence[int] | None = None, num_layers: int | None = None
) -> dict[str, Tensor]:
    """Stack the accumulators: name -> [num_layers, loops, ...] (copies).

    ``numbers`` says which of ``num_layers`` layers these are (from 0), all by default; the others
    stay zero, so that the sum over all ranks is the whole model.
    """
    per_layer = [dict(layer.stats.named_buffers()) for layer in layers]
    found = {}
    for name, example in per_layer[0].items():
        found[name] = example.new_zeros(num_layers or len(layers), *example.shape)
        for number, stats in zip(numbers or range(len(layers)), per_layer, strict=True):
            found[name][number] = stats[name]
    return found


def loop_metrics(stats: dict[str, Tensor]) -> dict[str, float]:
    """Turn summed statistics into named metrics; loops and layers count from 1.

    ``moe/load_imbalance`` is the busiest expert's tokens over the mean (1 = perfectly even);
    ``moe/expert_overlap/loop_l`` the share of loop 1's experts that loop l picks for the same slot
    (with shared routing: would pick, and the two before are of loop 1 only);
    ``moe/aux_loss`` and ``moe/z_loss`` are without their coefficients; ``plt/gate_mean`` is the
    weight of the local window.
    """
    found: dict[str, Tensor] = {}
    if "expert_counts" in stats:
        counts = stats["expert_counts"]
        found["moe/load_imbalance"] = counts.amax(-1) / counts.mean(-1).clamp(min=1e-9)
        calls = stats["router_calls"].clamp(min=1)
        found["moe/aux_loss"] = stats["aux_loss"] / calls[:, : stats["aux_loss"].size(1)]
        found["moe/z_loss"] = stats["z_loss"] / calls
        found["moe/expert_overlap"] = stats["overlap"] / stats["routed_tokens"].clamp(min=1)
    if "gate_sum" in stats:
        found["plt/gate_mean"] = stats["gate_sum"] / stats["gate_count"].clamp(min=1)
    metrics: dict[str, float] = {}
    for name, values in found.items():
        first_loop = 1 if name in ("moe/expert_overlap", "plt/gate_mean") else 0
        for loop, per_layer in enumerate(values.T.tolist()[first_loop:], start=first_loop + 1):
            metrics[f"{name}/loop_{loop}"] = sum(per_layer) / len(per_layer)
            for layer, value in enumerate(per_layer, start=1):
                metrics[f"{name}/loop_{loop}/layer_{layer:02d}"] = value
    return metrics
