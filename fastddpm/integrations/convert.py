"""Models of other libraries in this library's format: a folder with configurations and safetensors.

diffusers      a DDPMPipeline or UNet2DModel folder, its weights in safetensors or .bin
OpenAI         a UNetModel (improved-diffusion, guided-diffusion, latent-diffusion), where `UNet` is the same network
Ho et al.      their network in the names of their TensorFlow code, as PyTorch ports of it keep them
lucidrains     a Trainer's or GaussianDiffusion's file: the schedule only, unless the network in it is one of the
               above; denoising-diffusion-pytorch's own Unet is another architecture

A file may keep a network anywhere, and several of them: see `fastddpm.integrations.networks`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastddpm.checks import shown
from fastddpm.files.atomic import write_files
from fastddpm.files.checkpoints import Checkpoint
from fastddpm.files.safejson import to_json
from fastddpm.files.tensors import SafetensorsFile, TensorFile
from fastddpm.integrations import ho_weights, networks
from fastddpm.integrations.lucidrains.buffers import diffusion_places, read_diffusion
from fastddpm.integrations.networks import StoredNetwork
from fastddpm.integrations.openai.unet_weights import OpenAIFlags, convert_unet, diffusion_of
from fastddpm.schedules.diffusion import DiffusionConfig
from fastddpm.unet.load import Weights, build_unet, load_folder, network_folder, read_config, weight_files
from fastddpm.unet.save import CONFIG, INDEX, SCHEDULER, save_pretrained
from fastddpm.unet.unet import UNet

_LUCIDRAINS_OBSTACLE = (
    "denoising-diffusion-pytorch's Unet (RMSNorm, linear attention, a 7x7 first convolution) is another architecture "
    "than this library's UNet, so its weights cannot be converted; build "
    "fastddpm.integrations.lucidrains.GaussianDiffusion around the original Unet and load the checkpoint as it is, or "
    "convert its schedule alone (schedule_only, --schedule-only)"
)


@dataclass(frozen=True)
class Converted:
    """What a checkpoint holds, in this library's terms.

    Attributes:
        kind: a name of `networks.KINDS`, or "GaussianDiffusion" where only its buffers are known.
        diffusion: schedule and prediction, None where the checkpoint does not say.
        model: the network; None where the library has no such architecture.
        obstacle: why there is no network.
        taken: the network that was taken, None of a folder.
        others: the networks that were left.
    """

    kind: str
    diffusion: DiffusionConfig | None
    model: UNet | None = None
    obstacle: str = ""
    taken: StoredNetwork | None = None
    others: tuple[StoredNetwork, ...] = ()


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
        layout: "flat" or "pipeline", see `save_pretrained`.
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
    weights: Weights = "average",
    prefix: str | None = None,
    prediction: str | None = None,
    schedule_only: bool = False,
    flags: OpenAIFlags | None = None,
) -> Converted:
    """Read a model of another library.

    Args:
        source: a folder, or a .pt, .pth, .ckpt, .bin or .safetensors file; see this module.
        config: config.json of the UNet2DModel whose weights the file holds.
        weights: take a moving "average" of the weights where there is one, or the "last" weights.
        prefix: what stands before the names of the network to take, where a file holds several.
        prediction: "epsilon", "x_0" or "v", for files with a schedule that does not say.
        schedule_only: do not look at the network's architecture.
        flags: what OpenAI's and Ho et al.'s scripts do not store.

    Raises:
        FileNotFoundError, ValueError: see `convert`.
    """
    path, flags = Path(source), flags or OpenAIFlags()
    if path.is_dir():
        model = _read_folder(path, weights)
        return Converted(networks.UNET2D, model.diffusion, model)
    file = SafetensorsFile(path) if path.suffix == ".safetensors" else Checkpoint(path)
    network = networks.choose_network(file, weights, prefix)
    diffusion = _stored_diffusion(file, network, prediction)
    if network is None:
        if diffusion is None:
            raise ValueError(
                f"{path}: no network of a known kind ({', '.join(networks.KINDS)}) among its {len(file.tensors)} "
                f"tensors {', '.join(map(shown, list(file.tensors)[:4]))}"
            )
        return Converted("GaussianDiffusion", diffusion, obstacle="its network is of an unknown architecture")
    others = tuple(other for other in networks.find_networks(file.tensors) if other != network)
    built: UNet | None = None
    obstacle = _LUCIDRAINS_OBSTACLE
    try:
        if network.kind in (networks.OPENAI, networks.HO):
            diffusion = diffusion or _flagged_diffusion(file, network, flags)
        if not schedule_only and network.kind != networks.LUCIDRAINS:
            built, obstacle = _build(file, network, config, flags), ""
            built.diffusion = diffusion
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    return Converted(network.kind, diffusion, built, obstacle, network, others)


def _build(file: TensorFile, network: StoredNetwork, config: str | os.PathLike[str] | None, flags: OpenAIFlags) -> UNet:
    if network.kind == networks.UNET2D:
        if config is None:
            raise ValueError("weights of a UNet2DModel; give its config.json too (config, --config)")
        return build_unet(read_config(Path(config))[0], file, network.places)
    read = file.read(network.places.values())
    tensors = {name: read[place] for name, place in network.places.items()}
    if network.kind == networks.OPENAI:
        return convert_unet(tensors, flags, file.path)
    return ho_weights.convert_unet(tensors, file.path)


def _stored_diffusion(
    file: TensorFile, network: StoredNetwork | None, prediction: str | None
) -> DiffusionConfig | None:
    """Read the diffusion that a network is part of; of a file without a known network, the only one."""
    prefixes = diffusion_places(file)
    if network is not None:
        prefixes = [prefix for prefix in prefixes if network.prefix.startswith(prefix)]
    if not prefixes:
        return None
    # latent-diffusion's buffers are of this form too, and its networks predict epsilon.
    default = "epsilon" if network is not None and network.kind == networks.OPENAI else None
    return read_diffusion(file, max(prefixes, key=len), prediction, default)


def _flagged_diffusion(file: TensorFile, network: StoredNetwork, flags: OpenAIFlags) -> DiffusionConfig:
    ends = (
        ("out.2.weight", "input_blocks.0.0.weight")
        if network.kind == networks.OPENAI
        else ("conv_out.weight", "conv_in.weight")
    )
    last, first = (tuple(getattr(file.tensors.get(network.places.get(name, "")), "shape", ())) for name in ends)
    if len(last) != 4 or len(first) != 4:
        raise ValueError(f"{network}: no {' or no '.join(ends)} of four dimensions")
    return diffusion_of(flags, learned=last[0] == 2 * first[1])


def _read_folder(folder: Path, weights: Weights) -> UNet:
    """Load a diffusers folder as `load` does, and from .bin where it has no safetensors."""
    unet_folder = network_folder(folder, weights)
    paths = weight_files(unet_folder, ".safetensors") or weight_files(unet_folder, ".bin")
    return load_folder(folder, unet_folder, paths)
