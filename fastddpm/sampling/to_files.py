"""A sampling run that writes files: what decides their bytes, and the drawing of those that are missing."""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastddpm.files.run_folder import config_hash
from fastddpm.machine.packages import weights_digest
from fastddpm.noise.seeds import format_seeds
from fastddpm.noise.v1 import NOISE_VERSION
from fastddpm.sampling.outputs import Outputs
from fastddpm.sampling.sample import Run
from fastddpm.tables.table import Table
from fastddpm.unet.unet import UNet


def describe(
    model: UNet, planned: Run, outputs: Outputs, *, sampler: str, classes: Any, overwrite: bool
) -> dict[str, Any]:
    """Return everything that decides the bytes of a run's output, for its manifest.

    Compiled code is used where it is there when the run begins, or where the run that this one goes on with used it.

    Args:
        model: the network.
        planned: the run.
        outputs: where it goes.
        sampler: name of the sampler.
        classes: the classes asked for, as JSON.
        overwrite: start again.
    """
    earlier = None if overwrite else outputs.folder.read()
    compiled = planned.settle(None if earlier is None else earlier["config"].get("compile"))
    options, table = planned.sampler.options, planned.sampler.table
    return {
        "noise": NOISE_VERSION,
        "model": config_hash(dataclasses.asdict(model.config)),
        "weights": weights_digest(model),
        "sampler": sampler,
        "steps": len(table),
        "table": table_digest(table),
        "shape": list(options.shape),
        "seeds": format_seeds(planned.seeds),
        "batch": len(planned.batches[0]),
        "classes": classes,
        "guidance": planned.guidance,
        "dtype": str(options.dtype).removeprefix("torch."),
        "device": options.device.type,
        "backend": "triton" if options.uses_triton else "torch",
        "compile": compiled,
        "format": outputs.format,
    }


def table_digest(table: Table) -> str:
    """Return the SHA-256 of a table: its rows, timesteps and flags."""
    flags = f"{table.name} {table.clip} {table.learned} {table.use_m} {table.history} {table.timesteps.dtype}\n"
    return hashlib.sha256(flags.encode() + _raw_bytes(table.rows) + _raw_bytes(table.timesteps)).hexdigest()


def _raw_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def draw_missing(planned: Run, outputs: Outputs, *, quiet: bool) -> list[tuple[int, float]]:
    """Draw and save the batches that are not complete, with a progress bar on a terminal.

    Returns:
        For each batch drawn, its number of samples and the seconds that it took.

    Raises:
        ValueError: a sample is not finite; its batch is not saved.
        OSError: a file cannot be written.
    """
    todo = [batch for batch in outputs.mine if not outputs.complete(batch)]
    total = len(todo) * len(planned.sampler.table)
    drawn = []
    silent = quiet or not sys.stderr.isatty()
    with tqdm(total=total, desc="sampling", unit="step", file=sys.stderr, disable=silent) as bar:
        for batch in todo:
            started = time.perf_counter()
            x = planned.draw(batch, lambda _: bar.update() and None)
            bar.set_description_str("sampling", refresh=False)
            _refuse_non_finite(x, [planned.seeds[i] for i in batch])
            drawn.append((len(batch), time.perf_counter() - started))
            outputs.save(batch, x)
    return drawn


def images_per_second(drawn: Sequence[tuple[int, float]]) -> float | None:
    """Return the rate of the median batch; the first, which warms up, counts only if it is alone."""
    rates = [n / seconds for n, seconds in drawn[1:] or drawn]
    return statistics.median(rates) if rates else None


def _refuse_non_finite(x: Tensor, seeds: list[int]) -> None:
    finite = x.isfinite().flatten(1).all(dim=1).tolist()
    bad = [seed for seed, good in zip(seeds, finite, strict=True) if not good]
    if bad:
        raise ValueError(
            f"the sample of seed {bad[0]} is not finite ({len(bad)} of {len(seeds)} in its batch); "
            "check the model, or use --dtype float32"
        )
