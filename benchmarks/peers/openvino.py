"""OpenVINO on the CPU around a network of ours."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from fastddpm.benchmarks.harness.case import NOT_ASKED, Case
from fastddpm.benchmarks.peers import networks
from torch import Tensor

NEEDS = {"openvino": "openvino"}


# It rounds the timestep to bfloat16 as well, so that its eps is off by up to 4.7e-2 near t = 999. Printed, not hidden.
BF16_TOLERANCE = 6e-2


def skips(case: Case) -> str | None:
    """It does not run on NVIDIA's GPUs."""
    if case.device != "cpu":
        return "runs on the CPU only"
    return NOT_ASKED if case.sampler != "ddpm" else None


def compile_network(case: Case, precision: str) -> Any:
    """Convert and compile for a fixed batch: its documented way to the lowest latency.

    Args:
        precision: "f32" or "bf16", its INFERENCE_PRECISION_HINT.

    Returns:
        A callable (x float32 [B, ...], t int64 [B]) to eps.
    """
    openvino = importlib.import_module("openvino")
    model = networks.WithLabels(networks.build(case.network), networks.labels(case.network, case.batch)).eval()
    example = (torch.zeros(case.full_shape), torch.zeros(case.batch, dtype=torch.int64))
    with torch.no_grad():
        converted = openvino.convert_model(model, example_input=example, input=[list(e.shape) for e in example])
    compiled = openvino.Core().compile_model(
        converted,
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        },
    )
    request = compiled.create_infer_request()

    def predict(x: Tensor, t: Tensor) -> Tensor:
        inputs = {0: x.contiguous().numpy(), 1: t.numpy()}
        result = request.infer(inputs, share_inputs=True, share_outputs=True)
        return torch.from_numpy(result[0])

    return predict
