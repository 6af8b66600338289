"""OpenVINO on the CPU around a network of ours."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fastddpm.benchmarks.harness.case import NOT_ASKED, Case, Prepared, Provider
from fastddpm.benchmarks.peers import networks
from torch import Tensor, nn

NEEDS = {"openvino": "openvino"}
# It rounds the timestep to bfloat16 as well, so that its eps is off by up to 4.7e-2 near t = 999. Printed, not hidden.
_BF16_TOLERANCE = 6e-2


def providers(prepare: Callable[[Case, Any], Prepared]) -> tuple[Provider, Provider]:
    """OpenVINO in float32 and bfloat16; `prepare` is given a case and the compiled network, see `compile_module`."""

    def build(precision: str) -> Callable[[Case], Prepared]:
        return lambda case: prepare(case, compile_module(networks.labelled(case), case.full_shape, precision))

    return (
        Provider("OpenVINO", build("f32"), "float32", NEEDS, skips=_skips),
        Provider("OpenVINO, bf16", build("bf16"), "bfloat16", NEEDS, skips=_skips, tolerance=_BF16_TOLERANCE),
    )


def _skips(case: Case) -> str | None:
    """It does not run on NVIDIA's GPUs."""
    if case.device != "cpu":
        return "runs on the CPU only"
    return NOT_ASKED if case.sampler != "ddpm" else None


def compile_module(model: nn.Module, shape: Sequence[int], precision: str, cache: Path | None = None) -> Any:
    """Convert and compile for a fixed batch: its documented way to the lowest latency.

    Args:
        model: called as model(x, t).
        shape: of x, [B, ...].
        precision: "f32" or "bf16", its INFERENCE_PRECISION_HINT.
        cache: a folder that keeps what was converted and compiled for later processes.

    Returns:
        A callable (x float32 [B, ...], t int64 [B]) to eps.
    """
    openvino = importlib.import_module("openvino")
    core = openvino.Core()
    kept = None if cache is None else cache / "network.xml"
    if kept is None or not kept.exists():
        example = (torch.zeros(*shape), torch.zeros(shape[0], dtype=torch.int64))
        with torch.no_grad():
            network = openvino.convert_model(model, example_input=example, input=[list(e.shape) for e in example])
        if kept is not None:
            openvino.save_model(network, kept, compress_to_fp16=False)
    hints = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        **({} if cache is None else {"CACHE_DIR": str(cache)}),
    }
    request = core.compile_model(network if kept is None else kept, "CPU", hints).create_infer_request()

    def predict(x: Tensor, t: Tensor) -> Tensor:
        inputs = {0: x.contiguous().numpy(), 1: t.numpy()}
        result = request.infer(inputs, share_inputs=True, share_outputs=True)
        return torch.from_numpy(result[0])

    return predict
