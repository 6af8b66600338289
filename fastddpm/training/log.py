"""What a training run shows and records: a progress bar, a loss log, a loss plot and grids of samples."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from fastddpm.checks import integer, number
from fastddpm.data.datasets import Dataset
from fastddpm.files.atomic import write_files
from fastddpm.files.figures import new_figure, to_png
from fastddpm.files.images import has_image_shape, save_grid
from fastddpm.files.outside import regular_size
from fastddpm.files.safejson import parse_object
from fastddpm.machine.progress import Progress
from fastddpm.sampling.network import num_classes_of
from fastddpm.sampling.sample import sample
from fastddpm.training.config import TrainConfig
from fastddpm.training.folder import LOG, PLOT
from fastddpm.unet.unet import UNet

# A training-time grid: DDPM steps enough to judge by, and pixels enough to look at.
GRID_STEPS, GRID_SIDE = 100, 64


class TrainLog:
    """Progress bar and log file of one run; close it.

    Args:
        out: its folder; lines of its log that lie beyond ``start`` are dropped.
        start: gradient steps taken before.
        state: what `state()` returned at ``start``; empty at the beginning.
        quiet: no progress bar. Without a terminal on stderr there is a line now and then instead.
    """

    def __init__(self, config: TrainConfig, out: Path, start: int, state: dict[str, Any], *, quiet: bool) -> None:
        self._config, self._out = config, out
        self._tensorboard = _tensorboard_writer(out, start) if config.tensorboard else None
        self._note = ""
        self._sum, self._count = float(state.get("sum", 0.0)), int(state.get("count", 0))
        self._progress = Progress("training", config.steps, start, hidden=quiet)
        kept = "".join(f"{json.dumps(line)}\n" for line in read_log(out) if line["step"] <= start)
        write_files({out / LOG: kept.encode()})
        self._file: IO[str] = (out / LOG).open("a")

    def close(self) -> None:
        """End the progress bar, and close the files."""
        self._progress.__exit__(None, None, None)
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._file.close()

    def state(self) -> dict[str, Any]:
        """The unfinished line, so that a resumed run completes it."""
        return {"sum": self._sum, "count": self._count}

    def add(self, n: int, loss: float, lr: float) -> None:
        """Record the loss and learning rate of step n (from 0)."""
        self._sum += loss
        self._count += 1
        if (n + 1) % self._config.log_every == 0:
            mean = self._sum / self._count
            self._file.write(json.dumps({"step": n + 1, "loss": mean, "lr": lr}) + "\n")
            self._file.flush()
            if self._tensorboard is not None:
                self._tensorboard.add_scalar("loss", mean, n + 1)
                self._tensorboard.add_scalar("learning rate", lr, n + 1)
            self._note = f"loss {mean:.4f}"
            self._sum, self._count = 0.0, 0
        self._progress.show(n + 1, self._note)

    def picture(self, n: int, model: UNet, data: Dataset) -> None:
        """Write a grid of the (averaged) model's samples after n steps, and, with matplotlib, the plot of the loss."""
        self._progress.say("drawing samples")
        _save_grid(self._out / f"samples-{n:07d}.png", model, data)
        self._progress.say(self._note)
        plot = loss_plot(list(read_log(self._out)))
        if plot is not None:
            write_files({self._out / PLOT: plot})


def _tensorboard_writer(out: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("--tensorboard needs tensorboard: pip install tensorboard") from error
    return SummaryWriter(str(out), purge_step=start + 1)


def read_log(out: Path) -> Iterator[dict[str, float]]:
    """Yield the lines of a run's log, {"step", "loss", "lr"}; a line that a crash cut off is left out.

    Raises:
        ValueError: it is no regular file, or a line is damaged.
    """
    path = out / LOG
    if not path.exists():
        return
    regular_size(path)
    with path.open("rb") as lines:
        for n, line in enumerate(lines, start=1):
            if line.endswith(b"\n"):
                where = f"{path}: line {n}"
                values = parse_object(line, source=where)
                step = integer(f"{where}: step", values.get("step"), 0)
                yield {"step": step, **{key: number(f"{where}: {key}", values.get(key)) for key in ("loss", "lr")}}


def loss_plot(lines: list[dict[str, float]], bins: int = 400) -> bytes | None:
    """Plot the loss over the steps as a PNG, averaged into at most ``bins`` points; None without matplotlib."""
    if not lines or importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    width = math.ceil(len(lines) / bins)
    groups = [lines[i : i + width] for i in range(0, len(lines), width)]
    figure = new_figure(7, 4, dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot([g[-1]["step"] for g in groups], [sum(line["loss"] for line in g) / len(g) for g in groups])
    axes.set(xlabel="gradient step", ylabel="loss", yscale="log", title="training loss")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
    axes.grid(True, which="both", alpha=0.3)
    return to_png(figure)


def _save_grid(path: Path, model: UNet, data: Dataset) -> None:
    """Draw four samples of each class (of at most ten), or sixteen, with the first conditions, as one picture.

    Channels that are no grey, RGB or RGBA lie side by side.
    """
    classes = num_classes_of(model)
    columns = min(classes, 10) if classes else 4
    count = 4 * columns
    labels = [i % columns for i in range(count)] if classes else None
    T = model.diffusion.num_timesteps if model.diffusion else 1000
    k = torch.arange(count, device="cpu") % len(data)
    given = {} if data.condition is None else {"condition": data.condition[k]}
    steps = min(GRID_STEPS, T)
    x_0 = sample(model, seeds=range(count), steps=steps, class_labels=labels, model_kwargs=given, compile=False)
    if not has_image_shape(data.shape):
        x_0, columns = x_0.flatten(0, 1)[:, None], columns * data.shape[0]
    scale = max(1, GRID_SIDE // min(x_0.shape[2:]))
    save_grid(x_0, path, columns=columns, scale=scale)
