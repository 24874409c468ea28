"""GPUs from public data sheets, and what is assumed where nothing was measured. One table each."""

from dataclasses import dataclass

from pltmoe.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One accelerator."""

    name: str
    memory_gib: float
    """What the driver reports, in GiB."""
    peak_bf16: float
    """Dense bf16, FLOP/s."""
    memory_bandwidth: float
    """Bytes per second."""
    nvlink: float
    """Bytes per second, one direction, to all GPUs of the node together."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-40GB", 39.4, 3.12e14, 1.555e12, 3.0e11),
        Gpu("A100-80GB", 79.2, 3.12e14, 2.039e12, 3.0e11),
        Gpu("H100", 79.6, 9.895e14, 3.35e12, 4.5e11),
        Gpu("H800", 79.6, 9.895e14, 3.35e12, 2.0e11),
        Gpu("H20", 95.6, 1.48e14, 4.0e12, 4.5e11),
        Gpu("H200", 140.4, 9.895e14, 4.8e12, 4.5e11),
        Gpu("B200", 179.1, 2.25e15, 8.0e12, 9.0e11),
        Gpu("GB200", 185.0, 2.5e15, 8.0e12, 9.0e11),
    )
}


@dataclass(frozen=True)
class Assumptions:
    """Stated, not measured: expected times and the margin of memory rest on these."""

    gpus_per_node: int = 8
    """GPUs joined by NVLink."""
    network: float = 5.0e10
    """InfiniBand between nodes, bytes per second and GPU (400 Gb/s)."""
    dense_efficiency: float = 0.55
    """Share of the peak that projections, dense layers and the head reach."""
    expert_half_tokens: int = 512
    """Tokens at which one expert's matrix products reach half of ``dense_efficiency``: experts run
    one after the other, each a small product."""
    attention_efficiency: float = 0.35
    """The same for attention scores and the window."""
    nvlink_efficiency: float = 0.70
    """Share of NVLink's bandwidth that collectives reach."""
    network_efficiency: float = 0.80
    """Share of the network's bandwidth that collectives reach."""
    memory_efficiency: float = 0.70
    """Share of the memory bandwidth that the optimizer reaches."""
    expert_load: float = 1.2
    """Tokens of the most loaded rank's experts over the mean: sizes its buffers and its time."""
    context_gib: float = 3.0
    """CUDA context, NCCL buffers and cuBLAS workspaces."""
    fragmentation: float = 0.05
    """Share of the memory that the caching allocator cannot hand out."""

    def expert_efficiency(self, tokens: float) -> float:
        """Return the share of the peak that an expert with this many tokens reaches."""
        return self.dense_efficiency * tokens / (tokens + self.expert_half_tokens)

    def usable_bytes(self, gpu: Gpu) -> float:
        """Return the bytes that tensors can have."""
        return (gpu.memory_gib * (1 - self.fragmentation) - self.context_gib) * GIB


DEFAULT = Assumptions()


def find_gpu(name: str) -> Gpu:
    """Look a GPU up, whatever the case.

    Raises:
        ConfigError: it is not in the table.
    """
    for known, gpu in GPUS.items():
        if known.lower() == name.lower():
            return gpu
    raise ConfigError(
        f"{name!r} is not a GPU of the planner's table: give one of {', '.join(GPUS)}"
    )
