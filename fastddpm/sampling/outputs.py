"""The files of a sampling run: one PNG per seed, or one .npz; complete, or not there."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
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

STATES = "state-*.safetensors"
PATTERNS = ("seed-*.png", "part-*.npz", "samples.npz", "grid.png", STATES)


@dataclass
class Outputs:
    """What a run writes to its directory, by one process or by several.

    With "png" that is ``seed-000015.png`` per seed; with "npz" one ``part-00000.npz`` per batch until all are there,
    then ``samples.npz`` (x float32 [N, ...], seeds uint64 [N], class_labels int64 [N] where there are classes). A batch
    that a signal interrupted leaves ``state-00000.safetensors``, until all are there.

    Args:
        format: "png" or "npz".
        labels: one per sample, or None.
        batches: all batches of the run, as ranges of indices into seeds.
    """

    directory: Path
    format: str
    seeds: Sequence[int]
    labels: Sequence[int] | None
    batches: Sequence[range]

    def __post_init__(self) -> None:
        self.folder = RunFolder(self.directory, PATTERNS)
        self.grid_path = self.directory / "grid.png"
        self.samples_path = self.directory / "samples.npz"

    def paths(self, i: int) -> list[Path]:
        """Return the files that batch i writes."""
        if self.format == "npz":
            return [self.directory / f"part-{i:05d}.npz"]
        return [self.directory / f"seed-{self.seeds[k]:06d}.png" for k in self.batches[i]]

    def state(self, i: int) -> Path:
        """Return the file of batch i's `State`, where a signal stops it."""
        return self.directory / f"state-{i:05d}.safetensors"

    def missing(self) -> list[int]:
        """Return the batches of which a file is not there."""
        # One listing: to ask for each file would have a network's file system remember for a while that it is missing.
        there = set(os.listdir(self.directory))
        if self.format == "npz" and self.samples_path.name in there:
            return []
        return [i for i in range(len(self.batches)) if not all(path.name in there for path in self.paths(i))]

    def save(self, i: int, x: Tensor) -> None:
        """Write the files of batch i, x float32 [len(batch), ...]; those that exist are left alone."""
        batch = self.batches[i]
        if self.format == "npz":
            arrays = {"x": x.cpu().numpy(), "seeds": np.array([self.seeds[k] for k in batch], dtype=np.uint64)}
            if self.labels is not None:
                arrays["class_labels"] = np.array([self.labels[k] for k in batch], dtype=np.int64)
            images.save_npz(self.paths(i)[0], **arrays)
            return
        for path, image in zip(self.paths(i), images.to_uint8(x).cpu(), strict=True):
            if not path.exists():
                images.save_png(path, image)

    def finish(self, *, grid: bool, scale: int = 1) -> None:
        """Join the parts, and draw the grid, enlarged; for the last of several processes.

        Raises:
            FileNotFoundError: a file is missing: the process that was to write it died.
        """
        if not self.seeds:
            return
        files = [path for i in range(len(self.batches)) for path in self.paths(i)]
        joined = self.format == "npz" and self.samples_path.exists()
        lost = [] if joined else [path for path in files if not path.exists()]
        if lost:
            raise FileNotFoundError(
                f"{lost[0]} is missing, one of {len(lost)}: a process died before it wrote them; --resume draws them"
            )
        if self.format == "npz":
            if not joined:
                images.join_npz(self.samples_path, files)
            for path in files:
                path.unlink(missing_ok=True)
        for path in self.directory.glob(STATES):
            path.unlink(missing_ok=True)
        if grid:
            images.save_grid(self._drawn_images(files), self.grid_path, scale=scale)

    def _drawn_images(self, files: list[Path]) -> Tensor:
        if self.format == "npz":
            return images.to_uint8(torch.from_numpy(read_x(self.samples_path, MAX_GRID)))
        return torch.stack([_read_png(path) for path in files[:MAX_GRID]])


def read_x(path: Path, most: int | None = None) -> Any:
    """Return the samples in one of a run's .npz files, or the first of them: float32 [N, ...]."""
    with zipfile.ZipFile(path) as archive, archive.open("x.npy") as stream:
        np.lib.format.read_magic(stream)
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        N = shape[0] if most is None else min(shape[0], most)
        data = bytearray(stream.read(N * math.prod(shape[1:]) * dtype.itemsize))
    return np.frombuffer(data, dtype).reshape(N, *shape[1:])


def _read_png(path: Path) -> Tensor:
    with open_image(path) as image:
        pixels = np.array(image)
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[:, :, None]).permute(2, 0, 1)
