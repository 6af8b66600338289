"""A curve of a few numbers as a small picture, for notebooks."""

from __future__ import annotations

from collections.abc import Sequence

WIDTH, HEIGHT, MOST = 240, 60, 120


def curve(values: Sequence[float], label: str) -> str:
    """Draw values from left to right as an SVG image, the highest at the top."""
    stride = max(1, len(values) // MOST)
    chosen = [*values[:-1:stride], values[-1]]
    low, high = min(chosen), max(chosen)
    across, up = (WIDTH - 4) / max(1, len(chosen) - 1), (HEIGHT - 4) / ((high - low) or 1.0)
    points = " ".join(f"{2 + i * across:.1f},{HEIGHT - 2 - (value - low) * up:.1f}" for i, value in enumerate(chosen))
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{label}"><title>{label}</title>'
        f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.5"/></svg>'
    )
