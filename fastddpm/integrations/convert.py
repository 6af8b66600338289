"""Models of other libraries in this library's format: a folder with configurations and safetensors.

diffusers      a DDPMPipeline or UNet2DModel folder, its weights in safetensors or .bin
OpenAI         a UNetModel's .pt (improved-diffusion, guided-diffusion), where `UNet` is the same network
lucidrains     a Trainer's or GaussianDiffusion's .pt: the schedule only, unless the network in it is a UNet2DModel;
               denoising-diffusion-pytorch's own Unet is another architecture
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastddpm.files.atomic import write_files
from fastddpm.files.pickles import read_checkpoint
from fastddpm.files.safejson import read_object, to_json
from fastddpm.files.tensors import refuse_escape
from fastddpm.integrations.lucidrains.tables import BUFFERS, OBJECTIVES, SCHEDULES
from fastddpm.integrations.openai.unet_weights import OpenAIFlags, convert_unet, diffusion_of, is_openai
from fastddpm.schedules.diffusion import DiffusionConfig
from fastddpm.unet.load import load
from fastddpm.unet.save import CONFIG, INDEX, OLD_WEIGHTS, SCHEDULER, WEIGHTS, save_pretrained
from fastddpm.unet.unet import UNet

_SAFETENSORS = (WEIGHTS, OLD_WEIGHTS)
_DIFFUSERS_PICKLE = "diffusion_pytorch_model.bin"
_PREDICTION = {"pred_noise": "epsilon", "pred_x0": "x_0", "pred_v": "v"}


@dataclass(frozen=True)
class Converted:
    """What a checkpoint holds, in this library's terms.

    Attributes:
        kind: "diffusers", "openai" or "lucidrains".
        diffusion: schedule and prediction, None where the checkpoint does not say.
        model: the network; None where the library has no such architecture.
        obstacle: why there is no network.
    """

    kind: str
    diffusion: DiffusionConfig | None
    model: UNet | None = None
    obstacle: str = ""


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    layout: str = "flat",
    dtype: torch.dtype | None = None,
    schedule_only: bool = False,
    **options: Any,
) -> Converted:
    """Convert a model and write it; nothing is written unless all of it can be.

    Args:
        source: a folder or checkpoint, see this module.
        destination: a folder that holds no model yet.
        layout: "flat" or "pipeline", see `weights.save_pretrained`.
        dtype: dtype to store; None means float32.
        schedule_only: write scheduler_config.json alone, for networks that this library does not have.
        options: those of `read`.

    Raises:
        FileNotFoundError: there is no such source.
        FileExistsError: the destination holds a model already.
        ValueError: the source is damaged, holds more than tensors, or cannot be converted exactly; the message says
            what stands in the way and what to use instead.
    """
    folder = Path(destination)
    for name in (CONFIG, SCHEDULER, INDEX, "unet"):
        if (folder / name).exists():
            raise FileExistsError(f"{folder} holds a model already ({name}); choose another folder")
    converted = read(source, schedule_only=schedule_only, **options)
    if schedule_only:
        if converted.diffusion is None:
            raise ValueError(f"{os.fspath(source)} does not say what schedule it was trained with")
        write_files({folder / SCHEDULER: to_json(converted.diffusion.to_scheduler_config())})
    elif converted.model is None:
        raise ValueError(f"{os.fspath(source)}: {converted.obstacle}")
    else:
        save_pretrained(converted.model, folder, layout=layout, dtype=dtype)
    return converted


def read(
    source: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    average: bool = True,
    schedule_only: bool = False,
    flags: OpenAIFlags | None = None,
) -> Converted:
    """Read a model of another library.

    Args:
        source: a folder or checkpoint, see this module.
        config: config.json of the UNet2DModel whose weights the checkpoint holds.
        average: of a lucidrains Trainer's checkpoint, take the moving average of the weights rather than the last ones.
        schedule_only: do not look at the network.
        flags: what OpenAI's scripts do not store.

    Raises:
        FileNotFoundError, ValueError: see `convert`.
    """
    path = Path(source)
    if path.is_dir():
        model = _read_folder(path)
        return Converted("diffusers", model.diffusion, model)
    weights = _network_weights(read_checkpoint(path), path, average)
    diffusion = _lucidrains_diffusion(weights, path) if weights.keys() >= set(BUFFERS) else None
    if is_openai(weights):
        return _read_openai(weights, flags or OpenAIFlags(), path, schedule_only)
    prefix = next((name.removesuffix("conv_in.weight") for name in weights if name.endswith("conv_in.weight")), None)
    if prefix is not None and not schedule_only:
        return _read_unet2d(weights, prefix, config, diffusion, path)
    if diffusion is not None:
        return Converted("lucidrains", diffusion, obstacle=_LUCIDRAINS_OBSTACLE)
    raise ValueError(
        f"{path}: no known checkpoint; its first names are {', '.join(list(weights)[:4]) or 'none'}, and those of a "
        "UNetModel (OpenAI), a GaussianDiffusion (denoising-diffusion-pytorch) or a UNet2DModel (diffusers) are known"
    )


_LUCIDRAINS_OBSTACLE = (
    "denoising-diffusion-pytorch's Unet (RMSNorm, linear attention, a 7x7 first convolution) is another architecture "
    "than this library's UNet, so its weights cannot be converted; build "
    "fastddpm.integrations.lucidrains.GaussianDiffusion around the original Unet and load the checkpoint as it is, or "
    "convert its schedule alone (schedule_only, --schedule-only)"
)


def _read_openai(weights: Mapping[str, Tensor], flags: OpenAIFlags, path: Path, schedule_only: bool) -> Converted:
    try:
        if schedule_only:
            out_channels, in_channels = len(weights["out.2.weight"]), weights["input_blocks.0.0.weight"].shape[1]
            return Converted("openai", diffusion_of(flags, learned=out_channels == 2 * in_channels))
        model = convert_unet(weights, flags)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: {error}") from error
    return Converted("openai", model.diffusion, model)


def _network_weights(checkpoint: Mapping[str, Any], path: Path, average: bool) -> dict[str, Tensor]:
    """Find the network's tensors: at the top, or where a trainer keeps them."""
    found: Any = checkpoint
    if average and isinstance(checkpoint.get("ema"), Mapping):
        found = {
            name.removeprefix("ema_model."): value
            for name, value in checkpoint["ema"].items()
            if name.startswith("ema_model.")
        }
    elif isinstance(checkpoint.get("model"), Mapping):
        found = checkpoint["model"]
    elif isinstance(checkpoint.get("state_dict"), Mapping):
        found = checkpoint["state_dict"]
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors or len(tensors) < len(found):
        raise ValueError(f"{path}: holds no network (the state of an optimiser?); its entries: {_entries(checkpoint)}")
    return tensors


def _entries(checkpoint: Mapping[str, Any]) -> str:
    return ", ".join(str(name)[:40] for name in list(checkpoint)[:6]) or "none"


def _read_folder(folder: Path) -> UNet:
    """Load a diffusers folder; weights in a .bin are read as tensors, and from there on checked the usual way."""
    unet_folder = folder / "unet" if (folder / "unet").is_dir() else folder
    pickled = unet_folder / _DIFFUSERS_PICKLE
    if not pickled.exists() or any((unet_folder / name).exists() for name in _SAFETENSORS):
        return load(folder)
    config = unet_folder / CONFIG
    schedulers = (folder / SCHEDULER, folder / "scheduler" / SCHEDULER)
    scheduler = next((path for path in schedulers if path.exists()), None)
    for path in (pickled, config, scheduler):
        if path is not None:
            refuse_escape(path, folder)
    tensors = _network_weights(read_checkpoint(pickled), pickled, average=False)
    return _assemble(tensors, config, None if scheduler is None else read_object(scheduler), pickled)


def _read_unet2d(
    weights: Mapping[str, Tensor],
    prefix: str,
    config: str | os.PathLike[str] | None,
    diffusion: DiffusionConfig | None,
    path: Path,
) -> Converted:
    if config is None:
        raise ValueError(f"{path}: weights of a UNet2DModel; give its config.json too (config, --config)")
    tensors = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    scheduler = None if diffusion is None else diffusion.to_scheduler_config()
    model = _assemble(tensors, Path(config), scheduler, path)
    return Converted("diffusers" if diffusion is None else "lucidrains", model.diffusion, model)


def _assemble(tensors: Mapping[str, Tensor], config: Path, scheduler: Mapping[str, Any] | None, source: Path) -> UNet:
    """Load tensors and configurations as if they lay in one folder, so that `weights.load` makes all its checks."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {CONFIG: read_object(config)}
        if scheduler is not None:
            files[SCHEDULER] = dict(scheduler)
        write_files({folder / file: to_json(value) for file, value in files.items()})
        stored = folder / WEIGHTS
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, stored)
        try:
            return load(folder)
        except ValueError as error:
            message = str(error).replace(str(stored), str(source)).replace(str(folder / CONFIG), str(config))
            raise ValueError(message) from None


def _lucidrains_diffusion(weights: Mapping[str, Tensor], path: Path) -> DiffusionConfig:
    """Recognise the schedule by its betas, and the objective by the weights of its loss."""
    betas = weights["betas"]
    T = len(betas)
    options: dict[str, Any] = {"trained_betas": tuple(betas.double().tolist())}
    for name, build in SCHEDULES.items():
        if name == "linear" and T <= 20:
            continue
        exact = build(T)
        if torch.equal(exact.float(), betas):
            # Their sigmoid has float32 ends, which no named schedule has.
            options = {"trained_betas": tuple(exact.tolist())}
            if name == "cosine" or (name == "linear" and T == 1000):
                options = {"beta_schedule": name}
    objectives = [name for name in OBJECTIVES if _explains_loss_weight(name, weights)]
    if len(objectives) != 1:
        raise ValueError(
            f"{path}: loss_weight fits {len(objectives)} objectives, so what the network predicts is unknown"
        )
    return DiffusionConfig(num_timesteps=T, prediction_type=_PREDICTION[objectives[0]], **options)


def _explains_loss_weight(objective: str, weights: Mapping[str, Tensor]) -> bool:
    """Whether loss_weight is that of the objective, for some cap on the signal-to-noise ratio (none included)."""
    snr = weights["alphas_cumprod"].double() / weights["sqrt_one_minus_alphas_cumprod"].double() ** 2
    factor = {"pred_noise": snr, "pred_x0": torch.ones_like(snr), "pred_v": snr + 1.0}[objective]
    capped = weights["loss_weight"].double() * factor
    return torch.allclose(capped, snr.clamp(max=float(capped.max())), rtol=1e-3, atol=0.0)
