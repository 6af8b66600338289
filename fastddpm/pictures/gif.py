"""The animation of a `Recording`: there and back again, as a GIF."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastddpm.files.figures import new_figure
from fastddpm.pictures import strip as drawing
from fastddpm.pictures.process import Process, marginal
from fastddpm.pictures.recording import Recording

# A process of few steps glides from state to state in this many frames there, and as many back.
GLIDE_FRAMES = 32
MAX_POINTS = 1200
COLOURS = 64
# Milliseconds.
FRAME, REST, PAUSE = 60, 450, 1500

_WIDTH, _SIDE = 4.6, 4.2


class Frame(NamedTuple):
    """One frame.

    Attributes:
        forward: of the forward process, else of the reverse.
        k: place among the recorded states, the fraction being the way from one to the next.
    """

    forward: bool
    k: float
    milliseconds: int


def frames(recording: Recording) -> list[Frame]:
    """List the frames: forward to the last state, and back."""
    last = len(recording.indices) - 1
    # Points glide from state to state; images are shown as they are.
    between = max(1, round(GLIDE_FRAMES / last)) if drawing.is_points(recording) else 1
    rest = REST if last < 20 else FRAME
    there = [Frame(True, _eased(i, between), FRAME if i % between else rest) for i in range(last * between + 1)]
    there[0], there[-1] = (f._replace(milliseconds=PAUSE) for f in (there[0], there[-1]))
    back = [f._replace(forward=False) for f in there[::-1]]
    return [*there, *back]


def _eased(i: int, between: int) -> float:
    """Place of frame i: slow at the states, fast between them."""
    state, step = divmod(i, between)
    u = step / between
    return state + u * u * (3.0 - 2.0 * u)


def gif(recording: Recording) -> bytes:
    """Draw a recording as an animated GIF that repeats."""
    plan = frames(recording)
    images = list(_drawn(recording, plan))
    # All colours are in the first frame of either process.
    sheet = Image.new("RGB", (images[0].width, 2 * images[0].height))
    sheet.paste(images[0], (0, 0))
    sheet.paste(images[-1], (0, images[0].height))
    palette = _with_white(sheet.quantize(COLOURS, dither=Image.Dither.NONE))
    first, *others = (image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images)
    stream = io.BytesIO()
    first.save(
        stream,
        format="GIF",
        save_all=True,
        append_images=others,
        duration=[f.milliseconds for f in plan],
        loop=0,
        optimize=False,
        disposal=1,
    )
    return stream.getvalue()


def _with_white(palette: Image.Image) -> Image.Image:
    """Make near-whites of a palette white: averaging tints the ground, and the lookup is content with a near one."""
    colours = np.array(palette.getpalette()).reshape(-1, 3)
    colours[colours.min(axis=1) >= 244] = 255
    palette.putpalette(colours.ravel().tolist())
    return palette


def _drawn(recording: Recording, plan: list[Frame]) -> Iterator[Image.Image]:
    scene = _Scene(recording)
    for frame in plan:
        scene.show(frame)
        yield drawing.pixels(scene.figure)


class _Scene:
    """The figure, drawn once; a frame changes what moves."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        picture = _SIDE if drawing.is_points(recording) else _SIDE * _image_aspect(recording)
        height = picture + 1.95
        self.figure = new_figure(_WIDTH, height)
        self.title = self._write(height - 0.28, size=15, weight="bold")
        self.numbers = [self._write(height - 0.62, x=x, size=14) for x in (0.14, 0.46, 0.805)]
        margin = (_WIDTH - _SIDE) / 2
        self.axes = drawing.add_axes(self.figure, margin, 1.05, _SIDE, picture)
        self._add_points() if drawing.is_points(recording) else self._add_images()
        curve = drawing.add_axes(self.figure, margin, 0.42, _SIDE, 0.5)
        self.dot = _draw_curve(curve, recording.process)
        self.verdict = self._write(0.2, size=11)

    def _write(self, y: float, x: float = 0.5, **style: Any) -> Any:
        height = self.figure.get_size_inches()[1]
        return self.figure.text(x, y / height, "", ha="center", va="center", **{"color": drawing.INK, **style})

    def _add_points(self) -> None:
        limit = drawing.LIMIT
        self.axes.set(xlim=(-limit, limit), ylim=(-limit, limit))
        self.cloud = self.axes.scatter([], [], s=5, alpha=0.8, linewidths=0)
        target = drawing.ellipse(np.zeros(2), np.eye(2), edgecolor=drawing.TARGET, linewidth=1.2, linestyle=(0, (3, 2)))
        self.axes.add_patch(target)
        self.moments: Any = None

    def _add_images(self) -> None:
        start = _pictures(self.recording, Frame(True, 0.0, 0))
        self.image = self.axes.imshow(start, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        style = {"transform": self.axes.transAxes, "ha": "left", "va": "top", "size": 13, "color": drawing.INK}
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2.5}
        self.axes.text(0.012, 0.985, "$x_t$", bbox=box, **style)
        self.estimate = self.axes.text(0.012, 0.475, "$x_0$", bbox=box, **style)

    def show(self, frame: Frame) -> None:
        """Move everything to where it is in a frame."""
        recording, process = self.recording, self.recording.process
        alpha_bar = _alpha_bar(recording, frame.k)
        # On the way between two states the numbers are those of the nearer one.
        near = recording.indices[round(frame.k)]
        self.title.set_text(
            r"forward: $q(x_t\,|\,x_{t-1})\;\rightarrow$"
            if frame.forward
            else rf"$\leftarrow$ reverse: {recording.model}"
        )
        texts = (
            rf"$t = {process.t[near]}$",
            rf"$\bar{{\alpha}}_t = {drawing.number(process.alpha_bar(near))}$",
            rf"SNR ${drawing.number(process.snr(near))}$",
        )
        for place, text in zip(self.numbers, texts, strict=True):
            place.set_text(text)
        self.dot.set_data([_state(recording, frame.k)], [alpha_bar])
        self.verdict.set_text(drawing.verdict(process))
        self.verdict.set_color(drawing.verdict_colour(process))
        if drawing.is_points(recording):
            self._move_points(frame, alpha_bar)
        else:
            self.image.set_data(_pictures(recording, frame))
            self.estimate.set_text("$x_0$" if frame.forward else r"$\hat{x}_0(x_t)$")

    def _move_points(self, frame: Frame, alpha_bar: float) -> None:
        states = _states(self.recording, frame)
        self.cloud.set_offsets(_between(self.recording, states, frame.k).numpy())
        self.cloud.set_facecolor(drawing.colours(states[0]))
        if self.moments is not None:
            self.moments.remove()
        mean, covariance = (m.numpy() for m in marginal(self.recording.x_0, alpha_bar))
        self.moments = drawing.ellipse(mean, covariance, edgecolor=drawing.INK, linewidth=1.5)
        self.axes.add_patch(self.moments)


def _states(recording: Recording, frame: Frame) -> Tensor:
    states = recording.forward if frame.forward else recording.reverse
    return states[:, :MAX_POINTS] if drawing.is_points(recording) else states


def _between(recording: Recording, states: Tensor, k: float) -> Tensor:
    """Return the points at place k: between two states a step of the same noise, less far.

    x_t = sqrt(a) x_s + sqrt(1 - a) eps with a = alpha_bar_t / alpha_bar_s becomes sqrt(a') x_s + sqrt(1 - a') eps. On
    the forward process that is a draw of the marginal at this alpha_bar, so the cloud keeps to its ellipse.
    """
    low = min(int(k), len(states) - 2)
    start, end = (recording.process.alpha_bar(recording.indices[i]) for i in (low, low + 1))
    a, a_here = end / start, _alpha_bar(recording, k) / start
    eps = (states[low + 1] - math.sqrt(a) * states[low]) / math.sqrt(1.0 - a)
    return math.sqrt(a_here) * states[low] + math.sqrt(1.0 - a_here) * eps


def _along(values: list[float], k: float) -> float:
    low = min(int(k), len(values) - 2)
    return values[low] + (k - low) * (values[low + 1] - values[low])


def _state(recording: Recording, k: float) -> float:
    """Number of the state at place k among those recorded."""
    return _along([float(i) for i in recording.indices], k)


def _alpha_bar(recording: Recording, k: float) -> float:
    """alpha_bar at place k among the recorded states."""
    return _along([recording.process.alpha_bar(i) for i in recording.indices], k)


def _pictures(recording: Recording, frame: Frame) -> np.ndarray:
    """The images of a frame side by side, x_t above x_0 or the estimate of it."""
    k = round(frame.k)
    x_0 = recording.forward[0] if frame.forward else recording.x0_estimates[k]
    columns = [drawing.mosaic(torch.stack(pair)) for pair in zip(_states(recording, frame)[k], x_0, strict=True)]
    return np.concatenate(columns, axis=1)


def _image_aspect(recording: Recording) -> float:
    height, width = _pictures(recording, Frame(True, 0.0, 0)).shape[:2]
    return height / width


def _draw_curve(axes: Any, process: Process) -> Any:
    states = range(process.steps + 1)
    axes.plot(states, [process.alpha_bar(i) for i in states], color=drawing.MUTED, linewidth=1.5)
    axes.set(ylim=(-0.12, 1.12), xlim=(-0.02 * process.steps, 1.02 * process.steps))
    axes.text(0.985, 0.8, r"$\bar{\alpha}_t$", transform=axes.transAxes, ha="right", va="center", color=drawing.MUTED)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    return axes.plot([0], [1], marker="o", markersize=7, color=drawing.INK)[0]
