"""FID by the standard network (Inception v3, 2015), computed by torch-fidelity where that is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from fastddpm.data.datasets import Dataset
from fastddpm.files.images import to_uint8
from fastddpm.files.tensors import sha256

NAME = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{NAME}"
# torch-fidelity unpickles the file without restrictions, so no other is let near it.
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def fid_obstacle(*, download: bool) -> str | None:
    """Say why FID cannot be computed here and what to do about it, or return None."""
    if importlib.util.find_spec("torch_fidelity") is None:
        return "FID; it needs torch-fidelity: pip install torch-fidelity"
    if not download and not weights_path().exists():
        return f"FID; it needs {weights_path()}; --download fetches it (96 MB)"
    return None


def weights_path() -> Path:
    """Return where torch.hub keeps the network's weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / NAME


def compute_fid(samples: Dataset, reference: Dataset) -> float:
    """Compute the FID of all samples to all images of the reference.

    The network's weights are downloaded when they are not there: ask `fid_obstacle` first.

    Raises:
        ValueError: the weights are not the ones that everybody uses.
        OSError: the download failed.
    """
    from torch_fidelity import calculate_metrics

    path = weights_path()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL, str(path), progress=False)
    if (found := sha256(path)) != SHA256:
        raise ValueError(f"{path} has the SHA-256 {found}, not {SHA256}; remove it")
    metrics = calculate_metrics(
        input1=_Pictures(samples),
        input2=_Pictures(reference),
        fid=True,
        feature_extractor_weights_path=str(path),
        cuda=torch.cuda.is_available(),
        cache=False,
        verbose=False,
    )
    return float(metrics["frechet_inception_distance"])


class _Pictures(torch.utils.data.Dataset[Tensor]):
    """Images as torch-fidelity takes them: uint8 [3, H, W]."""

    def __init__(self, data: Dataset) -> None:
        self._images = to_uint8(data.images)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, k: int) -> Tensor:
        return self._images[k].expand(3, -1, -1)
