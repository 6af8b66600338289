"""Networks in a checkpoint of unknown make: every place that holds one, and which of them to take.

A network is known by two of its parameters' names, whatever stands before them: "module.", "_orig_mod.", a trainer's
"state_dict.model.", a list's "4.". Moving averages without names of their own (a list of tensors, as diffusers'
EMAModel keeps; names without dots, as latent-diffusion's LitEma does) are known by the network that they fit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastddpm.checks import shown
from fastddpm.files.tensors import TensorFile
from fastddpm.unet.load import Weights

Tensors = Mapping[str, Any]

# Of each kind two parameters that no other kind has together.
KINDS = {
    "UNet2DModel (diffusers)": ("time_embedding.linear_1.weight", "conv_in.weight"),
    "UNetModel (OpenAI)": ("time_embed.0.weight", "input_blocks.0.0.weight"),
    "Model (Ho et al.)": ("temb.dense.0.weight", "down.0.block.0.conv1.weight"),
    "Unet (denoising-diffusion-pytorch)": ("time_mlp.1.weight", "init_conv.weight"),
}
UNET2D, OPENAI, HO, LUCIDRAINS = KINDS
_AVERAGE = re.compile(r"(?<![a-z])(ema|avg|swa|polyak)(?![a-z])|ema_?model|averag|shadow")
_SHOWN, _MAX_NETWORKS = 8, 64


@dataclass(frozen=True)
class StoredNetwork:
    """A network in a checkpoint.

    Attributes:
        kind: a name of `KINDS`.
        prefix: what stands before its parameters' names, "" at the top; of averages kept as a list, the list's place.
        places: by its parameters' names, their places in the checkpoint, in order.
        average: whether it is a moving average of the weights.
    """

    kind: str
    prefix: str
    places: dict[str, str]
    average: bool
    n_parameters: int

    def __str__(self) -> str:
        average = ", a moving average" if self.average else ""
        return f"{shown(self.prefix)}: {self.kind}, {self.n_parameters / 1e6:.1f} M parameters{average}"


def find_networks(tensors: Tensors) -> list[StoredNetwork]:
    """List the networks in a checkpoint, in its order.

    Raises:
        ValueError: there are more than `_MAX_NETWORKS`.
    """
    found = [
        (kind, prefix)
        for kind, (anchor, other) in KINDS.items()
        for prefix in _prefixes(tensors, anchor)
        if prefix + other in tensors
    ]
    if len(found) > _MAX_NETWORKS:
        raise ValueError(f"{len(found)} networks; at most {_MAX_NETWORKS} are looked at")
    named = [
        _network(
            kind, prefix, {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}, tensors
        )
        for kind, prefix in found
    ]
    return [*named, *_unnamed(named, tensors), *_dotless(named, tensors)]


def choose_network(checkpoint: TensorFile, weights: Weights, prefix: str | None = None) -> StoredNetwork | None:
    """Choose one network of a checkpoint, or return None where it holds none that is known.

    Args:
        weights: "average" takes a moving average where there is one, "last" never.
        prefix: what stands before the names of the one to take; decides alone.

    Raises:
        ValueError: there is no such network, or more than one.
    """
    networks = find_networks(checkpoint.tensors)
    if prefix is not None:
        chosen = [network for network in networks if network.prefix.rstrip(".") == prefix.rstrip(".")]
    else:
        averages = [network for network in networks if network.average]
        chosen = averages if averages and weights == "average" else [n for n in networks if not n.average]
        chosen = _distinct(chosen, checkpoint.tensors)
    if len(chosen) == 1 or (not networks and prefix is None):
        return chosen[0] if chosen else None
    found = "; ".join(map(str, networks[:_SHOWN])) or "none that is known"
    wanted = f"with prefix {shown(prefix)}" if prefix is not None else f"to take as weights={weights!r}"
    raise ValueError(
        f"{checkpoint.path}: {len(chosen)} networks {wanted}; choose one by its prefix (--prefix). It holds {found}"
    )


def _network(kind: str, prefix: str, places: dict[str, str], tensors: Tensors) -> StoredNetwork:
    shapes = [getattr(tensors[place], "shape", (0,)) for place in places.values()]
    return StoredNetwork(kind, prefix, places, _is_average(prefix, kind, tensors), sum(map(math.prod, shapes)))


def _is_average(prefix: str, kind: str, tensors: Tensors) -> bool:
    parts = prefix.lower().split(".")
    # ema_pytorch keeps the network itself beside its average, as online_model.
    named = any(_AVERAGE.search(part) for part in parts) and not any("online" in part for part in parts)
    # torch's AveragedModel counts; Ho et al.'s PyTorch port saves [model, optimiser, epoch, step, average].
    counted = prefix.removesuffix("module.") + "n_averaged" in tensors
    return named or counted or (kind == HO and parts[0] == "4")


def _prefixes(tensors: Tensors, anchor: str) -> Iterator[str]:
    return (name.removesuffix(anchor) for name in tensors if name == anchor or name.endswith(f".{anchor}"))


def _unnamed(named: list[StoredNetwork], tensors: Tensors) -> Iterator[StoredNetwork]:
    """Yield the lists of tensors that have the shapes of a network's parameters, in their order."""
    lists: dict[str, list[str]] = {}
    for name in tensors:
        prefix, _, last = name.rpartition(".")
        if last == str(len(lists.setdefault(prefix, []))):
            lists[prefix].append(name)
    for prefix, names in lists.items():
        shapes = [getattr(tensors[name], "shape", None) for name in names]
        for network in named:
            if shapes == [getattr(tensors[place], "shape", None) for place in network.places.values()]:
                yield _network(network.kind, prefix, dict(zip(network.places, names, strict=True)), tensors)
                break


def _dotless(named: list[StoredNetwork], tensors: Tensors) -> Iterator[StoredNetwork]:
    """Yield the averages whose names are a network's without the dots."""
    for network in named:
        anchor = KINDS[network.kind][0].replace(".", "")
        for first in [name for name in tensors if name.endswith(anchor)]:
            prefix = first.removesuffix(anchor)
            if all(prefix + name.replace(".", "") in tensors for name in network.places):
                places = {name: prefix + name.replace(".", "") for name in network.places}
                yield _network(network.kind, prefix, places, tensors)


def _distinct(networks: list[StoredNetwork], tensors: Tensors) -> list[StoredNetwork]:
    """Drop networks whose tensors are those of an earlier one: the same bytes of the file under two names."""
    by_content = {tuple((name, tensors[place]) for name, place in n.places.items()): n for n in reversed(networks)}
    return [network for network in networks if network in by_content.values()]
