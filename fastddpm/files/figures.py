"""Figures, which matplotlib draws where it is installed; it is loaded when the first one is drawn."""

from __future__ import annotations

import io
from typing import Any

INK, MUTED = "#1d2433", "#6b7487"


def new_figure(width: float, height: float, dpi: int = 100, **options: Any) -> Any:
    """Return an empty figure of this many inches, which no display and no global state of matplotlib knows of."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures are drawn with matplotlib: pip install 'fastddpm[train]'") from error
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white", **options)
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Any) -> bytes:
    """Render a figure."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
