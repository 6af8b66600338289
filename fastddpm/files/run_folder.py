"""The manifest of a sampling run: what its files were made from, so that a later run can complete them or refuse."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.files.atomic import write_files
from fastddpm.files.safejson import read_object
from fastddpm.tables.table import Table

NAME = "manifest.json"
FORMAT = "fastddpm-run-1"

# Seeds that form no ranges take up to 21 bytes each.
MAX_BYTES = 256 * 2**20


def config_hash(config: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a config of JSON types; the order of its keys does not matter."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, allow_nan=False).encode()).hexdigest()


def write_manifest(directory: Path, config: Mapping[str, Any]) -> None:
    """Write the manifest of a run atomically.

    Raises:
        OSError: the directory cannot be written to.
    """
    content = {"format": FORMAT, "config_hash": config_hash(config), "config": config}
    write_files({directory / NAME: (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()})


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Return the config of the run that a directory holds, or None where it has no manifest.

    Raises:
        ValueError: the manifest is damaged, or of another format.
    """
    path = directory / NAME
    if not path.exists():
        return None
    content = read_object(path, max_bytes=MAX_BYTES)
    config = content.get("config")
    if (
        content.get("format") != FORMAT
        or not isinstance(config, dict)
        or content.get("config_hash") != config_hash(config)
    ):
        raise ValueError(f"{path} is damaged or was written by another version; start again with --overwrite")
    return config


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Name each field in which two configs differ, with both values."""

    def value(config: Mapping[str, Any], key: str) -> str:
        return repr(config[key]) if key in config else "absent"

    return [
        f"{key} was {value(old, key)} and is {value(new, key)}"
        for key in sorted({*old, *new})
        if value(old, key) != value(new, key)
    ]


def model_digest(model: nn.Module) -> str:
    """Return the SHA-256 of a model's weights: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_raw_bytes(tensor))
    return digest.hexdigest()


def table_digest(table: Table) -> str:
    """Return the SHA-256 of a table: its rows, timesteps and flags."""
    flags = f"{table.name} {table.clip} {table.learned} {table.use_m} {table.use_prev} {table.timesteps.dtype}\n"
    return hashlib.sha256(flags.encode() + _raw_bytes(table.rows) + _raw_bytes(table.timesteps)).hexdigest()


def _raw_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def check_resumable(
    directory: Path, config: Mapping[str, Any], outputs: Iterable[Path], *, resume: bool, overwrite: bool, shared: bool
) -> None:
    """Refuse a run that would harm, or could not tell apart, what its directory holds already.

    Args:
        directory: where the run writes.
        config: what the run makes its files from.
        outputs: every file that the run may write.
        resume: complete an earlier run of the same config.
        overwrite: replace whatever is there.
        shared: other processes of the same run write to the directory too, and may have begun.

    Raises:
        FileExistsError: outputs exist, or another run's files, and neither resume nor overwrite was asked for.
        ValueError: resume was asked for and the directory holds a run of another config, or files without one.
    """
    if overwrite:
        return
    existing = [path for path in outputs if path.exists()]
    earlier = read_manifest(directory)
    if not resume:
        if earlier is not None and not (shared and earlier == config) and _holds_files(directory):
            existing.append(directory / NAME)
        if existing:
            raise FileExistsError(
                f"{existing[0]} exists already; use --resume to complete that run, --overwrite to replace it, or "
                "another --outdir"
            )
    elif earlier is None and existing:
        raise ValueError(f"{directory} has outputs but no {NAME}, so nothing says what made them; use --overwrite")
    elif earlier is not None and (changed := differences(earlier, config)):
        raise ValueError(f"cannot resume {directory}, the run differs: {'; '.join(changed)}")


def _holds_files(directory: Path) -> bool:
    """Tell whether anything but a manifest is there; a run that failed at once leaves nothing worth keeping."""
    return any(path.name != NAME and not path.name.startswith(".") for path in directory.iterdir())
