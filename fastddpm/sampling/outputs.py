"""The files of a sampling run: one PNG per seed, or one .npz; complete, or not there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddpm.files import images
from fastddpm.files.image_reader import open_image
from fastddpm.files.run_folder import RunFolder

# A grid of more images is larger than anyone looks at, and than viewers open.
MAX_GRID = 1024

PATTERNS = ("seed-*.png", "part-*.npz", "samples.npz", "grid.png")


class Outputs:
    """What a run writes to its directory.

    With "png" that is ``seed-000015.png`` per seed; with "npz" one ``part-00000.npz`` per batch until all are there,
    then ``samples.npz`` (x float32 [N, ...], seeds uint64 [N], class_labels int64 [N] where there are classes).

    Args:
        directory: where to; it is made.
        file_format: "png" or "npz".
        seeds: one per sample, none twice.
        labels: one per sample, or None.
        batches: all batches of the run, as ranges of indices into seeds.
        mine: the batches that this process draws.
        shared: other processes draw the other batches into the same directory.
    """

    def __init__(
        self,
        directory: Path,
        file_format: str,
        seeds: Sequence[int],
        labels: Sequence[int] | None,
        batches: Sequence[range],
        mine: Sequence[range],
        *,
        shared: bool = False,
    ) -> None:
        self.directory, self.format = directory, file_format
        self._numbers = {batch: i for i, batch in enumerate(batches)}
        self.seeds, self.labels, self.batches, self.mine = seeds, labels, batches, mine
        self.shared = shared
        own = [path.name for batch in mine for path in self.paths(batch)]
        self.folder = RunFolder(directory, PATTERNS, mine=own if shared else None)
        self.grid_path = directory / "grid.png"
        self.samples_path = directory / "samples.npz"

    def paths(self, batch: range) -> list[Path]:
        """Return the files that one batch writes."""
        if self.format == "npz":
            return [self.directory / f"part-{self._numbers[batch]:05d}.npz"]
        return [self.directory / f"seed-{self.seeds[i]:06d}.png" for i in batch]

    def complete(self, batch: range) -> bool:
        """Tell whether every file of a batch is there."""
        if self.format == "npz" and self.samples_path.exists():
            return True
        return all(path.exists() for path in self.paths(batch))

    def save(self, batch: range, x: Tensor) -> None:
        """Write the files of one batch, x float32 [len(batch), ...]; those that exist are left alone."""
        if self.format == "npz":
            images.save_npz(self.paths(batch)[0], **self._arrays(batch, x.cpu().numpy()))
            return
        for path, image in zip(self.paths(batch), images.to_uint8(x).cpu(), strict=True):
            if not path.exists():
                images.save_png(path, image)

    def finish(self, *, grid: bool, scale: int = 1) -> None:
        """Join the parts, and draw the grid, enlarged; a process that drew only a share of the run does neither."""
        if self.shared or not self.seeds:
            return
        if self.format == "npz" and not self.samples_path.exists():
            parts = [self.paths(batch)[0] for batch in self.batches]
            x = np.concatenate([read_x(part) for part in parts])
            images.save_npz(self.samples_path, **self._arrays(range(len(self.seeds)), x))
            for part in parts:
                part.unlink()
        if grid:
            images.save_grid(self._drawn_images(), self.grid_path, scale=scale)

    def _arrays(self, batch: range, x: Any) -> dict[str, Any]:
        arrays = {"x": x, "seeds": np.array([self.seeds[i] for i in batch], dtype=np.uint64)}
        if self.labels is not None:
            arrays["class_labels"] = np.array([self.labels[i] for i in batch], dtype=np.int64)
        return arrays

    def _drawn_images(self) -> Tensor:
        if self.format == "npz":
            return images.to_uint8(torch.from_numpy(read_x(self.samples_path)[:MAX_GRID]))
        paths = [path for batch in self.batches for path in self.paths(batch)]
        return torch.stack([_read_png(path) for path in paths[:MAX_GRID]])


def read_x(path: Path) -> Any:
    """Return the samples in one of a run's .npz files, float32 [N, ...]."""
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["x"]


def _read_png(path: Path) -> Tensor:
    with open_image(path) as image:
        pixels = np.array(image)
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[:, :, None]).permute(2, 0, 1)
