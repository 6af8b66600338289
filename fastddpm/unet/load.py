"""Networks from folders in the layouts of `fastddpm.unet.save`, or by the name of one that is shipped. Never pickle."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from fastddpm.checks import one_of, printable, shown
from fastddpm.files.checkpoints import Checkpoint
from fastddpm.files.safejson import read_object
from fastddpm.files.tensors import SafetensorsFile, Shards, TensorFile, read_tensors, refuse_escape
from fastddpm.schedules.diffusion import DiffusionConfig
from fastddpm.unet.config import UNetConfig
from fastddpm.unet.hub import is_hub_id, snapshot
from fastddpm.unet.save import CONFIG, EXTRA_KEYS, MODEL_CLASS, SCHEDULER, WEIGHTS
from fastddpm.unet.unet import UNet

SHIPPED = Path(__file__).parent.parent / "models"

Weights = Literal["average", "last"]
WEIGHTS_TO_TAKE: tuple[Weights, ...] = ("average", "last")
_PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")
# Attention layers had other names before diffusers 0.16; google/ddpm-cifar10-32 is still stored so.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# diffusers has put a variant's name before a shard's number, and behind it.
_WEIGHTS_NAME = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model)(\.(?P<variant>\w+))?"
    r"(-(?P<shard>\d{5})-of-(?P<shards>\d{5}))?(\.(?P<late_variant>\w+))?(?P<suffix>\.safetensors|\.bin)"
)
_OLD_NAME = re.compile(rf"(\.attentions\.\d+\.)({'|'.join(_OLD_ATTENTION)})(?=\.)")


def load(name_or_dir: str | os.PathLike[str], *, weights: Weights = "average", revision: str | None = None) -> UNet:
    """Load a network from a folder, one that ships with the package by its name, or one of the Hugging Face Hub.

    Args:
        name_or_dir: name of a shipped model ("digits"), a folder in either layout, its weights in one file or in
            shards, or the id of a model of the Hub ("google/ddpm-cifar10-32", also with "@revision"), which
            huggingface_hub downloads unless its cache has it. Only configurations and safetensors are read; nothing is
            executed.
        weights: of a training folder with unet/ and unet_ema/, take the moving "average" or the "last" weights.
        revision: branch, tag or commit of a model of the Hub.

    Returns:
        The network in eval mode, float32 on the CPU whatever the stored dtype, its `diffusion` set from
        scheduler_config.json (None, with a warning, where the folder has none).

    Raises:
        FileNotFoundError: no such model or file; the message lists the shipped models.
        ImportError: a model of the Hub, and huggingface_hub is not installed.
        ValueError: a file is damaged, hostile, of another architecture or of a feature that is not supported; the
            message names file and key. A pickle (.pt, .ckpt, .bin, ...) is refused.
    """
    folder = _find(name_or_dir, revision)
    unet_folder = network_folder(folder, weights)
    return load_folder(folder, unet_folder, weight_files(unet_folder, ".safetensors"))


def load_folder(folder: Path, unet_folder: Path, paths: Sequence[Path]) -> UNet:
    """Load the network in a folder of a model from the files that hold its weights, safetensors or torch's.

    Raises:
        FileNotFoundError, ValueError: see `load`.
    """
    config, digest = read_config(unet_folder / CONFIG, folder)
    if not paths:
        pickles = [path for path in sorted(unet_folder.iterdir()) if path.suffix.lower() in _PICKLES]
        if pickles:
            raise ValueError(_no_pickle(pickles[0]))
        raise FileNotFoundError(f"{unet_folder}: no {WEIGHTS} beside {CONFIG}")
    files: list[TensorFile] = []
    for path in paths:
        refuse_escape(path, folder)
        safe, whole = path.suffix == ".safetensors", digest if len(paths) == 1 else None
        files.append(SafetensorsFile(path, whole) if safe else Checkpoint(path))
    file = files[0] if len(files) == 1 else Shards(unet_folder, files)
    model = build_unet(config, file, {name: name for name in file.tensors})
    model.diffusion = _read_diffusion(folder)
    model.folder = folder
    return model


def build_unet(config: UNetConfig, file: TensorFile, places: Mapping[str, str]) -> UNet:
    """Build a network from the tensors of a file, in eval mode.

    Args:
        config: its architecture.
        file: what holds its weights.
        places: the file's names of its parameters, by UNet2DModel's names of today or before diffusers 0.16.

    Raises:
        ValueError: the tensors are not those of this architecture, or cannot be read.
    """
    modern = {_OLD_NAME.sub(lambda m: m[1] + _OLD_ATTENTION[m[2]], name): place for name, place in places.items()}
    if len(modern) < len(places):
        raise ValueError(f"{file.path}: two tensors stand for the same parameter under an old and a new name")
    # On the meta device, so that no memory is taken for a configuration before its weights are seen to be there.
    with torch.device("meta"):
        model = UNet(config, zero_init=False)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.load_state_dict(read_tensors(file, expected, modern), assign=True)
    return model.eval()


def network_folder(folder: Path, weights: Weights) -> Path:
    """Return where in a folder the network lies: in it, or in unet_ema/ or unet/.

    Raises:
        ValueError: `weights` is unknown.
    """
    one_of("weights", weights, WEIGHTS_TO_TAKE)
    if (folder / CONFIG).exists():
        return folder
    last, average = folder / "unet", folder / "unet_ema"
    if weights == "last" or not average.is_dir():
        return last if last.is_dir() else folder
    if last.is_dir():
        warnings.warn(
            f"{folder}: took the moving average in {average.name}/; weights='last' (--weights last) takes {last.name}/",
            stacklevel=3,
        )
    return average


def weight_files(folder: Path, suffix: str) -> list[Path]:
    """Return the files with a network's weights: one, or all shards; none where there are none.

    Without weights in full precision those of the one variant (fp16, ...) are taken.

    Raises:
        ValueError: a shard is missing, or there are several variants and nothing else.
    """
    found: dict[tuple[str, str], dict[int, Path]] = {}
    counts = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if (match := _WEIGHTS_NAME.fullmatch(path.name)) and match["suffix"] == suffix:
            key = (match["variant"] or match["late_variant"] or "", match["stem"])
            found.setdefault(key, {})[int(match["shard"] or 1)] = path
            counts[key] = int(match["shards"] or 1)
    variants = {variant for variant, _ in found}
    if len(variants) > 1 and "" not in variants:
        raise ValueError(
            f"{folder}: weights in the variants {', '.join(map(shown, sorted(variants)))}; keep one of them"
        )
    if not found:
        return []
    # In full precision before a variant, under diffusers' name before the old one.
    key = min(found)
    if sorted(found[key]) != list(range(1, counts[key] + 1)):
        raise ValueError(f"{folder}: shards {sorted(found[key])} of {counts[key]}; the others are missing")
    return [found[key][i] for i in sorted(found[key])]


def _find(name_or_dir: str | os.PathLike[str], revision: str | None) -> Path:
    name = os.fspath(name_or_dir)
    path = Path(name)
    if not path.exists() and is_hub_id(name):
        return snapshot(name, revision)
    if revision is not None:
        raise ValueError(f"revision={revision!r} is for models of the Hugging Face Hub, and {name!r} is none")
    if path.suffix.lower() in _PICKLES and not path.is_dir():
        raise ValueError(_no_pickle(path))
    shipped = sorted(entry.parent.name for entry in SHIPPED.glob(f"*/{CONFIG}"))
    if name in shipped:
        return SHIPPED / name
    if not path.exists():
        listed = ", ".join(shipped) or "none in this installation"
        raise FileNotFoundError(f"no folder {name!r} and no shipped model of that name; shipped models: {listed}")
    if not path.is_dir():
        raise ValueError(f"{path}: not a folder; pass the folder that holds {CONFIG} and the weights")
    return path


def _no_pickle(path: Path) -> str:
    return (
        f"{path}: refused: it may hold pickled objects, which can run code when loaded; "
        f"make safetensors of it with: fastddpm convert {path} OUTPUT_FOLDER"
    )


def read_config(path: Path, folder: Path | None = None) -> tuple[UNetConfig, str | None]:
    """Read a network's configuration, and the SHA-256 of its weights where it has one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, a link out of `folder`, or describes a network that this library does not have.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path.parent}: no {CONFIG} and no unet/{CONFIG}: not a model folder")
    if folder is not None:
        refuse_escape(path, folder)
    raw = read_object(path)
    with _naming(path):
        kind = raw.get("_class_name", MODEL_CLASS)
        if kind != MODEL_CLASS:
            raise ValueError(f"_class_name={shown(kind)} is not supported; only {MODEL_CLASS} is")
        extras = {f"_{key}": key for key in EXTRA_KEYS}
        values = {extras.get(key, key): value for key, value in raw.items()}
        digest = values.pop("weights_sha256", None)
        if digest is not None and not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)):
            raise ValueError(f"weights_sha256 must be 64 lower-case hexadecimal digits, got {shown(digest)}")
        return UNetConfig.from_dict(values), digest


def _read_diffusion(folder: Path) -> DiffusionConfig | None:
    for path in (folder / SCHEDULER, folder / "scheduler" / SCHEDULER):
        if path.exists():
            refuse_escape(path, folder)
            # diffusers' solvers write -Infinity.
            raw = read_object(path, infinities=True)
            with _naming(path):
                return DiffusionConfig.from_scheduler_config(raw)
    warnings.warn(
        f"{folder} has no {SCHEDULER}: what the network was trained for is unknown, and sampling assumes Ho et al.'s "
        "linear schedule and epsilon prediction; set model.diffusion if that is wrong",
        stacklevel=3,
    )
    return None


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(printable(f"{path}: {error}", 400 + len(str(path)))) from error
