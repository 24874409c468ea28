"""One layout of one run on one kind of GPU: what it needs, what it sends, how long a step takes."""

from collections.abc import Callable
from dataclasses import dataclass

from pltmoe.config import ModelConfig, RunConfig
from pltmoe.config import deepspeed as deepspeed_settings
from pltmoe.config.counts import flops_per_token
from pltmoe.config.rules import broken_rules
from pltmoe.errors import ConfigError, PLTMoEError
from pltmoe.parallel.layout import Layout, layout_for
from pltmoe.parallel.schedule import bubble_fraction
from pltmoe.plan import activations
from pltmoe.plan.in_flight import peak_bytes
from pltmoe.plan.machines import DEFAULT, GIB, Assumptions, Gpu, find_gpu
from pltmoe.plan.messages import Message, step_messages
from pltmoe.plan.weights import (
    StageWeights,
    WeightBytes,
    stage_weights,
    weight_bytes,
    zero_bytes,
)

_SEARCH = "tools/plan.py --gpus {} --search lists the layouts that fit"


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one GPU of a stage at the worst moment of a step."""

    stage: int
    weights: WeightBytes
    activations: float
    """Of all loop chunks that are under way, and gradients that wait for loop 1."""
    working: float
    """What one layer's (or the head's) backward pass needs on top for a moment."""
    loop_chunks_alive: int
    shared_kv: float
    """Part of ``activations``: loop 1's K and V of one micro batch that later loops borrow."""
    lent_gradients: float
    """Part of ``activations``: their gradients, of one micro batch."""
    dispatch: float
    """Part of ``activations``: router and dispatched tokens of one micro batch."""
    logits: float
    """Part of ``activations``: final norm, logits and cross entropy of one micro batch."""

    @property
    def update(self) -> float:
        """What the update needs on top: PyTorch's AdamW takes the roots of a whole shard at once.

        (Transformer Engine's and Apex's do not.)
        """
        return 4.0 * self.weights.shard

    @property
    def parts(self) -> dict[str, float]:
        """What adds up to the peak: at the worst moment of the passes, or in the update."""
        w, in_update = self.weights, self.update > self.activations + self.working
        return {
            "parameters": w.parameters,
            "gradients": w.gradients,
            "optimizer": w.optimizer,
            "activations": 0.0 if in_update else self.activations,
            "working memory": self.update if in_update else self.working,
        }

    @property
    def peak(self) -> float:
        """All parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """What a run needs."""

    config: RunConfig
    layout: Layout
    gpu: Gpu
    assumptions: Assumptions
    stages: tuple[StageMemory, ...]
    messages: tuple[Message, ...]
    bubble: float
    flops_per_step: float
    compute_seconds: float
    """Arithmetic of the slowest stage, without waiting."""
    message_seconds: float
    """Messages that nothing hides."""
    optimizer_seconds: float

    @property
    def fullest(self) -> StageMemory:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def usable(self) -> float:
        """Bytes of a GPU that tensors can have."""
        return self.assumptions.usable_bytes(self.gpu)

    @property
    def fits(self) -> bool:
        """Whether the fullest stage fits."""
        return self.fullest.peak <= self.usable

    @property
    def step_seconds(self) -> float:
        """Expected time of an optimizer step."""
        busy = (self.compute_seconds + self.message_seconds) / (1 - self.bubble)
        return busy + self.data_seconds + self.optimizer_seconds

    @property
    def data_seconds(self) -> float:
        """Reducing gradients and gathering weights, after the last backward pass."""
        return sum(
            m.seconds(self.gpu, self.assumptions) for m in self.messages if _once_per_step(m)
        )

    @property
    def mfu(self) -> float:
        """Model FLOPs (recomputation not counted) over the peak."""
        return self.flops_per_step / self.layout.world_size / self.step_seconds / self.gpu.peak_bf16

    @property
    def tokens_per_second(self) -> float:
        """Over all GPUs."""
        tokens = self.layout.global_batch_size * self.config.data.sequence_length
        return tokens / self.step_seconds


def make_plan(
    config: RunConfig, world_size: int, gpu_name: str = "H200", assumptions: Assumptions = DEFAULT
) -> Plan:
    """Plan ``config`` on ``world_size`` GPUs.

    Raises:
        ConfigError: an unknown GPU, or a batch that the layout cannot split.
        EngineError: the GPUs cannot be split into whole groups.
    """
    gpu = find_gpu(gpu_name)
    try:
        layout = layout_for(config, world_size)
    except PLTMoEError as error:
        raise type(error)(f"{error}; {_SEARCH.format(world_size)}") from None
    element = 4 if config.train.precision == "fp32" else 2
    z = activations.sizes_for(
        config, layout, element, expert_load=_expert_load(layout, assumptions)
    )
    stages = range(layout.pipeline_parallel_size)
    counts = [stage_weights(config.model, layout, stage) for stage in stages]
    memory = tuple(
        _stage_memory(config, layout, z, stage, weights) for stage, weights in enumerate(counts)
    )
    largest = max(counts, key=lambda weights: weights.shared)
    mean = activations.sizes_for(config, layout, element)  # messages are counted at even load
    messages = step_messages(mean, layout, largest, config.parallel.recompute, assumptions)
    exposed = sum(m.seconds(gpu, assumptions) for m in messages if not _once_per_step(m))
    shard = max(stage.weights.shard for stage in memory)
    traffic = shard * (4 * 7 + 2 * element)  # read and write moments and master, read gradients
    tokens = config.train.global_batch_size * config.data.sequence_length
    return Plan(
        config=config,
        layout=layout,
        gpu=gpu,
        assumptions=assumptions,
        stages=memory,
        messages=tuple(messages),
        bubble=bubble_fraction(
            layout.pipeline_parallel_size,
            layout.num_loops,
            layout.model_chunks_per_stage,
            layout.micro_batches,
        ),
        flops_per_step=flops_per_token(config.model, config.data.sequence_length) * tokens,
        compute_seconds=_compute_seconds(config, layout, gpu, assumptions),
        message_seconds=exposed,
        optimizer_seconds=traffic / (gpu.memory_bandwidth * assumptions.memory_efficiency),
    )


def check_fits(plan: Plan) -> None:
    """Refuse a run whose fullest GPU would run out of memory.

    Raises:
        ConfigError: it does not fit (says what is biggest and what to try).
    """
    if plan.fits:
        return
    full = plan.fullest
    parts = sorted(full.parts.items(), key=lambda part: -part[1])
    biggest = ", ".join(f"{name} {size / GIB:.1f} GiB" for name, size in parts[:3])
    raise ConfigError(
        f"{plan.config.name} does not fit on {plan.layout.world_size} x {plan.gpu.name} "
        f"({plan.layout}): stage {full.stage} needs {full.peak / GIB:.1f} GiB per GPU and has "
        f"{plan.usable / GIB:.1f} GiB usable of {plan.gpu.memory_gib:g}; biggest parts: {biggest}. "
        f"Try {_advice(plan)}"
    )


def _advice(plan: Plan) -> str:
    """Name recomputation where it is enough, else the settings that shrink the biggest part."""
    parts, p = plan.fullest.parts, plan.config.parallel
    search = _SEARCH.format(plan.layout.world_size)
    if _fits_with_recompute(plan):
        return f"parallel.recompute=full, which fits; {search}"
    if parts["activations"] + parts["working memory"] > parts["parameters"] + parts["gradients"]:
        tries = ["parallel.recompute=full"] if p.recompute != "full" else []
        tries += ["a smaller train.micro_batch_size"] if plan.layout.micro_batch_size > 1 else []
        tries += ["more parallel.context_parallel_size or tensor_parallel_size"]
    else:
        tries = ["parallel.expert_parallel_size"] if plan.config.model.is_moe else []
        tries += ["parallel.pipeline_parallel_size", "or more GPUs"]
    return f"{', '.join(tries)}; {search}"


def _fits_with_recompute(plan: Plan) -> bool:
    parallel = plan.config.parallel.model_copy(update={"recompute": "full"})
    config = plan.config.model_copy(update={"parallel": parallel})
    if broken_rules(config):
        return False
    return make_plan(config, plan.layout.world_size, plan.gpu.name, plan.assumptions).fits


def _stage_memory(
    config: RunConfig, layout: Layout, z: activations.Sizes, stage: int, weights: StageWeights
) -> StageMemory:
    m, recompute = config.model, config.parallel.recompute
    first, last = stage == 0, stage == layout.pipeline_parallel_size - 1
    chunks = layout.model_chunks_per_stage
    layers = m.num_layers // (layout.pipeline_parallel_size * chunks)
    kept = {
        loop: layers * activations.kept_by_layer(z, loop, recompute)
        for loop in range(1, m.num_loops + 1)
    }
    logits = activations.head_bytes(z)

    def chunk_bytes(loop: int, chunk: int) -> float:
        leaves = last and chunk == chunks - 1
        end = logits if loop == m.num_loops else activations.between_loops_bytes(z)
        # H as it came from the last stage, beside the layers' input made of it.
        begins = first and chunk == 0 and loop > 1 and m.cross_loop_shift and not last
        return kept[loop] + (end if leaves else 0) + (z.stream if begins else 0)

    def lent_gradients(chunk: int) -> float:
        embedding = z.stream if first and chunk == 0 and m.cross_loop_shift else 0
        return layers * activations.shared_kv_bytes(z) + embedding

    # Without stages all loops are one graph: autograd adds up their gradients of a weight, and
    # hands them on when loop 1's has come. Fused products add them to the sum at once.
    in_one_graph = layout.pipeline_parallel_size == 1 < m.num_loops
    waits = in_one_graph and not config.train.gradient_accumulation_fusion
    weight_gradients = weights.in_layers * z.e if waits else 0

    def waiting_gradients(chunk: int) -> float:
        return lent_gradients(chunk) + weight_gradients

    alive, count = peak_bytes(layout, stage, chunk_bytes, waiting_gradients)
    whole = [activations.layer_bytes(z, loop) for loop in kept]
    dispatched = layers * chunks * sum(layer.dispatch for layer in whole)
    kept_bytes = _ENGINES[config.engine](config, layout, z.e, weights)
    return StageMemory(
        stage=stage,
        weights=kept_bytes,
        activations=alive + activations.message_bytes(z, layout),
        working=_working(z, weights, recompute, last) + kept_bytes.buckets,
        loop_chunks_alive=count,
        shared_kv=layers * chunks * activations.shared_kv_bytes(z),
        lent_gradients=sum(lent_gradients(chunk) for chunk in range(chunks)),
        dispatch=dispatched if recompute != "full" else 0,
        logits=logits if last else 0,
    )


def _megatron_bytes(
    config: RunConfig, layout: Layout, element: int, weights: StageWeights
) -> WeightBytes:
    return weight_bytes(weights, layout, element, config.train.precision == "fp8")


def _deepspeed_bytes(
    config: RunConfig, layout: Layout, element: int, weights: StageWeights
) -> WeightBytes:
    stage = deepspeed_settings.zero_stage(config)
    offloaded = deepspeed_settings.offload_device(config) is not None
    bucket = deepspeed_settings.reduce_bucket_size(config)
    return zero_bytes(weights, layout, element, stage, offloaded, bucket)


_ENGINES: dict[str, Callable[[RunConfig, Layout, int, StageWeights], WeightBytes]] = {
    "megatron": _megatron_bytes,
    "deepspeed": _deepspeed_bytes,
}


def _working(z: activations.Sizes, weights: StageWeights, recompute: str, last: bool) -> float:
    """Estimate what a backward pass needs for a moment.

    A layer's gradients are about as large as its projections and feed-forward outputs, one of the
    two at a time; what was not kept is computed again first. The head casts its fp32 gradient.
    """
    layer = activations.layer_bytes(z, z.m.num_loops)
    again = {"none": 0.0, "selective": layer.attention, "full": layer.total}[recompute]
    gradients = max(layer.attention, layer.feed_forward + layer.dispatch) + z.stream
    head = z.t * z.m.vocab_size / z.tp * z.e if last else 0
    return max(again + gradients, head) + weights.largest * z.e


def _once_per_step(message: Message) -> bool:
    return message.kind.startswith("DP") or message.kind == "tied table"


def _compute_seconds(config: RunConfig, layout: Layout, gpu: Gpu, a: Assumptions) -> float:
    """Return the arithmetic of the last stage, which also has the head."""
    m, s = config.model, config.data.sequence_length
    linear, experts, attention = _layer_flops(m, s)
    again = config.parallel.recompute
    linear *= 4 if again == "full" else 3  # backward costs two forward passes
    experts *= 4 if again == "full" else 3
    attention *= 3 if again == "none" else 4
    layer = linear / a.dense_efficiency + attention / a.attention_efficiency
    if config.model.is_moe:
        efficiency = a.expert_efficiency(_tokens_per_expert(config, layout))
        layer += experts * _expert_load(layout, a) / efficiency
    layers = m.num_layers / layout.pipeline_parallel_size
    head = 3 * 2 * m.vocab_size * m.hidden_size / a.dense_efficiency
    per_token = layers * layer + head
    tokens = s * layout.micro_batch_size * layout.micro_batches
    ranks = layout.tensor_parallel_size * layout.context_parallel_size
    return per_token * tokens / ranks / gpu.peak_bf16


def _expert_load(layout: Layout, a: Assumptions) -> float:
    """Where every rank has all experts there is no fullest rank."""
    return a.expert_load if layout.expert_parallel_size > 1 else 1.0


def _tokens_per_expert(config: RunConfig, layout: Layout) -> float:
    """Return the mean number of tokens that an expert sees in one pass."""
    z = activations.sizes_for(config, layout, 2)
    experts = (config.model.num_experts or 1) / layout.expert_parallel_size
    return z.r * (config.model.moe_top_k or 0) * z.etp / experts


def _layer_flops(m: ModelConfig, s: int) -> tuple[float, float, float]:
    """Return forward FLOPs per token and layer over all loops: projections, experts, attention."""
    d, loops = m.hidden_size, m.num_loops
    qkv = d * m.head_dim * (2 * m.num_attention_heads + 2 * m.num_kv_heads)
    dense = 3 * d * (m.ffn_hidden_size or 0) + (m.num_experts or 0) * d
    experts = 3 * d * (m.moe_ffn_hidden_size or 0) * (m.moe_top_k or 0)
    head = 3 * 2 * m.vocab_size * d
    rest = flops_per_token(m, s) - head
    linear = 2 * loops * (qkv + dense)
    return linear, 2.0 * loops * experts, rest / 3 / m.num_layers - linear - 2 * loops * experts
