"""Models of other libraries in this library's format: a folder with configurations and safetensors.

diffusers      a DDPMPipeline or UNet2DModel folder, its weights in safetensors or .bin
OpenAI         a UNetModel (improved-diffusion, guided-diffusion, latent-diffusion), where `UNet` is the same network
Ho et al.      their network in the names of their TensorFlow code, as PyTorch ports of it keep them
lucidrains     a Trainer's or GaussianDiffusion's file around one of the above; the package's own Unet is another
               architecture

A file may keep a network anywhere, and several of them: see `fastddpm.integrations.networks`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastddpm.checks import shown
from fastddpm.files.checkpoints import Checkpoint
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
    "fastddpm.integrations.lucidrains.GaussianDiffusion around the original Unet and load the checkpoint as it is"
)


@dataclass(frozen=True)
class Converted:
    """What a checkpoint holds, in this library's terms.

    Attributes:
        kind: a name of `networks.KINDS`.
        model: the network, whose `diffusion` is None where the checkpoint does not say its schedule.
        taken: the network that was taken, None of a folder.
        others: the networks that were left.
    """

    kind: str
    model: UNet
    taken: StoredNetwork | None = None
    others: tuple[StoredNetwork, ...] = ()


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    layout: str = "flat",
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Converted:
    """Convert a model and write it; nothing is written unless all of it can be.

    Args:
        layout: "flat" or "pipeline", see `save_pretrained`.
        dtype: dtype to store; None means float32.
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
    converted = read(source, **options)
    save_pretrained(converted.model, folder, layout=layout, dtype=dtype)
    return converted


def read(
    source: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    weights: Weights = "average",
    prefix: str | None = None,
    prediction: str | None = None,
    flags: OpenAIFlags | None = None,
) -> Converted:
    """Read a model of another library.

    Args:
        source: a folder, or a .pt, .pth, .ckpt, .bin or .safetensors file; see this module.
        config: config.json of the UNet2DModel whose weights the file holds.
        weights: take a moving "average" of the weights where there is one, or the "last" weights.
        prefix: what stands before the names of the network to take, where a file holds several.
        prediction: "epsilon", "x_0" or "v", for files with a schedule that does not say.
        flags: what OpenAI's and Ho et al.'s scripts do not store.

    Raises:
        FileNotFoundError, ValueError: see `convert`.
    """
    path, flags = Path(source), flags or OpenAIFlags()
    if path.is_dir():
        return Converted(networks.UNET2D, _read_folder(path, weights))
    file = SafetensorsFile(path) if path.suffix == ".safetensors" else Checkpoint(path)
    network = networks.choose_network(file, weights, prefix)
    if network is None:
        raise ValueError(
            f"{path}: no network of a known kind ({', '.join(networks.KINDS)}) among its {len(file.tensors)} tensors "
            f"{', '.join(map(shown, list(file.tensors)[:4]))}"
        )
    if network.kind == networks.LUCIDRAINS:
        raise ValueError(f"{path}: {_LUCIDRAINS_OBSTACLE}")
    others = tuple(other for other in networks.find_networks(file.tensors) if other != network)
    try:
        diffusion = _stored_diffusion(file, network, prediction)
        if network.kind in (networks.OPENAI, networks.HO):
            diffusion = diffusion or _flagged_diffusion(file, network, flags)
        model = _build(file, network, config, flags)
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    model.diffusion = diffusion
    return Converted(network.kind, model, network, others)


def _build(file: TensorFile, network: StoredNetwork, config: str | os.PathLike[str] | None, flags: OpenAIFlags) -> UNet:
    if network.kind == networks.UNET2D:
        if config is None:
            raise ValueError("weights of a UNet2DModel; give its config.json too (config, --config)")
        return build_unet(read_config(Path(config))[0], file, network.places)
    read = file.read(network.places.values())
    tensors = {name: read[place] for name, place in network.places.items()}
    if network.kind == networks.HO:
        return ho_weights.convert_unet(tensors, file.path)
    return convert_unet(tensors, flags, file.path)


def _stored_diffusion(file: TensorFile, network: StoredNetwork, prediction: str | None) -> DiffusionConfig | None:
    """Read the diffusion that a network is part of."""
    prefixes = [prefix for prefix in diffusion_places(file) if network.prefix.startswith(prefix)]
    if not prefixes:
        return None
    # latent-diffusion's buffers are of this form too, and its networks predict epsilon.
    default = "epsilon" if network.kind == networks.OPENAI else None
    return read_diffusion(file, max(prefixes, key=len), prediction, default)


def _flagged_diffusion(file: TensorFile, network: StoredNetwork, flags: OpenAIFlags) -> DiffusionConfig:
    ends = ("conv_out.weight", "conv_in.weight")
    if network.kind == networks.OPENAI:
        ends = ("out.2.weight", "input_blocks.0.0.weight")
    last, first = (tuple(getattr(file.tensors.get(network.places.get(name, "")), "shape", ())) for name in ends)
    if len(last) != 4 or len(first) != 4:
        raise ValueError(f"{network}: no {' or no '.join(ends)} of four dimensions")
    return diffusion_of(flags, learned=last[0] == 2 * first[1])


def _read_folder(folder: Path, weights: Weights) -> UNet:
    """Load a diffusers folder as `load` does, and from .bin where it has no safetensors."""
    unet_folder = network_folder(folder, weights)
    paths = weight_files(unet_folder, ".safetensors") or weight_files(unet_folder, ".bin")
    return load_folder(folder, unet_folder, paths)
