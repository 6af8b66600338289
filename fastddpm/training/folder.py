"""The folder of a training run: what is in it, whether it may be written to, and the model saved at its end."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastddpm.data.datasets import Dataset, load_data
from fastddpm.files.atomic import write_files
from fastddpm.files.run_folder import differences
from fastddpm.files.safejson import read_object
from fastddpm.noise.v1 import NOISE_VERSION
from fastddpm.schedules.diffusion import DiffusionConfig
from fastddpm.training.checkpoint import CHECKPOINT, read_state
from fastddpm.training.config import TrainConfig
from fastddpm.training.ema import EMA
from fastddpm.unet.load import load, save_pretrained
from fastddpm.unet.unet import UNet, UNetConfig

SETTINGS, LOG, PLOT, SAMPLES, LOCK = "train.json", "log.jsonl", "loss.png", "samples-*.png", ".lock"
RAW = "raw"
FORMAT = "fastddpm-training-1"

_MODEL = ("config.json", "scheduler_config.json", "model.safetensors")
# All that a run writes: whatever else the user keeps in its folder stays.
WRITTEN = (
    *(SETTINGS, LOG, PLOT, SAMPLES, "events.out.tfevents.*", CHECKPOINT),
    *_MODEL,
    *(f"{RAW}/{name}" for name in _MODEL),
)


@dataclass(frozen=True)
class Run:
    """A folder that is ready for training, and its data."""

    config: TrainConfig
    out: Path
    data: Dataset

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is something to continue from."""
        return (self.out / CHECKPOINT).exists()

    def last_checkpoint(self) -> str:
        """Name the last good checkpoint, for messages."""
        if not self.has_checkpoint:
            return "no checkpoint was written yet"
        return f"the last good checkpoint is {self.out / CHECKPOINT} at step {read_state(self.out)['step']}"

    def build_model(self) -> UNet:
        """Build the network that the settings or the images' size ask for, with fresh weights or those of `init`.

        Raises:
            ValueError: it does not suit the images, or `init` was trained for another diffusion.
        """
        config, classes = self.config, len(self.data.classes)
        trained = None if config.init is None else load(config.init)
        if trained is not None:
            unet = trained.config
        elif config.model is not None:
            unet = UNetConfig.from_dict(read_object(config.model))
        else:
            unet = default_unet(self.data.shape, classes, with_null=config.class_dropout > 0)
            if config.learns_variance:
                unet = dataclasses.replace(unet, out_channels=2 * unet.in_channels)
        _check_suits(unet, config, self.data)
        model = UNet(dataclasses.replace(unet, dropout=config.dropout))
        model.diffusion = config.diffusion()
        if trained is not None:
            model.diffusion = _shared_diffusion(config, trained.diffusion)
            model.load_state_dict(trained.state_dict())
        return model


def _check_suits(unet: UNetConfig, config: TrainConfig, data: Dataset) -> None:
    """Refuse a network of other channels, or without an embedding for each class and for "no class"."""
    C, classes = data.shape[0], len(data.classes)
    name = config.init or config.model
    if (unet.in_channels, unet.out_channels) != (C, C * (1 + config.learns_variance)):
        raise ValueError(
            f"{name}: {unet.in_channels} channels in and {unet.out_channels} out; {data.name} has {C}"
            + (f", and a {config.variance} variance needs as many again" if config.learns_variance else "")
        )
    rows, null = unet.num_class_embeds or 0, unet.null_class
    free = rows if null is None else null
    if (classes == 0) != (rows == 0) or free < classes:
        raise ValueError(f"{name}: {free} classes; {data.name} has {classes}")
    if classes and config.class_dropout and null is None:
        raise ValueError(f"{name}: no null_class, which class dropout needs; give --class-dropout 0")


def _shared_diffusion(config: TrainConfig, trained: DiffusionConfig | None) -> DiffusionConfig:
    """Return the diffusion of the model to start from, after checking that the run's has the same schedule and target.

    What only sampling knows, the variance and the clip range, may differ.
    """
    ours = config.diffusion()
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
def open_run(config: TrainConfig) -> Iterator[Run]:
    """Load the data and prepare ``config.out``, which is ours until the context ends.

    Raises:
        FileExistsError: the folder is not empty, and neither resume nor overwrite was asked for.
        NotADirectoryError: ``out`` is a file.
        BlockingIOError: another process trains there.
        ValueError: resume was asked for and the folder holds a run of other settings, or no run at all; or overwrite
            would remove the model to start from.
    """
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file; give another --out")
    _check_free(out, config)
    _check_kept(out, config)
    data = load_data(config.data, resolution=config.resolution)
    identity = {**config.identity(), "data_sha256": data.fingerprint(), "noise": NOISE_VERSION}
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        _check_free(out, config)
        if config.resume and _contents(out):
            _check_same(out, identity)
        if config.overwrite:
            _remove_run(out)
        _remove_leftovers(out)
        settings = {"format": FORMAT, "settings": dataclasses.asdict(config), "identity": identity}
        write_files({out / SETTINGS: (json.dumps(settings, indent=2) + "\n").encode()})
        yield Run(config, out, data)


def _contents(out: Path) -> list[Path]:
    """What a folder holds beside a lock and the leftovers of a killed process."""
    return [p for p in out.iterdir() if p.name != LOCK and not p.name.endswith(".tmp")] if out.exists() else []


def _check_free(out: Path, config: TrainConfig) -> None:
    if _contents(out) and not (config.resume or config.overwrite):
        raise FileExistsError(f"{out} is not empty; use --resume to continue its run, --overwrite to replace it")


def _check_kept(out: Path, config: TrainConfig) -> None:
    for name, path in (("init", config.init), ("model", config.model)):
        if config.overwrite and path is not None and Path(path).resolve().is_relative_to(out.resolve()):
            raise ValueError(f"--overwrite would remove --{name} {path}; give another --out")


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system releases even when the process is killed."""
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield
        return
    with (out / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another process is training in {out}; give another --out") from None
        yield


def read_settings(out: Path) -> dict[str, object]:
    """Return the settings of the run in a folder, for a command that continues it; empty where there is none."""
    path = out / SETTINGS
    return dict(_read(path)["settings"]) if path.exists() else {}


def _read(path: Path) -> dict[str, dict[str, object]]:
    content = read_object(path)
    if content.get("format") != FORMAT or not all(isinstance(content.get(k), dict) for k in ("settings", "identity")):
        raise ValueError(f"{path} does not describe a training run of this version")
    return content


def _check_same(out: Path, identity: dict[str, object]) -> None:
    if not (out / SETTINGS).exists():
        raise ValueError(f"{out} holds files but no {SETTINGS}: there is no run to resume; use another --out")
    if changed := differences(TrainConfig.defaults() | _read(out / SETTINGS)["identity"], identity):
        raise ValueError(f"cannot resume {out}, the run differs: {'; '.join(changed)}")


def _remove_run(out: Path) -> None:
    for pattern in WRITTEN:
        for path in out.glob(pattern):
            path.unlink()


def _remove_leftovers(out: Path) -> None:
    for pattern in WRITTEN:
        folder, name = (out / pattern).parent, Path(pattern).name
        for path in folder.glob(f".{name}.*.tmp"):
            path.unlink(missing_ok=True)


def default_unet(shape: tuple[int, int, int], n_classes: int, *, with_null: bool) -> UNetConfig:
    """Choose a network by the images' size: 4x4 at its coarsest, attention at 8x8, four times wider for colour.

    Raises:
        ValueError: the size cannot be halved often enough.
    """
    C, H, W = shape
    levels = min(max((min(H, W) // 4).bit_length(), 1), 6)
    if H % 2 ** (levels - 1) or W % 2 ** (levels - 1):
        raise ValueError(
            f"images of {H}x{W} cannot be halved {levels - 1} times; pad them, or give a --resolution (32, 64, ...)"
        )
    digits = UNetConfig.digits()
    widths = (digits.block_out_channels[0],) * 2 + digits.block_out_channels
    attends = tuple(2 ** (levels - 1 - i) == 2 for i in range(levels))
    return dataclasses.replace(
        digits,
        sample_size=H if H == W else (H, W),
        in_channels=C,
        out_channels=C,
        block_out_channels=tuple(w * (1 if C == 1 else 4) for w in widths[-levels:]),
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]),
        num_class_embeds=n_classes + with_null if n_classes else None,
        null_class=n_classes if n_classes and with_null else None,
    )


def averaged(model: UNet, ema: EMA) -> UNet:
    """Return a copy of the model with the averaged weights, in eval mode."""
    with_average = copy.deepcopy(model)
    ema.copy_to(with_average)
    return with_average.eval()


def export(out: Path, model: UNet, ema: EMA) -> None:
    """Save the averaged model in the run's folder, where `fastddpm.load` finds it, and the raw one beside it."""
    save_pretrained(averaged(model, ema), out)
    save_pretrained(model, out / RAW)
