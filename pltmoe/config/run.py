"""The whole run as one typed tree: model, parallel, data, optimizer, train, checkpoint, ..."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from pltmoe.config.model import ModelConfig, Section


class ParallelConfig(Section):
    """Where the model runs. What is left of the world size is data parallel."""

    tensor_parallel_size: PositiveInt = 1
    """Ranks that share the heads, the dense feed-forward layers and the vocabulary."""
    sequence_parallel: bool = True
    """Also cut norms and the residual stream, by slots, over the tensor-parallel ranks."""
    pipeline_parallel_size: PositiveInt = 1
    """Stages: ranks that share the layers. Each loop is a trip through all stages."""
    model_chunks_per_stage: PositiveInt = 1
    """Separate runs of layers that a stage holds (Megatron's virtual pipeline stages, without the
    loops): more chunks, smaller bubble, more messages."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share a sequence; each holds two chunks of it, mirrored, for even work."""
    expert_parallel_size: PositiveInt = 1
    """Ranks that share the experts of a layer."""
    expert_tensor_parallel_size: PositiveInt = 1
    """Ranks that share each single expert."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward computes again instead of keeping: nothing, attention (scores, window, gate)
    or whole layers."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while backward still runs. With stages only where each runs backward once
    for a micro batch (one loop, one model chunk): Megatron counts one backward per weight."""


class DataSource(Section):
    """One indexed dataset of a blend."""

    path: Path
    """Prefix of a Megatron dataset: PREFIX.bin and PREFIX.idx."""
    weight: PositiveFloat = 1.0
    """Share of the samples drawn from here, relative to the other sources."""


class DataConfig(Section):
    """Where tokens come from."""

    tokenizer: Path
    """sentencepiece model (tools/train_tokenizer.py), or Hugging Face's tokenizer.json with the
    tokenizer_config.json that names its eos_token beside it."""
    train: list[DataSource] = Field(min_length=1)
    """Sources of the training blend; a PREFIX is short for {path: PREFIX}, and for a list of it."""
    valid: list[DataSource] = []
    """Sources of the validation blend; leave empty to cut it from ``train`` by ``split``."""
    split: tuple[float, float, float] | None = None
    """Shares of ``train``'s documents for train, valid, test, e.g. [98, 2, 0]."""
    sequence_length: PositiveInt
    """Tokens of one sequence (slots)."""
    cache_dir: Path | None = None
    """Where Megatron keeps its index cache; default: next to the first training source."""
    num_workers: NonNegativeInt = 0
    """Loader processes per rank."""
    reset_position_ids: bool = False
    """Restart positions after each document, so that the cross-loop shift does not cross it."""
    mask_document_ends: bool = False
    """No loss at an end-of-document token, whose successor begins another document."""

    @field_validator("train", "valid", mode="before")
    @classmethod
    def _spell_out(cls, sources: Any) -> Any:
        """Return ``PREFIX`` or ``[PREFIX, ...]`` as what they are short for."""
        if isinstance(sources, str | Path | dict):
            sources = [sources]
        if not isinstance(sources, list):
            return sources
        return [{"path": s} if isinstance(s, str | Path) else s for s in sources]


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: PositiveFloat
    """Peak learning rate."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the decay."""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """Shape of the decay; wsd = warmup, stable, decay."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up."""
    decay_steps: PositiveInt | None = None
    """Steps after which min_lr is reached; default: train.steps."""
    wsd_decay_steps: PositiveInt | None = None
    """Length of the final decay of the wsd schedule, in steps."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay; norms and biases have none."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Adam's first-moment decay."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Adam's second-moment decay."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    clip_grad_norm: float = Field(default=1.0, ge=0)
    """Global gradient-norm limit; 0 turns clipping off."""


Precision = Literal["auto", "fp32", "bf16", "fp8"]
Fp8Recipe = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]


class TrainConfig(Section):
    """How long, how much at once, and what is printed when."""

    output_dir: Path
    """Directory of the run: metrics.jsonl, config.yaml, checkpoints/, logs."""
    steps: PositiveInt
    """Optimizer steps in total."""
    global_batch_size: PositiveInt
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: PositiveInt = 1
    """Sequences per forward pass on one rank."""
    precision: Precision = "auto"
    """auto: bf16 with fp32 master weights and gradients on a GPU, fp32 on a CPU. fp8: bf16 with
    the matrix products of linear layers and experts in FP8 (Transformer Engine)."""
    fp8_recipe: Fp8Recipe = "tensorwise"
    """How FP8 scales are chosen: by the tensor's history, by tensor, by blocks (Hopper), by 32
    neighbours (Blackwell)."""
    fp8_attention: bool = False
    """Attention in FP8, too, in each branch that the device has it for (runtime/fp8.py)."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Whose layers compute: Transformer Engine's, or PyTorch's and Megatron-core's own (local).
    auto: Transformer Engine on a GPU where it is installed. Checkpoints fit both."""
    gradient_accumulation_fusion: bool = False
    """Add weight gradients to the fp32 buffers inside the matrix products: faster, and loops are
    summed in fp32 instead of bf16. All layers with Transformer Engine; with local ones and NVIDIA
    Apex attention, dense layers and head. Off until it has run on a GPU."""
    seed: int = Field(default=1234, ge=0, lt=2**32)
    """Seed of weights and data order."""
    deterministic: bool = False
    """Bit-for-bit repeatable kernels on a GPU (slower). A CPU run always is."""
    log_interval: PositiveInt = 10
    """Steps between logged lines."""
    eval_interval: PositiveInt | None = None
    """Steps between validations; none by default."""
    eval_steps: PositiveInt = 10
    """Global batches per validation."""
    max_skipped_in_a_row: NonNegativeInt = 10
    """A step whose loss or gradient is not finite, or a spike, is skipped: nothing is updated, its
    data count as consumed. After so many in a row the next one stops the run; 0: the first does."""
    spike_sigma: PositiveFloat | None = None
    """Also skip a step whose loss or gradient norm is more than so many standard deviations above
    the mean of the last accepted steps; off by default. 6 is usual."""
    spike_window: int = Field(default=128, ge=2)
    """Accepted steps that tell what is ordinary; none is a spike before there are so many."""
    hang_timeout_minutes: PositiveFloat | None = 20.0
    """Minutes without progress on a rank after which all ranks write their stacks and the job ends.
    The first step, and what follows a step or the last one (a validation, a save), may take three
    times as long. Collectives give up after 30 minutes."""

    @property
    def keeps_fp8_scales(self) -> bool:
        """Whether FP8 scales come of earlier passes, and so are part of a checkpoint."""
        return self.precision == "fp8" and self.fp8_recipe == "delayed"


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    save_interval: PositiveInt | None = None
    """Steps between checkpoints; the last step is always saved."""
    keep_last: PositiveInt = 2
    """Newest checkpoints kept; older ones are deleted after a new one is complete."""
    keep_every: PositiveInt | None = None
    """Also keep every checkpoint whose step is a multiple of this."""
    asynchronous: bool = True
    """Copy the state to host memory and write it while training goes on; one save at a time.
    Costs that memory (bf16: 14 bytes per parameter that a rank writes) until it is written; false:
    training waits until a checkpoint is whole."""
    verify: bool = True
    """Compare every file with its checksum before a checkpoint is loaded: reads it once more. A
    run whose newest checkpoint is damaged says so and goes on from the one before."""
    resume: bool = True
    """Continue from the newest complete checkpoint in output_dir when there is one."""
    accept_changes: list[str] = []
    """Fields that may differ from the checkpoint on resume, e.g. [optimizer.lr]: the new value is
    used from there on. Without this a changed field that decides the result is an error. A new
    run with load_weights looks for two: data.tokenizer, and model.moe_expert_bias_update_rate (the
    expert biases of those weights are then left out)."""
    load_weights: Path | None = None
    """Checkpoint folder whose weights a new run starts from (step 0, fresh optimizer), e.g. one
    made by tools/convert_from_hf.py, or the folder of a run: its newest. Not used on resume. PLT
    may start from a model without gates; they begin at zero."""


class TrackingConfig(Section):
    """MLflow. metrics.jsonl is always written."""

    mlflow_uri: str | None = None
    """Tracking server or sqlite:///ABSOLUTE/PATH.db; leave out for JSONL only."""
    experiment: str = "pltmoe"
    """MLflow experiment."""
    tags: dict[str, str] = {}
    """Tags put on the run besides commit, layout and model name."""
    system_metrics: bool = True
    """Let MLflow sample CPU, memory, disk, network and GPU."""


class RunConfig(Section):
    """Everything that decides a run."""

    name: str
    """Name of the run: MLflow run name, model name of the export."""
    engine: Literal["megatron", "deepspeed"] = "megatron"
    """Who takes the optimizer steps: Megatron-core, or DeepSpeed's ZeRO (docs/engines.md)."""
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    deepspeed: dict[str, Any] = {}
    """Keys of DeepSpeed's JSON that are merged into what this file decides, e.g.
    {zero_optimization: {stage: 2}}. The result is deepspeed.json in the run's folder."""
