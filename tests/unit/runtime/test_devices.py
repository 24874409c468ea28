"""Precision, peak FLOP/s and optimizer backend."""

import importlib.util

import pytest
import torch

from pltmoe.runtime import devices


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", 9.895e14),
        ("NVIDIA H100 80GB HBM3", 9.895e14),
        ("NVIDIA H100 PCIe", 7.56e14),
        ("NVIDIA A100-SXM4-80GB", 3.12e14),
        ("NVIDIA H20", 1.48e14),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA GeForce RTX 3090", None),
        ("CPU (2 cores)", None),
    ],
)
def test_peak_flops_by_device_name(name, expected):
    assert devices.peak_flops(name, torch.bfloat16) == expected


def test_fp32_has_no_peak_and_so_no_mfu():
    assert devices.peak_flops("NVIDIA H200", torch.float32) is None


@pytest.mark.parametrize(("cuda", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_precision_follows_the_device(monkeypatch, cuda, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert devices.precision_name("auto") == expected
    assert devices.precision_name("fp32") == "fp32"
    assert devices.precision_name("bf16") == "bf16"


@pytest.mark.parametrize(
    ("installed", "choice"),
    [
        ({"transformer_engine", "transformer_engine.pytorch", "apex", "apex.optimizers"}, "TE"),
        ({"apex", "apex.optimizers"}, "Apex"),
        ({"apex"}, "torch"),  # PyPI's apex is another package
        (set(), "torch"),
    ],
)
def test_optimizer_backend_and_its_reason(monkeypatch, installed, choice):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in installed or None)
    backend = devices.optimizer_backend()
    assert backend.choice == choice
    assert str(backend).startswith(f"{choice} (") and "installed" in backend.reason


def test_apex_adds_up_gradients_in_bf16_on_a_gpu_where_it_is_installed(monkeypatch):
    ask = devices.why_no_apex_products
    monkeypatch.setattr(devices, "_installed", lambda module: False)
    assert ask(torch.bfloat16) == "NVIDIA Apex is not installed with its CUDA kernels"
    monkeypatch.setattr(devices, "_installed", lambda module: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ask(torch.bfloat16) == "NVIDIA Apex needs an NVIDIA GPU, and there is none"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ask(torch.float32) == ask(torch.float64) == "it is used in bf16 runs only"

    def broken(name):
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(devices.importlib, "import_module", broken)
    assert ask(torch.bfloat16) == "NVIDIA Apex cannot be loaded (undefined symbol: _ZN3c10)"
    monkeypatch.setattr(devices.importlib, "import_module", lambda name: None)
    assert ask(torch.bfloat16) is None


def test_without_a_gpu_adam_is_pytorchs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "_installed", lambda module: True)
    assert str(devices.optimizer_backend()) == "torch (there is no GPU)"


def test_peak_memory_is_plausible():
    assert 0.01 < devices.peak_memory_gib() < 200
