"""The folder of a training run: what is in it, whether it may be written to, and the model saved at its end."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastddpm.data.datasets import Dataset
from fastddpm.data.load import load_data
from fastddpm.files.run_folder import RunFolder, differences
from fastddpm.files.safejson import read_object
from fastddpm.machine.devices import plain_torch
from fastddpm.machine.packages import weights_digest
from fastddpm.machine.ranks import ALONE, Ranks
from fastddpm.noise.v1 import NOISE_VERSION
from fastddpm.schedules.diffusion import DiffusionConfig
from fastddpm.training.checkpoint import CHECKPOINT, read_state
from fastddpm.training.config import TrainConfig
from fastddpm.training.ema import EMA
from fastddpm.training.shards import gathered
from fastddpm.unet.load import load
from fastddpm.unet.save import CONFIG, OLD_WEIGHTS, SCHEDULER, WEIGHTS, save_pretrained
from fastddpm.unet.unet import UNet, UNetConfig

SETTINGS, LOG, PLOT, SAMPLES = "train.json", "log.jsonl", "loss.png", "samples-*.png"
RAW = "raw"
FORMAT = "fastddpm-training-1"

_MODEL = (CONFIG, SCHEDULER, WEIGHTS, OLD_WEIGHTS)
# All that a run writes: whatever else the user keeps in its folder stays.
WRITTEN = (LOG, PLOT, SAMPLES, "events.out.tfevents.*", CHECKPOINT, *_MODEL, *(f"{RAW}/{name}" for name in _MODEL))


@dataclass(frozen=True)
class TrainingRun:
    """A folder that is ready for training, its data, and the network to train."""

    config: TrainConfig
    out: Path
    data: Dataset
    unet: UNetConfig
    trained: UNet | None

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is something to continue from."""
        return (self.out / CHECKPOINT).exists()

    def start(self) -> dict[str, Any]:
        """What the first step starts from."""
        return {
            "init": self.trained and weights_digest(self.trained),
            "checkpoint": self.has_checkpoint and read_state(self.out),
        }

    def last_checkpoint(self) -> str:
        """Name the last good checkpoint, for messages."""
        if not self.has_checkpoint:
            return "no checkpoint was written yet"
        return f"the last good checkpoint is {self.out / CHECKPOINT} at step {read_state(self.out)['step']}"

    def build_model(self) -> UNet:
        """Build the network, with fresh weights or those of `trained`."""
        with plain_torch():
            model = UNet(dataclasses.replace(self.unet, dropout=self.config.dropout))
        model.diffusion = _shared_diffusion(self.config, self.trained)
        if self.trained is not None:
            model.load_state_dict(self.trained.state_dict())
        return model


def _check_suits(unet: UNetConfig, config: TrainConfig, data: Dataset, world: int) -> None:
    """Refuse too few images for a batch, and a network of other channels or without an embedding for each class."""
    if config.batch < world:
        raise ValueError(f"a batch of {config.batch} is less than one image for each of {world} processes")
    if config.batch > len(data):
        raise ValueError(f"a batch of {config.batch} is more than the {len(data)} images; use a smaller --batch")
    C, beside, classes = data.shape[0], data.beside, len(data.classes)
    name = config.init or config.model
    if (unet.in_channels, unet.out_channels) != (C + beside, C * (1 + config.learns_variance)):
        raise ValueError(
            f"{name}: {unet.in_channels} channels in and {unet.out_channels} out; {data.name} has {C}"
            + (f", and a condition of {beside} beside them" if beside else "")
            + (f", and a {config.variance} variance needs as many again" if config.learns_variance else "")
        )
    rows, null = unet.num_class_embeds or 0, unet.null_class
    free = rows if null is None else null
    if (classes == 0) != (rows == 0) or free < classes:
        raise ValueError(f"{name}: {free} classes; {data.name} has {classes}")
    if classes and config.class_dropout and null is None:
        raise ValueError(f"{name}: no null_class, which class dropout needs; give --class-dropout 0")


def _shared_diffusion(config: TrainConfig, model: UNet | None) -> DiffusionConfig:
    """Return the diffusion of the model to start from, after checking that the run's has the same schedule and target.

    What only sampling knows, the variance and the clip range, may differ.
    """
    ours, trained = config.diffusion(), None if model is None else model.diffusion
    if trained is None:
        return ours
    sampling = {"variance_type": trained.variance_type, "clip_range": trained.clip_range}
    if changed := differences(trained.to_dict(), {**ours.to_dict(), **sampling}):
        raise ValueError(
            f"cannot start from {config.init}, its diffusion differs: {'; '.join(changed)}; "
            "give its --schedule, --timesteps and --prediction"
        )
    return trained


@contextlib.contextmanager
def open_run(config: TrainConfig, ranks: Ranks = ALONE) -> Iterator[TrainingRun]:
    """Load the data and prepare ``config.out``, which is ours until the context ends.

    What can be refused without the data is refused before they are loaded, and the rest before the folder is touched.
    Only rank 0 writes there; the others follow when it is ready.

    Raises:
        FileExistsError: the folder holds a run, and neither resume nor overwrite was asked for.
        NotADirectoryError: ``out`` is a file.
        BlockingIOError: another process trains there.
        ValueError: resume was asked for and the folder holds a run of other settings, or files that nothing says what
            made; overwrite would remove the model to start from; the network does not suit the images; or this rank's
            data, settings or folder are not those of rank 0.
    """
    for name, path in (("init", config.init), ("model", config.model)):
        if config.overwrite and path is not None and Path(path).resolve().is_relative_to(Path(config.out).resolve()):
            raise ValueError(f"--overwrite would remove --{name} {path}; give another --outdir")
    config.resolved_device()
    trained = None if config.init is None else load(config.init)
    _shared_diffusion(config, trained)
    unet = None if trained is None else trained.config
    if config.model is not None:
        unet = UNetConfig.from_dict(read_object(config.model))
    folder = run_folder(Path(config.out))
    resume, overwrite = config.resume, config.overwrite
    with folder.locked() if ranks.rank == 0 else contextlib.nullcontext():
        if ranks.rank == 0:
            folder.refuse_unless_free(resume=resume, overwrite=overwrite)
        data = load_data(config.data, **config.data_options())
        unet = unet or default_unet(data.shape, len(data.classes), config, data.beside)
        _check_suits(unet, config, data, ranks.world)
        identity = {**config.identity(), "data_sha256": data.fingerprint(), "noise": NOISE_VERSION}
        run = TrainingRun(config, folder.path, data, unet, trained)
        if ranks.rank == 0:
            defaults, settings = TrainConfig.defaults(), dataclasses.asdict(config)
            folder.begin(identity, resume=resume, overwrite=overwrite, defaults=defaults, settings=settings)
        ranks.agree("run", lambda: {**identity, **run.start()})
        yield run


def run_folder(out: Path) -> RunFolder:
    """Name the files of a training run in a folder."""
    return RunFolder(out, WRITTEN, manifest=SETTINGS, kind=FORMAT)


def read_settings(out: Path) -> dict[str, Any]:
    """Return the settings of the run in a folder, for a command that continues it; empty where there is none.

    Raises:
        ValueError: they are damaged.
    """
    content = run_folder(out).read()
    settings = {} if content is None else content.get("settings")
    if not isinstance(settings, dict):
        raise ValueError(f"{out / SETTINGS} holds no settings; start again with --overwrite")
    return settings


def default_unet(shape: tuple[int, int, int], n_classes: int, config: TrainConfig, beside: int = 0) -> UNetConfig:
    """Choose a network by the images' size: 4x4 at its coarsest, attention at 8x8, four times wider for colour.

    It has an embedding for "no class" where labels are dropped, and further channels where the variance is learned.

    Raises:
        ValueError: the size cannot be halved often enough.
    """
    C, H, W = shape
    levels = min(max((min(H, W) // 4).bit_length(), 1), 6)
    if H % 2 ** (levels - 1) or W % 2 ** (levels - 1):
        raise ValueError(
            f"images of {H}x{W} cannot be halved {levels - 1} times; pad them, or give a --resolution (32, 64, ...)"
        )
    with_null = config.class_dropout > 0
    digits = UNetConfig.digits()
    widths = (digits.block_out_channels[0],) * 2 + digits.block_out_channels
    attends = tuple(2 ** (levels - 1 - i) == 2 for i in range(levels))
    return dataclasses.replace(
        digits,
        sample_size=H if H == W else (H, W),
        in_channels=C + beside,
        out_channels=C * (1 + config.learns_variance),
        block_out_channels=tuple(w * (1 if C == 1 else 4) for w in widths[-levels:]),
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]),
        num_class_embeds=n_classes + with_null if n_classes else None,
        null_class=n_classes if n_classes and with_null else None,
    )


def network(model: UNet, weights: Mapping[str, Tensor]) -> UNet:
    """Return a network like ``model`` that has these weights, in eval mode."""
    with torch.device("meta"):
        network = UNet(model.config, zero_init=False)
    network.diffusion = model.diffusion
    network.load_state_dict(dict(weights), assign=True)
    return network.eval()


def export(out: Path, model: UNet, ema: EMA, ranks: Ranks = ALONE) -> None:
    """Save the averaged model in the run's folder, where `fastddpm.load` finds it, and the raw one beside it."""
    for folder, weights in ((out, ema.weights), (out / RAW, model.state_dict())):
        if whole := gathered(weights, ranks):
            save_pretrained(network(model, whole), folder)
