"""What test_engine.py runs on its ranks."""

import random
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from pltmoe.checkpoint import store
from pltmoe.checkpoint.compatible import absent_tensors, check_weights
from pltmoe.checkpoint.manifest import Manifest, read_manifest
from pltmoe.engines import megatron as megatron_engine
from pltmoe.engines.megatron import MegatronEngine
from pltmoe.errors import EngineError
from pltmoe.model.initialize import global_name
from pltmoe.model.reference import router_loss
from tests.configs import PLT2
from tests.distributed.tiny import (
    MOE,
    batches,
    build_engine,
    drop_engine,
    numbers_of,
    small_buckets,
    tiny_config,
)
from tests.single_process import reference_of
from tests.state_dicts import megatron_to_hf


def train(
    steps: int,
    model: dict[str, Any] | None = None,
    save_to: Path | None = None,
    load_from: Path | None = None,
    copy_to: Path | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Take ``steps`` steps; return what each reported and what is left, under global names.

    ``load_from`` is the folder of one checkpoint; what was loaded is saved to ``copy_to``.
    """
    config = tiny_config(model, **changes)
    with small_buckets():
        engine = build_engine(config)
    assert len(engine._ddp.buffers[0].buckets) > 1
    start = 0
    if load_from:
        (load_from,) = load_from.glob("step_*")
        start = read_manifest(load_from).step
        parts = ("model", "optimizer")
        engine.restore(store.load_state(load_from, engine.placeholders(*parts)), start)
    if copy_to:
        store.begin_save(copy_to, engine.state(), Manifest(config=config, step=start)).finish()
    loaded = {"weights": weights(engine), "moments": moments(engine)}
    data = batches(engine.capabilities.layout, skip_steps=start)
    results = [engine.train_step(data, start + k + 1, watch=True) for k in range(steps)]
    valid = engine.eval_step(data)
    if save_to:
        manifest = Manifest(config=config, step=start + steps)
        store.begin_save(save_to, engine.state(), manifest).finish()
    report = {
        **numbers_of(results, valid),
        "weights": weights(engine),
        "moments": moments(engine),
        "loaded": loaded,
    }
    drop_engine()
    return report


def weights(engine: MegatronEngine) -> dict[str, torch.Tensor]:
    """Return this rank's weights and expert biases under their global names."""
    model = engine.model
    found = {global_name(model, n): p.detach().clone() for n, p in model.named_parameters()}
    biases = {n: b.clone() for n, b in model.named_buffers() if n.endswith("expert_bias")}
    return found | biases


def moments(engine: MegatronEngine) -> dict[tuple[str, str], list[tuple[int, torch.Tensor]]]:
    """Return Adam's state and the fp32 master weights of this rank's shards: (start, values)."""
    found: dict[tuple[str, str], list[tuple[int, torch.Tensor]]] = {}
    names = {parameter: n for n, parameter in engine.model.named_parameters()}
    for part in engine._optimizer.chained_optimizers:
        for ranges in part.gbuf_ranges:
            for bucket in (b for buckets in ranges.values() for b in buckets):
                for parameter, where in bucket["param_map"].items():
                    state = part._get_main_param_and_optimizer_states(parameter)
                    name = global_name(engine.model, names[parameter])
                    for kind in state.keys() - {"step"}:
                        values = state[kind]
                        pieces = found.setdefault((name, kind), [])
                        pieces.append((where["param"].start, values.detach().clone()))
    return found


def gradients_against_reference() -> dict[str, float]:
    """Largest relative difference per weight between the engine's gradient and a written-out loss.

    The written-out loss of a global batch of n loss tokens, with micro batch i having n_i of them:
    sum of cross entropies / n + sum_i n_i / n * (router losses of micro batch i).
    """
    config = tiny_config(optimizer__clip_grad_norm=0.0)
    engine = build_engine(config)
    reference, m = reference_of(engine.model, config.model), config.model
    layout = engine.capabilities.layout
    data = batches(layout)
    micro_batches = [next(data) for _ in range(layout.micro_batches)]
    n = sum(batch["loss_mask"].sum() for batch in micro_batches)
    total = torch.zeros((), dtype=torch.float64)
    for batch in micro_batches:
        out = reference(batch["tokens"], batch["position_ids"] == 0)
        mask = batch["loss_mask"].double()
        entropy = torch.nn.functional.cross_entropy(
            out.logits.flatten(0, 1), batch["labels"].flatten(), reduction="none"
        )
        total = total + (entropy.view_as(mask) * mask).sum() / n
        total = total + mask.sum() / n * router_loss(out, m)
    total.backward()
    engine.train_step(batches(layout), 1, watch=False)
    ours = {name: p.main_grad.double() for name, p in engine.model.named_parameters()}
    mapped = megatron_to_hf(ours, m, partial=True)
    differences = {
        name: ((mapped[name] - p.grad).abs().max() / p.grad.abs().max()).item()
        for name, p in reference.named_parameters()
        if p.grad is not None and p.grad.any()
    }
    drop_engine()
    return differences


def updates_against_torch() -> dict[str, float]:
    """Largest difference per weight after three updates by PyTorch's AdamW and clipping.

    Every setting is far from its default, so that none can be forgotten unseen.
    """
    settings = {"lr": 1e-2, "beta1": 0.7, "beta2": 0.8, "eps": 1e-2, "weight_decay": 0.5}
    settings |= {"clip_grad_norm": 0.3, "warmup_steps": 2}
    engine = build_engine(tiny_config(optimizer=settings))
    ours = dict(engine.model.named_parameters())
    copies = {name: p.detach().clone().requires_grad_() for name, p in ours.items()}
    decays = [p for p in copies.values() if p.dim() > 1]
    others = [p for p in copies.values() if p.dim() == 1]
    adam = torch.optim.AdamW(
        [{"params": decays}, {"params": others, "weight_decay": 0.0}],
        betas=(0.7, 0.8),
        eps=1e-2,
        weight_decay=0.5,
    )
    norm_of = megatron_engine.gradient_norm

    def norm_and_gradients(optimizer: Any) -> float:
        for name, copy in copies.items():
            copy.grad = ours[name].main_grad.clone()
        return norm_of(optimizer)

    data = batches(engine.capabilities.layout)
    with mock.patch.object(megatron_engine, "gradient_norm", norm_and_gradients):
        for step in (1, 2, 3):
            result = engine.train_step(data, step, watch=False)
            assert result.grad_norm > 0.6  # it is clipped
            torch.nn.utils.clip_grad_norm_(copies.values(), 0.3)
            for group in adam.param_groups:
                group["lr"] = result.learning_rate
            adam.step()
    differences = {name: (p - copies[name]).abs().max().item() for name, p in ours.items()}
    drop_engine()
    return differences


def random_numbers(folder: Path) -> tuple[list[float], list[float]]:
    """Save, draw; load, draw again: what each rank drew before and after."""
    config = tiny_config()
    engine = build_engine(config)
    random.seed(100 + dist.get_rank())  # so that every rank has its own state
    saved = store.begin_save(folder, engine.state(), Manifest(config=config, step=0)).finish()
    draws = []
    for _ in range(2):
        draws.append([random.random(), float(np.random.rand()), torch.rand(()).item()])
        engine.restore(store.load_state(saved, engine.placeholders("model", "random")), 0)
    drop_engine()
    return draws[0], draws[1]


def weights_of_a_vanilla_model(folder: Path) -> dict[str, Any]:
    """Save a bf16 model without loops and expert bias, and start one that has them from it."""
    bf16 = {"train__precision": "bf16"}
    vanilla = {name: value for name, value in MOE.items() if name not in PLT2}
    config = tiny_config(vanilla | {"moe_expert_bias_update_rate": 0.0}, **bf16)
    engine = build_engine(config)
    engine.train_step(batches(engine.capabilities.layout), 1, watch=False)
    engine.train_step(batches(engine.capabilities.layout), 2, watch=False)
    saved = store.begin_save(folder, engine.state(), Manifest(config=config, step=2)).finish()
    before = weights(engine)
    drop_engine()
    config = tiny_config(train__seed=5, **bf16)
    manifest = read_manifest(saved)
    check_weights(saved, manifest, config)
    engine = build_engine(config)
    wanted = engine.placeholders("model", absent=absent_tensors(manifest, config))
    engine.restore(store.load_state(saved, wanted), 0)
    report = {"before": before, "loaded": weights(engine), "moments": moments(engine)}
    drop_engine()
    return report


def clipping(limit: float) -> dict[str, Any]:
    """Take one step with a limit on the gradient norm; return Adam's first moments."""
    engine = build_engine(tiny_config(optimizer__clip_grad_norm=limit))
    result = engine.train_step(batches(engine.capabilities.layout), 1, watch=False)
    first = {k[0]: v for k, v in moments(engine).items() if k[1] == "exp_avg"}
    drop_engine()
    return {"norm": result.grad_norm, "first": first}


def broken_steps() -> dict[str, Any]:
    """Try a step with a loss that is not a number on rank 1, then one with an infinite gradient."""
    engine = build_engine(tiny_config(train__max_skipped_in_a_row=0))
    data = batches(engine.capabilities.layout)
    engine.train_step(data, 1, watch=False)
    before, report = weights(engine), {}
    sick = ({**b, "loss_mask": b["loss_mask"] * _sickness()} for b in data)
    try:
        engine.train_step(sick, 2, watch=False)
    except EngineError as error:
        report["loss"] = str(error)
    engine.model.final_norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    try:
        engine.train_step(data, 2, watch=False)
    except EngineError as error:
        report["gradient"] = str(error)
    after = weights(engine)
    report["untouched"] = all(torch.equal(after[name], before[name]) for name in before)
    drop_engine()
    return report


def _sickness() -> float:
    return float("nan") if dist.get_rank() == 1 else 1.0
