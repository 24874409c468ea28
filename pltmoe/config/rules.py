"""Rules between fields. Each yields a message that names both paths and both values."""

import difflib
from collections.abc import Callable, Iterator

from pltmoe.config import deepspeed
from pltmoe.config.model import ModelConfig
from pltmoe.config.run import RunConfig

_LATER_LOOP_FLAGS = ("cross_loop_shift", "share_first_loop_kv", "gated_swa")


def heads_divide(m: ModelConfig) -> Iterator[str]:
    """Query heads are a whole multiple of KV heads; RoPE needs an even head size."""
    if m.num_attention_heads % m.num_kv_heads:
        yield (
            f"model.num_attention_heads ({m.num_attention_heads}) must be a multiple of "
            f"model.num_kv_heads ({m.num_kv_heads})"
        )
    if m.head_dim % 2:
        yield f"model.head_dim ({m.head_dim}) must be even: RoPE rotates pairs"


def dense_or_moe(m: ModelConfig) -> Iterator[str]:
    """Exactly one kind of feed-forward layer is described, and completely."""
    if m.num_experts is None:
        if m.ffn_hidden_size is None:
            yield (
                "model.ffn_hidden_size (None) and model.num_experts (None): "
                "give the first for a dense model, the second for a mixture of experts"
            )
        for field in ("moe_top_k", "moe_ffn_hidden_size"):
            if getattr(m, field) is not None:
                yield f"model.{field} ({getattr(m, field)}) needs model.num_experts (None)"
        for field in ("moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_expert_bias_update_rate"):
            if getattr(m, field):
                yield f"model.{field} ({getattr(m, field)}) needs model.num_experts (None)"
        return
    if m.ffn_hidden_size is not None:
        yield (
            f"model.ffn_hidden_size ({m.ffn_hidden_size}) is for dense models; with "
            f"model.num_experts ({m.num_experts}) set model.moe_ffn_hidden_size only"
        )
    for field in ("moe_top_k", "moe_ffn_hidden_size"):
        if getattr(m, field) is None:
            yield f"model.{field} (None) is required with model.num_experts ({m.num_experts})"
    if m.moe_top_k is not None and m.moe_top_k > m.num_experts:
        yield (
            f"model.moe_top_k ({m.moe_top_k}) must not exceed model.num_experts ({m.num_experts})"
        )


def loop_flags(m: ModelConfig) -> Iterator[str]:
    """Options of later loops need later loops, and each other."""
    if m.num_loops == 1:
        for flag in _LATER_LOOP_FLAGS:
            if getattr(m, flag):
                yield (
                    f"model.{flag} (true) needs model.num_loops >= 2 (it is 1): "
                    f"set model.{flag}=false for a vanilla model"
                )
    if m.gated_swa and not m.share_first_loop_kv:
        yield (
            "model.gated_swa (true) needs model.share_first_loop_kv (false): the window is mixed "
            "with attention over loop 1's keys and values"
        )
    if m.gate_use_hidden_states and not m.gated_swa:
        yield "model.gate_use_hidden_states (true) needs model.gated_swa (false)"
    for field, neutral in (
        ("normalize_per_loop", False),
        ("emb_scale", 1.0),
        ("hidden_scale", 1.0),
    ):
        if getattr(m, field) != neutral and not m.cross_loop_shift:
            yield (
                f"model.{field} ({getattr(m, field)}) needs model.cross_loop_shift (false): "
                "it changes how E and shift(H) are added"
            )


def loop_routing(m: ModelConfig) -> Iterator[str]:
    """Routing can be shared between loops where there are experts and later loops."""
    if m.moe_loop_routing == "independent":
        return
    if m.num_loops == 1:
        yield (
            f"model.moe_loop_routing ({m.moe_loop_routing}) needs model.num_loops >= 2 (it is 1): "
            "set model.moe_loop_routing=independent for a vanilla model"
        )
    if not m.is_moe:
        yield (
            f"model.moe_loop_routing ({m.moe_loop_routing}) needs model.num_experts (None): "
            "a dense model has no experts to choose"
        )


def router_can_learn(c: RunConfig) -> Iterator[str]:
    """A router learns from the weights of its experts; that of a single one is always 1."""
    if c.model.moe_top_k == 1:
        yield (
            f"model.moe_top_k (1) with model.num_experts ({c.model.num_experts}): the chosen "
            "experts' weights sum to 1, so the router of a single one would learn nothing from "
            "the loss; use 2 or more, or a dense model (model.ffn_hidden_size)"
        )


def experts_divide(c: RunConfig) -> Iterator[str]:
    """Experts are split evenly over expert-parallel ranks."""
    ep, experts = c.parallel.expert_parallel_size, c.model.num_experts
    if ep > 1 and (experts is None or experts % ep):
        yield (
            f"model.num_experts ({experts}) must be a multiple of "
            f"parallel.expert_parallel_size ({ep})"
        )


def splits_are_even(c: RunConfig) -> Iterator[str]:
    """Whatever is cut over ranks is cut evenly."""
    p, m, d = c.parallel, c.model, c.data
    for size, path, value in (
        ("tensor_parallel_size", "model.num_attention_heads", m.num_attention_heads),
        ("tensor_parallel_size", "model.num_kv_heads", m.num_kv_heads),
        ("tensor_parallel_size", "model.vocab_size", m.vocab_size),
        ("tensor_parallel_size", "model.ffn_hidden_size", m.ffn_hidden_size or 0),
        ("expert_tensor_parallel_size", "model.moe_ffn_hidden_size", m.moe_ffn_hidden_size or 0),
    ):
        if value % (ranks := getattr(p, size)):
            yield f"{path} ({value}) must be a multiple of parallel.{size} ({ranks})"
    chunks = p.pipeline_parallel_size * p.model_chunks_per_stage
    if m.num_layers % chunks:
        yield (
            f"model.num_layers ({m.num_layers}) must be a multiple of "
            f"parallel.pipeline_parallel_size ({p.pipeline_parallel_size}) x "
            f"parallel.model_chunks_per_stage ({p.model_chunks_per_stage}) = {chunks}"
        )
    cp = p.context_parallel_size
    tp = p.tensor_parallel_size if p.sequence_parallel else 1
    cuts = (2 * cp if cp > 1 else 1) * tp
    if d.sequence_length % cuts:
        yield (
            f"data.sequence_length ({d.sequence_length}) must be a multiple of {cuts}: "
            f"2 chunks x parallel.context_parallel_size ({cp}) when it is over 1, x "
            f"parallel.tensor_parallel_size ({p.tensor_parallel_size}) with sequence_parallel"
        )


def parallel_parts_fit(c: RunConfig) -> Iterator[str]:
    """Kinds of parallelism that need, or exclude, something else."""
    p, m = c.parallel, c.model
    if p.expert_tensor_parallel_size > 1 and not m.is_moe:
        yield (
            f"parallel.expert_tensor_parallel_size ({p.expert_tensor_parallel_size}) needs "
            "model.num_experts (None)"
        )
    if p.tensor_parallel_size > 1 and m.is_moe and not p.sequence_parallel:
        yield (
            f"parallel.sequence_parallel (false) with parallel.tensor_parallel_size "
            f"({p.tensor_parallel_size}) and model.num_experts ({m.num_experts}): Megatron trains "
            "experts under tensor parallelism only with sequence parallelism; set it to true"
        )
    if p.model_chunks_per_stage > 1 and p.pipeline_parallel_size == 1:
        yield (
            f"parallel.model_chunks_per_stage ({p.model_chunks_per_stage}) needs "
            "parallel.pipeline_parallel_size (1) of at least 2"
        )
    parts = m.num_loops * p.model_chunks_per_stage
    if p.overlap_grad_reduce and p.pipeline_parallel_size > 1 and parts > 1:
        yield (
            "parallel.overlap_grad_reduce (true) with parallel.pipeline_parallel_size "
            f"({p.pipeline_parallel_size}): a stage runs backward {parts} times for a micro batch "
            "(model.num_loops x parallel.model_chunks_per_stage), and Megatron would reduce "
            "gradients after the first; set it to false"
        )


def transformer_engine_fits(c: RunConfig) -> Iterator[str]:
    """What needs Transformer Engine, and the sizes that its FP8 products take."""
    t, p, m = c.train, c.parallel, c.model
    if t.precision != "fp8":
        if t.fp8_attention:
            yield f"train.fp8_attention (true) needs train.precision fp8 (it is {t.precision})"
        return
    if t.transformer_impl == "local":
        yield "train.precision (fp8) needs Transformer Engine: train.transformer_impl (local)"
    if t.fp8_recipe == "delayed" and p.recompute != "none":
        yield (
            f"train.fp8_recipe (delayed) with parallel.recompute ({p.recompute}): a repeated pass "
            "would take the scales of another loop; use another recipe, or recompute none"
        )
    if t.fp8_recipe == "delayed" and p.pipeline_parallel_size > 1 and m.num_loops > 1:
        yield (
            f"train.fp8_recipe (delayed) with parallel.pipeline_parallel_size "
            f"({p.pipeline_parallel_size}) and model.num_loops ({m.num_loops}): loops of a micro "
            "batch would be scaled by one another's history; use another recipe"
        )
    tp = p.tensor_parallel_size
    wide, long = (32, 32) if t.fp8_recipe == "mxfp8" else (16, 8)  # it scales blocks of 32
    widths = {
        "model.hidden_size": (m.hidden_size, 1),
        "model.num_attention_heads x head_dim": (m.num_attention_heads * m.head_dim, tp),
        "model.num_kv_heads x head_dim": (m.num_kv_heads * m.head_dim, tp),
        "model.ffn_hidden_size": (m.ffn_hidden_size or 0, tp),
        "model.moe_ffn_hidden_size": (m.moe_ffn_hidden_size or 0, p.expert_tensor_parallel_size),
    }
    for name, (width, parts) in widths.items():
        if width % (wide * parts):
            yield (
                f"train.precision (fp8): {name} ({width}) must be a multiple of {wide} on each of "
                f"{parts} tensor-parallel ranks"
            )
    slots = c.data.sequence_length * t.micro_batch_size // p.context_parallel_size
    if slots % long:
        yield (
            f"train.precision (fp8): data.sequence_length x train.micro_batch_size on each of "
            f"{p.context_parallel_size} context-parallel ranks ({slots}) must be a multiple of "
            f"{long}"
        )


def batch_divides(c: RunConfig) -> Iterator[str]:
    """A global batch is made of whole micro batches."""
    gbs, mbs = c.train.global_batch_size, c.train.micro_batch_size
    if gbs % mbs:
        yield (
            f"train.global_batch_size ({gbs}) must be a multiple of train.micro_batch_size ({mbs})"
        )


def schedule_fits(c: RunConfig) -> Iterator[str]:
    """The learning-rate schedule fits into the run."""
    o, steps = c.optimizer, c.train.steps
    end = o.decay_steps or steps
    if o.warmup_steps >= end:
        where = "optimizer.decay_steps" if o.decay_steps else "train.steps"
        yield f"optimizer.warmup_steps ({o.warmup_steps}) must be smaller than {where} ({end})"
    if o.min_lr > o.lr:
        yield f"optimizer.min_lr ({o.min_lr}) must not exceed optimizer.lr ({o.lr})"
    if o.schedule == "wsd" and o.wsd_decay_steps is None:
        yield "optimizer.schedule (wsd) needs optimizer.wsd_decay_steps, the steps of its decay"
    elif o.schedule != "wsd" and o.wsd_decay_steps is not None:
        yield (
            f"optimizer.wsd_decay_steps ({o.wsd_decay_steps}) is of optimizer.schedule=wsd alone "
            f"(it is {o.schedule})"
        )
    elif o.wsd_decay_steps is not None and o.wsd_decay_steps > end - o.warmup_steps:
        yield (
            f"optimizer.wsd_decay_steps ({o.wsd_decay_steps}) must not exceed the "
            f"{end - o.warmup_steps} steps between warm-up and the end of the decay ({end})"
        )


def sources_are_prefixes(c: RunConfig) -> Iterator[str]:
    """A data set is named without the endings of its two files."""
    for field in ("train", "valid"):
        for i, source in enumerate(getattr(c.data, field)):
            if source.path.suffix in (".bin", ".idx"):
                prefix = source.path.with_suffix("")
                yield f"data.{field}.{i}.path ({source.path}) is a file: give its prefix, {prefix}"


def validation_has_data(c: RunConfig) -> Iterator[str]:
    """Validation data comes from exactly one place."""
    d = c.data
    if d.valid and d.split:
        yield (
            f"data.split ({list(d.split)}) and data.valid ({len(d.valid)} sources) both say where "
            "validation data comes from: set data.split=null, or data.valid=[]"
        )
    cut = d.split is not None and d.split[1] > 0
    if c.train.eval_interval and not (d.valid or cut):
        yield (
            f"train.eval_interval ({c.train.eval_interval}) needs data.valid (empty) or a "
            f"data.split with a validation share ({d.split})"
        )


def accepted_fields_exist(c: RunConfig) -> Iterator[str]:
    """What is accepted on resume is the path of a field, or the text itself."""
    known = ["data.contents"]
    for name, section in RunConfig.model_fields.items():
        fields = getattr(section.annotation, "model_fields", {})
        known += [f"{name}.{field}" for field in fields] or [name]
    for path in c.checkpoint.accept_changes:
        if path not in known:
            close = difflib.get_close_matches(path, known, 1)
            hint = f"did you mean {close[0]}?" if close else "write section.key"
            yield f"checkpoint.accept_changes ({path}): no such field; {hint}"


def engine_can(c: RunConfig) -> Iterator[str]:
    """The engine can do what is asked of it."""
    yield from ENGINE_RULES[c.engine](c)


def _megatron(c: RunConfig) -> Iterator[str]:
    if c.deepspeed:
        yield f"deepspeed ({', '.join(c.deepspeed)}) needs engine deepspeed (it is {c.engine})"


ENGINE_RULES: dict[str, Callable[[RunConfig], Iterator[str]]] = {
    "megatron": _megatron,
    "deepspeed": deepspeed.rules,
}
MODEL_RULES: tuple[Callable[[ModelConfig], Iterator[str]], ...] = (
    heads_divide,
    dense_or_moe,
    loop_flags,
    loop_routing,
)
RUN_RULES: tuple[Callable[[RunConfig], Iterator[str]], ...] = (
    router_can_learn,
    experts_divide,
    splits_are_even,
    parallel_parts_fit,
    transformer_engine_fits,
    batch_divides,
    schedule_fits,
    sources_are_prefixes,
    validation_has_data,
    accepted_fields_exist,
    engine_can,
)


def broken_rules(config: RunConfig) -> list[str]:
    """Return the messages of all broken rules, model rules first."""
    found = [message for rule in MODEL_RULES for message in rule(config.model)]
    return found + [message for rule in RUN_RULES for message in rule(config)]
