"""Every rule between fields: it bites, and its message names both paths and both values."""

from typing import Any

import pytest

from pltmoe.config import config_from_dict
from pltmoe.config.rules import MODEL_RULES, RUN_RULES
from pltmoe.errors import ConfigError
from tests.configs import DENSE, LOOP_ROWS, MOE, run_tree

SHIFT = {"num_loops": 2, "cross_loop_shift": True}
NO_EXPERTS = MOE | {"num_experts": None, "ffn_hidden_size": 24}


def model(base: dict[str, Any] = MOE, **changes: Any) -> dict[str, Any]:
    return run_tree() | {"model": base | changes}


def fp8(**changes: Any) -> dict[str, Any]:
    sizes = {"model__head_dim": 8, "model__moe_ffn_hidden_size": 16}
    return run_tree(train__precision="fp8", **sizes | changes)


def deepspeed(stage: int = 1, zero: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    section = {"zero_optimization": {"stage": stage, **(zero or {})}, **changes.pop("more", {})}
    return run_tree(engine="deepspeed", deepspeed=section, **changes)


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
NVME = {"offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}}
BROKEN = {
    "accepted_fields_exist": [
        (run_tree(checkpoint__accept_changes=["data.contents", "optimizer.decay_step"]),
         "checkpoint.accept_changes (optimizer.decay_step): no such field; did you mean "
         "optimizer.decay_steps?"),
        (run_tree(checkpoint__accept_changes=["zzz"]), "no such field; write section.key"),
    ],
    "engine_can": [
        (run_tree(deepspeed={"zero_optimization": {"stage": 1}}),
         "deepspeed (zero_optimization) needs engine deepspeed (it is megatron)"),
        (deepspeed(parallel__pipeline_parallel_size=2),
         "parallel.pipeline_parallel_size (2) cannot be used with engine deepspeed: use engine="
         "megatron, or parallel.expert_parallel_size"),
        (deepspeed(parallel__context_parallel_size=2),
         "parallel.context_parallel_size (2) cannot be used with engine deepspeed: use engine="
         "megatron, or parallel.recompute=full"),
        (deepspeed(parallel__expert_tensor_parallel_size=2),
         "parallel.expert_tensor_parallel_size (2) cannot be used with engine deepspeed"),
        (deepspeed(4), "deepspeed.zero_optimization.stage (4) must be 0, 1, 2 or 3"),
        (deepspeed(3, parallel__expert_parallel_size=2),
         "deepspeed.zero_optimization.stage (3) with experts and parallel.expert_parallel_size "
         "(2): DeepSpeed would gather other ranks' experts; use stage 2, or "
         "parallel.expert_parallel_size=1"),
        (deepspeed(3, parallel__tensor_parallel_size=2),
         "deepspeed.zero_optimization.stage (3) with experts and parallel.tensor_parallel_size "
         "(2)"),
        (deepspeed(0, OFFLOAD),
         "deepspeed.zero_optimization.offload_optimizer (cpu) needs "
         "deepspeed.zero_optimization.stage of at least 1 (it is 0)"),
        (deepspeed(2, NVME),
         "deepspeed.zero_optimization.offload_optimizer.device (nvme) needs "
         "deepspeed.zero_optimization.stage 3 (it is 2): DeepSpeed swaps its parts only; "
         "use cpu"),
        (deepspeed(3, {"offload_optimizer": {"device": "nvme"}}),
         "deepspeed.zero_optimization.offload_optimizer.device (nvme) needs nvme_path (None): a "
         "folder on a local disk"),
        (deepspeed(3, {"offload_optimizer": {"device": "cpu", "nvme_path": "/nvme"}}),
         "deepspeed.zero_optimization.offload_optimizer.nvme_path (/nvme) needs device nvme "
         "(it is cpu)"),
        (deepspeed(3, {"offload_optimizer": {"device": "disk"}}),
         "deepspeed.zero_optimization.offload_optimizer.device (disk) must be cpu, nvme or none"),
        *(
            (run_tree(engine="deepspeed", deepspeed=section), f"deepspeed.{says} must be a section")
            for section, says in (
                ({"zero_optimization": None}, "zero_optimization (None)"),
                ({"zero_optimization": 2}, "zero_optimization (2)"),
                ({"bf16": None}, "bf16 (None)"),
                (
                    {"zero_optimization": {"offload_optimizer": True}},
                    "zero_optimization.offload_optimizer (True)",
                ),
            )
        ),
        *(
            (deepspeed(3, {key: 1}), f"deepspeed.zero_optimization.{key} (1) is none of the keys")
            for key in ("compute_grad_norm", "cpu_offload", "zenflow", "zero_hpz_partition_size")
        ),
        (deepspeed(3, {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}),
         "deepspeed.zero_optimization.offload_optimizer.ratio (0.5) is none of the keys of"),
        (deepspeed(more={"communication_data_type": "bf16"}),
         "deepspeed.communication_data_type (bf16) contradicts precision of gradients (fp32)"),
        (deepspeed(more={"data_types": {"grad_accum_dtype": "bf16"}}),
         "deepspeed.data_types.grad_accum_dtype (bf16) contradicts precision of gradients"),
        (deepspeed(0, train__precision="bf16"),
         "deepspeed.zero_optimization.stage (0) with train.precision (bf16): DeepSpeed would "
         "keep neither fp32 weights nor fp32 gradients; use stage 1"),
        (deepspeed(train__precision="fp8"),
         "train.precision (fp8) cannot be used with engine deepspeed: use engine=megatron"),
        (deepspeed(train__gradient_accumulation_fusion=True),
         "train.gradient_accumulation_fusion (true) adds to Megatron's gradient buffers, which "
         "engine deepspeed does not have"),
        (deepspeed(more={"optimizer": {"type": "Lion"}}),
         "deepspeed.optimizer is decided by optimizer.* here: remove it"),
        (deepspeed(more={"activation_checkpointing": {}}),
         "deepspeed.activation_checkpointing is decided by parallel.recompute here"),
        (deepspeed(more={"gradient_accumulation_steps": 4}),
         "deepspeed.gradient_accumulation_steps (4) follows from train.global_batch_size (4) and"
         " train.micro_batch_size (1): remove it"),
        (deepspeed(more={"zero_optimisation": {"stage": 2}}),
         "deepspeed.zero_optimisation.stage (2) is none of the keys of DeepSpeed's JSON "
         "that are handed on: did you mean deepspeed.zero_optimization.stage?"),
        (deepspeed(more={"aio": {"xyzzy": 1}}),
         "deepspeed.aio.xyzzy (1) is none of the keys of DeepSpeed's JSON that are handed on: "
         "there are aio.block_size, "),
        (deepspeed(more={"xyzzy": 1}),
         "there are aio, memory_breakdown, wall_clock_breakdown, zero_optimization"),
        (deepspeed(more={"gradient_clipping": 0.5}),
         "deepspeed.gradient_clipping (0.5) contradicts optimizer.clip_grad_norm (1.0): remove"),
        (deepspeed(more={"train_batch_size": 8}),
         "deepspeed.train_batch_size (8) contradicts train.global_batch_size (4)"),
        (deepspeed(more={"bf16": {"enabled": True}}, train__precision="fp32"),
         "deepspeed.bf16.enabled (True) contradicts train.precision (fp32)"),
        (deepspeed(1, {"reduce_bucket_size": "5e8"}),
         "deepspeed.zero_optimization.reduce_bucket_size ('5e8') must be a number of at least 0 "
         "(in YAML a power of ten is written 5.0e+8)"),
        (deepspeed(2, {"allgather_bucket_size": -1}),
         "deepspeed.zero_optimization.allgather_bucket_size (-1) must be a number of at least 0"),
        (deepspeed(2, {"use_multi_rank_bucket_allreduce": "yes"}),
         "deepspeed.zero_optimization.use_multi_rank_bucket_allreduce ('yes') must be true or "
         "false"),
        (deepspeed(1, {"round_robin_gradients": True}),
         "deepspeed.zero_optimization.round_robin_gradients (True) is none of the keys"),
        (deepspeed(1, {1: 2}),
         "deepspeed.zero_optimization.1 (2) is none of the keys of DeepSpeed's JSON that are"),
        (deepspeed(3, {"offload_optimizer": NVME["offload_optimizer"] | {"buffer_count": 3}}),
         "deepspeed.zero_optimization.offload_optimizer.buffer_count (3) must be at least 4: "
         "weights, two moments and gradients are swapped"),
        (deepspeed(1, {"overlap_comm": True}),
         "deepspeed.zero_optimization.overlap_comm (True) contradicts "
         "parallel.overlap_grad_reduce (False)"),
    ],
    "heads_divide": [
        (model(num_attention_heads=3),
         "model.num_attention_heads (3) must be a multiple of model.num_kv_heads (2)"),
        (model(head_dim=7), "model.head_dim (7) must be even"),
    ],
    "dense_or_moe": [
        (model(DENSE, ffn_hidden_size=None),
         "model.ffn_hidden_size (None) and model.num_experts (None): give the first"),
        (model(NO_EXPERTS), "model.moe_top_k (2) needs model.num_experts (None)"),
        (model(NO_EXPERTS), "model.moe_ffn_hidden_size (8) needs model.num_experts (None)"),
        (model(DENSE, moe_aux_loss_coeff=0.1),
         "model.moe_aux_loss_coeff (0.1) needs model.num_experts (None)"),
        (model(DENSE, moe_z_loss_coeff=0.1),
         "model.moe_z_loss_coeff (0.1) needs model.num_experts (None)"),
        (model(DENSE, moe_expert_bias_update_rate=0.1),
         "model.moe_expert_bias_update_rate (0.1) needs model.num_experts (None)"),
        (model(ffn_hidden_size=24),
         "model.ffn_hidden_size (24) is for dense models; with model.num_experts (4)"),
        (model(moe_top_k=None), "model.moe_top_k (None) is required with model.num_experts (4)"),
        (model(moe_ffn_hidden_size=None),
         "model.moe_ffn_hidden_size (None) is required with model.num_experts (4)"),
        (model(moe_top_k=5), "model.moe_top_k (5) must not exceed model.num_experts (4)"),
    ],
    "loop_flags": [
        (model(cross_loop_shift=True), "model.cross_loop_shift (true) needs model.num_loops >= 2"),
        (model(share_first_loop_kv=True),
         "model.share_first_loop_kv (true) needs model.num_loops >= 2 (it is 1)"),
        (model(gated_swa=True), "model.gated_swa (true) needs model.num_loops >= 2 (it is 1)"),
        (model(**SHIFT, gated_swa=True),
         "model.gated_swa (true) needs model.share_first_loop_kv (false)"),
        (model(**SHIFT, gate_use_hidden_states=True),
         "model.gate_use_hidden_states (true) needs model.gated_swa (false)"),
        (model(num_loops=2, normalize_per_loop=True),
         "model.normalize_per_loop (True) needs model.cross_loop_shift (false)"),
        (model(emb_scale=0.7), "model.emb_scale (0.7) needs model.cross_loop_shift (false)"),
        (model(hidden_scale=0.7), "model.hidden_scale (0.7) needs model.cross_loop_shift (false)"),
    ],
    "loop_routing": [
        (model(moe_loop_routing="shared"),
         "model.moe_loop_routing (shared) needs model.num_loops >= 2 (it is 1): "
         "set model.moe_loop_routing=independent for a vanilla model"),
        (model(DENSE, num_loops=2, moe_loop_routing="shared"),
         "model.moe_loop_routing (shared) needs model.num_experts (None): "
         "a dense model has no experts to choose"),
    ],
    "router_can_learn": [
        (model(moe_top_k=1),
         "model.moe_top_k (1) with model.num_experts (4): the chosen experts' weights sum to 1"),
    ],
    "experts_divide": [
        (run_tree(parallel__expert_parallel_size=3),
         "model.num_experts (4) must be a multiple of parallel.expert_parallel_size (3)"),
        (model(DENSE) | {"parallel": {"expert_parallel_size": 2}},
         "model.num_experts (None) must be a multiple of parallel.expert_parallel_size (2)"),
    ],
    "splits_are_even": [
        (run_tree(parallel__tensor_parallel_size=3),
         "model.num_attention_heads (4) must be a multiple of parallel.tensor_parallel_size (3)"),
        (run_tree(parallel__expert_tensor_parallel_size=5),
         "must be a multiple of parallel.expert_tensor_parallel_size (5)"),
        (run_tree(parallel__pipeline_parallel_size=2, parallel__model_chunks_per_stage=5),
         "must be a multiple of parallel.pipeline_parallel_size (2) x "
         "parallel.model_chunks_per_stage (5) = 10"),
        (run_tree(parallel__context_parallel_size=7),
         "must be a multiple of 14: 2 chunks x parallel.context_parallel_size (7)"),
    ],
    "parallel_parts_fit": [
        (model(DENSE) | {"parallel": {"expert_tensor_parallel_size": 2}},
         "parallel.expert_tensor_parallel_size (2) needs model.num_experts (None)"),
        (run_tree(parallel__tensor_parallel_size=2, parallel__sequence_parallel=False),
         "Megatron trains experts under tensor parallelism only with sequence parallelism"),
        (run_tree(parallel__model_chunks_per_stage=2),
         "parallel.model_chunks_per_stage (2) needs parallel.pipeline_parallel_size (1)"),
        (run_tree(
             model__num_loops=2,
             parallel__pipeline_parallel_size=2,
             parallel__overlap_grad_reduce=True,
         ),
         "Megatron would reduce gradients after the first; set it to false"),
    ],
    "transformer_engine_fits": [
        (run_tree(train__fp8_attention=True),
         "train.fp8_attention (true) needs train.precision fp8 (it is auto)"),
        (fp8(train__transformer_impl="local"),
         "train.precision (fp8) needs Transformer Engine: train.transformer_impl (local)"),
        (fp8(train__fp8_recipe="delayed", parallel__recompute="full"),
         "train.fp8_recipe (delayed) with parallel.recompute (full): a repeated pass"),
        (fp8(
             train__fp8_recipe="delayed",
             model__num_loops=2,
             parallel__pipeline_parallel_size=2,
         ),
         "would be scaled by one another's history; use another recipe"),
        (fp8(model__head_dim=6),
         "model.num_attention_heads x head_dim (24) must be a multiple of 16 on each of 1"),
        (fp8(model__moe_ffn_hidden_size=24),
         "train.precision (fp8): model.moe_ffn_hidden_size (24) must be a multiple of 16"),
        (fp8(data__sequence_length=36),
         "on each of 1 context-parallel ranks (36) must be a multiple of 8"),
        (fp8(train__fp8_recipe="mxfp8", model__moe_ffn_hidden_size=48),
         "train.precision (fp8): model.moe_ffn_hidden_size (48) must be a multiple of 32"),
        (fp8(train__fp8_recipe="mxfp8", data__sequence_length=40),
         "on each of 1 context-parallel ranks (40) must be a multiple of 32"),
    ],
    "batch_divides": [
        (run_tree(train__micro_batch_size=3),
         "train.global_batch_size (4) must be a multiple of train.micro_batch_size (3)"),
    ],
    "schedule_fits": [
        (run_tree(optimizer__warmup_steps=10),
         "optimizer.warmup_steps (10) must be smaller than train.steps (10)"),
        (run_tree(optimizer__warmup_steps=5, optimizer__decay_steps=5),
         "optimizer.warmup_steps (5) must be smaller than optimizer.decay_steps (5)"),
        (run_tree(optimizer__min_lr=0.1),
         "optimizer.min_lr (0.1) must not exceed optimizer.lr (0.001)"),
        (run_tree(optimizer__schedule="wsd"),
         "optimizer.schedule (wsd) needs optimizer.wsd_decay_steps, the steps of its decay"),
        (run_tree(optimizer__wsd_decay_steps=3),
         "optimizer.wsd_decay_steps (3) is of optimizer.schedule=wsd alone (it is cosine)"),
        (run_tree(
             optimizer__schedule="wsd", optimizer__wsd_decay_steps=9, optimizer__warmup_steps=2
         ),
         "optimizer.wsd_decay_steps (9) must not exceed the 8 steps between warm-up and the "
         "end of the decay (10)"),
    ],
    "sources_are_prefixes": [
        (run_tree(data__train=[{"path": "a"}, {"path": "d/b.v1.bin"}]),
         "data.train.1.path (d/b.v1.bin) is a file: give its prefix, d/b.v1"),
        (run_tree(data__valid="v.idx"), "data.valid.0.path (v.idx) is a file: give its prefix, v"),
    ],
    "validation_has_data": [
        (run_tree(data__valid=[{"path": "v"}], data__split=[98, 2, 0]),
         "data.split ([98.0, 2.0, 0.0]) and data.valid (1 sources) both say"),
        (run_tree(train__eval_interval=5),
         "train.eval_interval (5) needs data.valid (empty) or a data.split"),
        (run_tree(train__eval_interval=5, data__split=[100, 0, 0]),
         "with a validation share ((100.0, 0.0, 0.0))"),
    ],
}  # fmt: skip
CASES = [(rule, tree, text) for rule, cases in BROKEN.items() for tree, text in cases]


@pytest.mark.parametrize(
    ("rule", "tree", "text"), CASES, ids=[f"{c[0]}: {c[2][:40]}" for c in CASES]
)
def test_broken_rule_names_paths_and_values(rule: str, tree: dict, text: str):
    with pytest.raises(ConfigError) as error:
        config_from_dict(tree, where="run.yaml")
    assert str(error.value).startswith("run.yaml: ")
    assert text in str(error.value)


def test_every_rule_is_tested_here():
    assert {rule.__name__ for rule in (*MODEL_RULES, *RUN_RULES)} == set(BROKEN)


@pytest.mark.parametrize("row", LOOP_ROWS)
def test_the_six_rows_of_the_ablation_are_valid(row: str):
    config_from_dict(model(**LOOP_ROWS[row]))
    config_from_dict(model(DENSE, **LOOP_ROWS[row]))


def test_what_the_rules_must_let_pass():
    config_from_dict(deepspeed(more={"gradient_clipping": 1.0, "wall_clock_breakdown": True}))
    config_from_dict(deepspeed(3, {"offload_optimizer": None, "stage3_max_live_parameters": 1e8}))
    config_from_dict(deepspeed(2, OFFLOAD, parallel__expert_parallel_size=2))
    config_from_dict(run_tree(engine="deepspeed"))
    config_from_dict(run_tree(optimizer__schedule="wsd", optimizer__wsd_decay_steps=3))
    config_from_dict(run_tree(train__eval_interval=5, data__valid=[{"path": "v"}]))
    config_from_dict(run_tree(train__eval_interval=5, data__split=[98, 2, 0]))
    config_from_dict(run_tree(optimizer__warmup_steps=10, optimizer__decay_steps=20))
    config_from_dict(fp8(train__fp8_attention=True, train__fp8_recipe="delayed"))
    config_from_dict(fp8(parallel__recompute="full", parallel__pipeline_parallel_size=2))
    gate = {"gate_use_hidden_states": True, "normalize_per_loop": True, "emb_scale": 0.5}
    config_from_dict(model(**LOOP_ROWS["5 plt2"], **gate))


def test_only_fp8_with_the_delayed_recipe_keeps_scales():
    for recipe, expected in (("delayed", True), ("tensorwise", False)):
        assert config_from_dict(fp8(train__fp8_recipe=recipe)).train.keeps_fp8_scales is expected
    bf16 = run_tree(train__precision="bf16", train__fp8_recipe="delayed")
    assert not config_from_dict(bf16).train.keeps_fp8_scales
