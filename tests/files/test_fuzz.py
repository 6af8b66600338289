"""Damaged and changed JSON files: what they say is taken, or ValueError or TypeError with the file or the key."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastddpm.files.run_folder import RunFolder
from fastddpm.schedules.diffusion import DiffusionConfig
from fastddpm.training.config import TrainConfig
from fastddpm.training.folder import SETTINGS, read_settings, run_folder
from fastddpm.training.log import LOG, read_log
from fastddpm.unet.load import _read_diffusion, load
from fastddpm.unet.save import save_pretrained
from tests.tiny import PLAIN, tiny_unet

JUNK = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 40),
        st.sampled_from([10**400, 2**31, 2**63, -(2**64), 1e-320, 1e308, math.inf, -math.inf, math.nan, 0.5]),
        st.sampled_from(["true", "linear", "epsilon", "DDPMScheduler", "\x1b[2J", "\ud800"]),
        st.text(max_size=4),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
# What a scheduler's keys are called where their values are checked.
RENAMED = {"clip_sample_range": "clip_range", "num_train_timesteps": "num_timesteps"}
DAMAGE = st.tuples(st.sampled_from(["cut", "flip", "insert"]), st.floats(0, 1, exclude_max=True), st.integers(1, 255))


class File(NamedTuple):
    """A file, the entries of it that are changed, and what reads it."""

    path: Path
    entries: tuple[str, ...]
    read: Callable[[], Any]


def model_file(folder: Path, name: str) -> File:
    small = {"block_out_channels": (4,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    network = tiny_unet(PLAIN, **small)
    network.diffusion = DiffusionConfig()
    save_pretrained(network, folder, layout="pipeline")
    return File(folder / name, (), lambda: load(folder))


def scheduler(folder: Path) -> File:
    # Without the network, whose weights take longer than its configuration.
    return model_file(folder, "scheduler/scheduler_config.json")._replace(read=lambda: _read_diffusion(folder))


def manifest(folder: Path) -> File:
    run = RunFolder(folder, ("seed-*.png",))
    config = {"sampler": "ddpm", "steps": 10, "seeds": "0-3"}
    run.begin(config, resume=False, overwrite=False)
    return File(run.manifest, ("config",), lambda: run.begin(config, resume=True, overwrite=False))


def training(folder: Path) -> File:
    config = TrainConfig("mnist", str(folder))
    settings = {"data": "mnist", "steps": 10, "lr": 0.1, "compile": False, "value_range": None, "gamma": None}
    run_folder(folder).begin(config.identity(), resume=False, overwrite=False, settings=settings)
    return File(folder / SETTINGS, ("settings",), lambda: TrainConfig.from_dict({**read_settings(folder), "out": "x"}))


def log(folder: Path) -> File:
    path = folder / LOG
    path.write_text(json.dumps({"step": 3, "loss": 0.5, "lr": 0.1}) + "\n")
    return File(path, (), lambda: list(read_log(folder)))


FILES: dict[str, Callable[[Path], File]] = {
    "config": lambda folder: model_file(folder, "unet/config.json"),
    "scheduler_config": scheduler,
    "manifest": manifest,
    "train": training,
    "log": log,
}


@pytest.fixture(params=FILES)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> File:
    return FILES[request.param](tmp_path)


def holds(file: File, *names: str) -> None:
    """Read, or see it refused on one line that has one of the names."""
    refusal = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            file.read()
        except (ValueError, TypeError) as error:
            refusal = str(error)
    if refusal is not None:
        assert refusal.isprintable()
        assert any(name in refusal for name in names), refusal


def test_a_file_with_another_value_is_taken_or_refused(file: File) -> None:
    content = json.loads(file.path.read_text())

    @settings(max_examples=120)
    @given(st.data())
    def change(data: st.DataObject) -> None:
        changed = copy.deepcopy(content)
        part = changed
        for entry in file.entries * data.draw(st.booleans()):
            part = part[entry]
        key = data.draw(st.sampled_from([*sorted(part) * 4, "", "new"]))
        part[key] = data.draw(JUNK)
        file.path.write_text(json.dumps(changed) + "\n")
        name = repr(RENAMED.get(key, key.lstrip("_")))[1:-1]
        holds(
            file,
            name,
            "not usable as JSON",
            "weights of another architecture",
            "damaged or was written",
            "training setting",
        )

    change()


def test_a_damaged_file_is_taken_or_refused(file: File) -> None:
    content = file.path.read_bytes()

    @settings(max_examples=40)
    @given(DAMAGE)
    def change(damage: tuple[str, float, int]) -> None:
        kind, place, byte = damage
        i = int(place * len(content))
        tail = {
            "cut": b"",
            "flip": bytes([content[i] ^ byte]) + content[i + 1 :],
            "insert": bytes([byte]) + content[i:],
        }
        file.path.write_bytes(content[:i] + tail[kind])
        holds(file, file.path.name, "weights of another architecture", "training setting")

    change()
