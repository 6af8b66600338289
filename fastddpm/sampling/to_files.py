"""A sampling run that writes files: what decides their bytes, and the drawing of those that are missing."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from fastddpm.files.run_folder import config_hash
from fastddpm.machine.interrupts import Stopped, interruptible
from fastddpm.machine.packages import weights_digest
from fastddpm.machine.progress import Progress
from fastddpm.machine.ranks import Ranks
from fastddpm.noise.seeds import format_seeds
from fastddpm.noise.v1 import NOISE_VERSION
from fastddpm.sampling.outputs import Outputs
from fastddpm.sampling.sample import Run
from fastddpm.sampling.state import StepResult, raw_bytes, table_digest
from fastddpm.unet.unet import UNet

logger = logging.getLogger("fastddpm")

# Seconds between two reports of a rank's steps to the others.
TELL_EVERY = 0.2


@contextlib.contextmanager
def begun(
    model: UNet,
    planned: Run,
    outputs: Outputs,
    ranks: Ranks,
    *,
    sampler: str,
    classes: Any,
    resume: bool = False,
    overwrite: bool = False,
) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Hold the folder of a run, ready to be written to; yield the run's config, and which batches are missing.

    Rank 0 begins the run, and the others join it. Compiled code is used where it is there when the run begins, or where
    the run that this one goes on with used it.

    Args:
        outputs: where it goes.
        resume: complete an earlier run of the same config.

    Raises:
        BlockingIOError, FileExistsError, NotADirectoryError: see `RunFolder`.
        ValueError: see `RunFolder`; or this rank would draw other samples than rank 0.
    """
    ranks, folder = ranks.within(str(outputs.directory)), outputs.folder
    told = ranks.told("run") if ranks.rank else None
    with folder.locked(shared=told is not None) as share:
        if told is None:
            # Before the network is compiled.
            folder.refuse_unless_free(resume=resume, overwrite=overwrite)
            earlier = None if overwrite else folder.read()
            compiled = None if earlier is None else earlier["config"].get("compile")
        else:
            compiled = told[0]["compile"]
        config = describe(model, planned, outputs, sampler=sampler, classes=classes, compiled=compiled)
        if told is None:
            folder.begin(config, resume=resume, overwrite=overwrite)
            told = config, outputs.missing()
            if (idle := ranks.world - len(planned.batches)) > 0:
                logger.warning("%d of %d processes have no batch to draw; give a smaller --batch", idle, ranks.world)
            if ranks.world > 1:
                share()
            ranks.tell("run", told)
        ranks.refuse_unless_same(told[0], config)
        yield config, told[1]


def describe(
    model: UNet, planned: Run, outputs: Outputs, *, sampler: str, classes: Any, compiled: bool | None
) -> dict[str, Any]:
    """Return everything that decides the bytes of a run's output, for its manifest.

    Args:
        outputs: where it goes.
        compiled: whether to use compiled code; None where it is there.
    """
    compiled = planned.settle(compiled)
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
        **_written({"guidance": planned.guidance, **planned.conditions}),
        "dtype": str(options.dtype).removeprefix("torch."),
        "device": options.device.type,
        "backend": "triton" if options.uses_triton else "torch",
        "compile": compiled,
        "format": outputs.format,
    }


def _written(value: Any) -> Any:
    """Return an argument as JSON, a tensor by its digest."""
    if isinstance(value, Tensor):
        return hashlib.sha256(raw_bytes(value)).hexdigest()
    return {name: _written(part) for name, part in value.items()} if isinstance(value, dict) else value


def draw(
    planned: Run, outputs: Outputs, missing: Sequence[int], ranks: Ranks, *, quiet: bool
) -> list[tuple[int, float]]:
    """Draw and save batches, those that no other rank has taken when this one is free; rank 0 shows how far all are.

    Returns:
        For each batch drawn whole, its number of samples and the seconds that it took.

    Raises:
        ValueError: a sample is not finite; its batch is not saved.
        OSError: a file cannot be written.
        Stopped: SIGINT or SIGTERM came; the batch in flight is kept as a `State`, from which the next run goes on.
    """
    ranks, drawn = ranks.within(str(outputs.directory)), []
    steps = len(planned.sampler.table)
    i, done, untold, due = 0, 0, 0, 0.0
    shown = Progress("sampling", len(missing) * steps, hidden=quiet or ranks.rank > 0)
    with shown as progress, interruptible() as interrupt:

        def tell() -> None:
            nonlocal untold, due
            progress.show(ranks.add("steps", untold))
            untold, due = 0, time.monotonic() + TELL_EVERY

        def stop_if_asked(kept: str) -> None:
            if interrupt.signal:
                name = signal.Signals(interrupt.signal).name
                raise Stopped(interrupt.signal, f"stopped by {name}; {kept} are kept, continue with --resume")

        def after_step(result: StepResult[None]) -> None:
            nonlocal done, untold
            untold, done = untold + result.index + 1 - done, result.index + 1
            if interrupt.signal:
                result.state().save(outputs.state(i))
                stop_if_asked(f"finished files and step {done} of {steps}, {outputs.state(i).name},")
            if time.monotonic() >= due:
                tell()

        while (place := ranks.add("taken") - 1) < len(missing):
            i, done = missing[place], 0
            batch, state = planned.batches[i], outputs.state(i)
            started, whole = time.perf_counter(), not state.exists()
            x = planned.draw(batch, after_step, None if whole else state)
            _refuse_non_finite(x, [planned.seeds[k] for k in batch])
            if whole:
                drawn.append((len(batch), time.perf_counter() - started))
            outputs.save(i, x)
            stop_if_asked("finished files")
        tell()
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
