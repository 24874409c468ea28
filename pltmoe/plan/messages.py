"""Bytes that one GPU sends per optimizer step, by kind, over NVLink and over the network.

Ranks are numbered tensor, context, data parallel, then stages (experts: expert-tensor, expert),
so a group with stride S and n members keeps min(n, node / S) of them inside a node. A collective
over several nodes is counted as NCCL does it: within the node first, one share per GPU between.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from pltmoe.config import ModelConfig
from pltmoe.parallel.layout import Layout
from pltmoe.plan.activations import Sizes
from pltmoe.plan.machines import Assumptions, Gpu
from pltmoe.plan.weights import StageWeights


@dataclass(frozen=True)
class Message:
    """What one kind of communication sends from one GPU in a step."""

    kind: str
    inside: float
    """Bytes over NVLink."""
    between: float
    """Bytes over the network between nodes."""

    @property
    def total(self) -> float:
        """Bytes over both."""
        return self.inside + self.between

    def seconds(self, gpu: Gpu, a: Assumptions) -> float:
        """Return how long it takes, one link after the other."""
        inside = self.inside / (gpu.nvlink * a.nvlink_efficiency)
        return inside + self.between / (a.network * a.network_efficiency)


@dataclass(frozen=True)
class Group:
    """A process group: ``size`` ranks, ``stride`` apart."""

    size: int
    stride: int

    def members_per_node(self, a: Assumptions) -> int:
        """Return how many of them share a node."""
        return max(1, min(self.size, a.gpus_per_node // self.stride))

    def gather(self, kind: str, whole: float, a: Assumptions) -> Message:
        """All-gather, or reduce-scatter, of ``whole`` bytes."""
        here = self.members_per_node(a)
        nodes = self.size / here
        return Message(kind, whole * (here - 1) / here, whole / here * (nodes - 1) / nodes)

    def exchange(self, kind: str, sent: float, a: Assumptions) -> Message:
        """All-to-all: each rank holds ``sent`` bytes, an equal part for everyone."""
        here = self.members_per_node(a)
        part = sent / self.size
        return Message(kind, part * (here - 1), part * (self.size - here))


def step_messages(
    z: Sizes, layout: Layout, weights: StageWeights, recompute: str, a: Assumptions
) -> list[Message]:
    """Return all kinds that the layout has; ``z`` describes one micro batch."""
    layer_passes = z.m.num_layers // layout.pipeline_parallel_size * layout.num_loops
    layer_passes *= layout.micro_batches
    again = 1 if recompute == "full" else 0
    kinds = chain(
        _tensor(z, layout, layer_passes, again, a),
        _expert(z, layout, layer_passes, again, a),
        _context(z, layer_passes, 0 if recompute == "none" else 1, a),
        _stages(z, layout, a),
        _data(z, layout, weights, a),
        _tied(z.m, layout, a),
    )
    return [message for message in kinds if message.total]


def _tensor(z: Sizes, layout: Layout, passes: int, again: int, a: Assumptions) -> Iterator[Message]:
    """Each block gathers its input and scatters its output; backward mirrors that, and gathers
    the input once more for the weight gradient. Without sequence parallelism, all-reduces."""
    group = Group(z.tp, 1)
    whole = z.t * z.m.hidden_size * z.e
    blocks = 1 if z.m.is_moe else 2  # experts take the slots as they are cut
    times = blocks * (2 + 3 + 2 * again) if layout.sequence_parallel else blocks * (4 + 2 * again)
    embedding_and_head = 5 * layout.micro_batches
    yield group.gather("TP", whole * (passes * times + embedding_and_head), a)


def _expert(z: Sizes, layout: Layout, passes: int, again: int, a: Assumptions) -> Iterator[Message]:
    """Dispatch and combine, forward and backward, for every layer of every loop."""
    if not z.m.is_moe:
        return
    times = passes * (4 + 2 * again)
    copies = z.r * (z.m.moe_top_k or 0) * (z.m.hidden_size * z.e + 4)
    group = Group(layout.expert_parallel_size, z.etp)
    yield group.exchange("EP all-to-all", copies * times, a)
    yield Group(z.etp, 1).gather("ETP", copies * z.etp * times, a)


def _context(z: Sizes, passes: int, again: int, a: Assumptions) -> Iterator[Message]:
    """Each rank fetches the K and V before its two chunks: 1.5 (CP - 1) chunks on average."""
    chunk = z.s * z.b / 2 * 2 * z.g * z.m.head_dim * z.e
    fetched = 1.5 * (z.cp - 1) * chunk * passes * (2 + again)
    group = Group(z.cp, z.tp)
    share = fetched * z.cp / max(z.cp - 1, 1)  # exchange() leaves out a rank's own part
    yield group.exchange("CP", share, a)


def _stages(z: Sizes, layout: Layout, a: Assumptions) -> Iterator[Message]:
    """Every loop chunk hands its output on, and its gradient back."""
    stages = layout.pipeline_parallel_size
    if stages == 1:
        return
    stream = z.r * z.m.hidden_size * z.e
    sent = 2 * layout.loop_chunks * layout.micro_batches * stream
    crosses = layout.world_size > a.gpus_per_node  # some boundary, or the way back to stage 0
    yield Message("PP", 0.0 if crosses else sent, sent if crosses else 0.0)


def _data(z: Sizes, layout: Layout, weights: StageWeights, a: Assumptions) -> Iterator[Message]:
    """Gradients are reduce-scattered in fp32, updated weights gathered."""
    copies = layout.data_parallel_size * layout.context_parallel_size
    shared = Group(copies, z.tp)
    expert = Group(layout.expert_data_parallel_size, z.etp * layout.expert_parallel_size)
    for kind, element in (("DP gradients", 4), ("DP weights", z.e)):
        parts = (
            shared.gather(kind, weights.shared * element, a),
            expert.gather(kind, weights.experts * element, a),
        )
        yield Message(kind, sum(p.inside for p in parts), sum(p.between for p in parts))


def _tied(m: ModelConfig, layout: Layout, a: Assumptions) -> Iterator[Message]:
    """First and last stage add the gradients of their copies of the table."""
    stages = layout.pipeline_parallel_size
    if stages == 1 or not m.tied_embeddings:
        return
    table = 4 * m.vocab_size // layout.tensor_parallel_size * m.hidden_size
    crosses = layout.world_size > a.gpus_per_node
    yield Message("tied table", 0.0 if crosses else table, table if crosses else 0.0)
