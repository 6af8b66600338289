"""Arithmetic and traffic of the subjects, for the roofline: counted once from the reference, whoever runs it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from fastddpm.benchmarks.counts.counting import OpCounter
from fastddpm.benchmarks.peers import networks
from torch.utils.flop_counter import FlopCounterMode

# Operations whose operands must travel however well the rest is fused: convolutions, matrix products, attention.
_HEAVY = ("convolution", "mm", "addmm", "bmm", "baddbmm", "scaled_dot_product")


class _HeavyTraffic(OpCounter):
    """Counts the operands of heavy operations only; elementwise work is taken as fused, and free."""

    def _count(self, name: str, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if name.lstrip("_").startswith(_HEAVY):
            super()._count(name, func, args, kwargs, result)


@functools.lru_cache(maxsize=16)
def network_work(name: str, batch: int) -> tuple[float, float]:
    """FLOPs of one call, and float32 bytes that its convolutions, matrix products and attention must move."""
    model = networks.build(name)
    x = torch.zeros(batch, *networks.shape(name))
    t = torch.zeros(batch, dtype=torch.int64)
    labels = networks.labels(name, batch)
    kwargs = {} if labels is None else {"class_labels": labels}
    counter, flops = _HeavyTraffic(), FlopCounterMode(display=False)
    with torch.no_grad(), counter, flops:
        model(x, t, **kwargs)
    return float(flops.get_total_flops()), float(counter.counts.bytes_read + counter.counts.bytes_written)


def point(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Place a timed row of the network under the roofline: FLOP per byte, GFLOP/s; None for other rows."""
    case = row["case"]
    if row["op"] != "unet" or not row["checked"]:
        return None
    flops, size = network_work(case["network"], case["batch"])
    size *= 0.5 if row["dtype"] in ("bfloat16", "float16") else 1.0
    return {"flop_per_byte": flops / size, "gflop_per_s": flops / row["p50_ms"] / 1e6}
