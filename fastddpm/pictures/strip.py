"""The picture of a `Recording` as a strip of panels."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from fastddpm.files.figures import INK, MUTED, new_figure
from fastddpm.files.images import make_grid, to_uint8
from fastddpm.pictures.process import GAUSSIAN_END, Process, marginal
from fastddpm.pictures.recording import Recording, spread

# Panels that stay legible side by side at the width of a README.
MAX_PANELS = 9
# Points are drawn to three standard deviations of N(0, I): all but 0.5 %.
LIMIT = 3.0
COLOURS = 160

FRAME, GOOD, BAD = "#d5d9e2", "#1a7f4b", "#c0392b"
TARGET = "#8e97a8"

# Inches. What stands below the panels takes two lines where the picture is narrow.
_GAP, _LEFT, _TOP, _BOTTOM = 0.04, 0.72, 1.58, 0.72
_MIN_WIDTH, _ONE_LINE = 7.0, 14.0


def strip(recording: Recording) -> bytes:
    """Draw a recording as a PNG (see `strip_figure`)."""
    stream = io.BytesIO()
    picture = pixels(strip_figure(recording))
    if is_points(recording):
        # The points' soft edges make the file three times as large as a palette does.
        picture = picture.quantize(COLOURS, dither=Image.Dither.NONE)
    picture.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def strip_figure(
    recording: Recording,
    columns: Sequence[int] | None = None,
    rows: Sequence[tuple[str, Tensor]] | None = None,
    side: float = 1.9,
) -> Any:
    """Lay the states of a recording out side by side: the forward process, beneath it the reverse, column by column.

    Args:
        columns: which of its states; default: as many as stay legible.
        rows: labels and states; default: those of `rows_of`.
        side: width of a panel in inches.
    """
    columns = spread(len(recording.indices) - 1, MAX_PANELS) if columns is None else columns
    labelled = rows_of(recording) if rows is None else rows
    heights = [side * _aspect(states) for _, states in labelled]
    content = _LEFT + side * len(columns) + 0.08
    width = max(content, _MIN_WIDTH)
    left = _LEFT + (width - content) / 2
    height = _TOP + sum(heights) + (_BOTTOM if width >= _ONE_LINE else 1.5 * _BOTTOM)
    figure = new_figure(width, height)
    title = headline(recording)
    # No wider than the figure: a bold letter is 0.65 of its size wide.
    size = min(21, 72 * (width - 0.2) / (0.65 * len(title)))
    _text(figure, width / 2, height - 0.32, title, size=size, weight="bold")
    for c, k in enumerate(columns):
        _titles(figure, recording.process, recording.indices[k], left + side * (c + 0.5), height - 0.80)
    top = height - _TOP
    for (label, states), row_height in zip(labelled, heights, strict=True):
        top -= row_height
        _text(figure, left - 0.38, top + row_height / 2, label, rotation=90, size=15, linespacing=1.5)
        for c, k in enumerate(columns):
            axes = _add_axes(figure, left + side * c + _GAP, top + _GAP, side - 2 * _GAP, row_height - 2 * _GAP)
            _panel(axes, recording, states, k)
    _footer(figure, recording, width)
    return figure


def _add_axes(figure: Any, x: float, y: float, width: float, height: float) -> Any:
    """Add an empty frame; all in inches, from the lower left corner."""
    w, h = figure.get_size_inches()
    axes = figure.add_axes((x / w, y / h, width / w, height / h))
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=FRAME, linewidth=1.0)
    return axes


def _text(figure: Any, x: float, y: float, text: str, **style: Any) -> Any:
    w, h = figure.get_size_inches()
    return figure.text(x / w, y / h, text, **{"ha": "center", "va": "center", "color": INK, **style})


def rows_of(recording: Recording) -> list[tuple[str, Tensor]]:
    """Return the label and the states of each row: forward, reverse and, of images, the estimates of x_0."""
    rows = [
        ("forward $\\rightarrow$\n$q(x_t\\,|\\,x_{t-1})$", recording.forward),
        (f"$\\leftarrow$ reverse\n{recording.model}", recording.reverse),
        (f"$\\hat{{x}}_0$ from $x_t$\n{recording.model}", recording.x0_estimates),
    ]
    return rows[:2] if is_points(recording) else rows


def is_points(recording: Recording) -> bool:
    """Tell whether the recording is about points, not images."""
    return recording.x_0.dim() == 2


def _aspect(states: Tensor) -> float:
    """Height over width of a row's panels."""
    if states.dim() == 3:
        return 1.0
    height, width = mosaic(states[0]).shape[:2]
    return height / width


def headline(recording: Recording) -> str:
    """Say in one line what is seen."""
    process, n = recording.process, recording.forward.shape[1]
    steps = f"{process.steps:,}" if process.t[-1] == process.steps else f"{process.steps:,} of {process.t[-1]:,}"
    steps += " step" if process.steps == 1 else " steps"
    one = n == 1 and not is_points(recording)
    if is_points(recording):
        what, back = f"{n:,} points", "come back"
    else:
        what, back = ("an image", "a sample comes back") if one else (f"{n} images", "samples come back")
    if not process.ends_gaussian():
        return f"{recording.name}: {what} after {steps} of noise {'is' if one else 'are'} not Gaussian"
    return f"{recording.name}: {what} {'dissolves' if one else 'dissolve'} into a Gaussian in {steps}, and {back}"


def _titles(figure: Any, process: Process, i: int, x: float, y: float) -> None:
    _text(figure, x, y, rf"$t = {process.t[i]}$" + (" (data)" if i == 0 else ""), size=17)
    _text(figure, x, y - 0.28, rf"$\bar{{\alpha}}_t = {number(process.alpha_bar(i))}$", size=15)
    _text(figure, x, y - 0.55, rf"SNR ${number(process.snr(i))}$", size=15, color=MUTED)


def number(value: float) -> str:
    """Write a number to three digits for mathtext: 1, 0.958, 0.9999, 22.7, 3.7 x 10^-5, infinity."""
    if math.isinf(value):
        return r"\infty"
    if value == round(value) and abs(value) < 1e4:
        return f"{value:.0f}"
    if 0.9995 <= value < 1.0:
        # Enough digits to tell it from 1.
        return f"{value:.{math.ceil(-math.log10(1.0 - value) - 1e-6)}f}"
    exponent = int(f"{value:.2e}".split("e")[1])
    if -2 <= exponent <= 3:
        return f"{value:.{max(0, 2 - exponent)}f}"
    mantissa, power = f"{value:.1e}".split("e")
    return rf"{mantissa}\cdot 10^{{{int(power)}}}".replace(r"1.0\cdot ", "")


def _panel(axes: Any, recording: Recording, states: Tensor, k: int) -> None:
    if not is_points(recording):
        axes.imshow(mosaic(states[k]), cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
        return
    axes.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal")
    points = states[k].numpy()
    axes.scatter(points[:, 0], points[:, 1], s=3.2, c=colours(states[0]), alpha=0.75, linewidths=0)
    axes.add_patch(_ellipse(np.zeros(2), np.eye(2), edgecolor=TARGET, linewidth=1.2, linestyle=(0, (3, 2))))
    mean, covariance = (m.numpy() for m in marginal(recording.x_0, recording.process.alpha_bar(recording.indices[k])))
    axes.add_patch(_ellipse(mean, covariance, edgecolor=INK, linewidth=1.5))
    axes.plot(*mean, marker="+", markersize=8, markeredgewidth=1.5, color=INK)


def _ellipse(mean: np.ndarray, covariance: np.ndarray, **style: Any) -> Any:
    """Return the points two standard deviations from the mean, as a patch."""
    from matplotlib.patches import Ellipse

    variances, axes = np.linalg.eigh(covariance)
    width, height = 4.0 * np.sqrt(variances.clip(min=0.0))
    angle = math.degrees(math.atan2(axes[1, 0], axes[0, 0]))
    return Ellipse(tuple(mean), width, height, angle=angle, facecolor="none", **style)


def colours(points: Tensor) -> np.ndarray:
    """Colour points by the direction in which they lie, float [N, 3] in [0, 1].

    The hues are a circle in OKLab (Ottosson 2020, "A perceptual color space for image processing"), so that all look
    equally light.
    """
    x, y = points.double().numpy().T
    hue = np.arctan2(y, x)
    lab = np.stack([np.full(len(hue), 0.66), 0.155 * np.cos(hue), 0.155 * np.sin(hue)])
    to_lms = np.array(
        [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.291485548]]
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.707614701],
        ]
    )
    linear = (to_rgb @ (to_lms @ lab) ** 3).T.clip(0.0, 1.0)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def mosaic(states: Tensor) -> np.ndarray:
    """Stack images [m, C, H, W] in [-1, 1] above each other, uint8 [m (H + gap) - gap, W] or [..., W, 3]."""
    gap = max(1, states.shape[2] // 24)
    grid = make_grid(to_uint8(states), columns=1, gap=gap, ground=255)
    stacked = grid[:, gap:-gap, gap:-gap].permute(1, 2, 0).numpy()
    return stacked[:, :, 0] if stacked.shape[2] == 1 else stacked


def _verdict(process: Process) -> str:
    """Say whether the process ends Gaussian, with the number that decides, in mathtext."""
    alpha_bar, bound = number(process.alpha_bar(process.steps)), number(GAUSSIAN_END)
    name = rf"\bar{{\alpha}}_{{{process.t[-1]}}}"
    if process.ends_gaussian():
        return rf"ends Gaussian: ${name} = {alpha_bar} < {bound}$"
    return rf"does NOT end Gaussian: ${name} = {alpha_bar} \geq {bound}$"


def _footer(figure: Any, recording: Recording, width: float) -> None:
    process = recording.process
    text = _verdict(process)
    if width >= _ONE_LINE:
        L_T = number(process.prior_term(recording.x_0))
        text += rf",   $\mathrm{{KL}}(q(x_T|x_0)\,\|\,\mathcal{{N}}(0, I)) = {L_T}$ nats"
    _text(figure, width - 0.1, 0.34, text, ha="right", size=16, color=GOOD if process.ends_gaussian() else BAD)
    if is_points(recording):
        _legend(figure, 0.34 if width >= _ONE_LINE else 0.72)


def _legend(figure: Any, y: float) -> None:
    from matplotlib.lines import Line2D

    exact = Line2D([], [], color=INK, linewidth=1.8, marker="+", markersize=9)
    target = Line2D([], [], color=TARGET, linewidth=1.6, linestyle=(0, (3, 2)))
    width, height = figure.get_size_inches()
    figure.legend(
        handles=[exact, target],
        labels=[r"exact mean and $2\sigma$ of $q(x_t)$", r"$2\sigma$ of $\mathcal{N}(0, I)$"],
        loc="center left",
        bbox_to_anchor=(0.54 / width, y / height),
        ncols=2,
        frameon=False,
        fontsize=15,
    )


def pixels(figure: Any) -> Image.Image:
    """Render a figure as an RGB image."""
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[:, :, :3])
