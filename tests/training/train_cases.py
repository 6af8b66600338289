"""A training run small enough to be a test, and what the tests of training do with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastddpm.training.checkpoint import CHECKPOINT
from fastddpm.training.config import TrainConfig
from fastddpm.training.folder import LOG
from fastddpm.training.trainer import Trainer
from tests import tiny

TINY: dict[str, Any] = {**tiny.PLAIN, "num_class_embeds": 11, "null_class": 10}


def tiny_run(folder: Path) -> TrainConfig:
    """A run of twelve steps that takes a second."""
    model = folder / "tiny.json"
    model.write_text(json.dumps(TINY))
    return TrainConfig(
        data="digits8x8",
        out=str(folder / "run"),
        model=str(model),
        steps=12,
        batch=8,
        warmup=3,
        log_every=5,
        save_every=4,
        seed=7,
    )


def at_step(n: int, action: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call ``action`` in the middle of the run, after gradient step n."""
    step = Trainer.step

    def stepping(self: Trainer, at: int) -> float:
        loss = step(self, at)
        if at == n:
            action()
        return loss

    monkeypatch.setattr(Trainer, "step", stepping)


def same_run(one: Path, two: Path) -> bool:
    """Whether two folders hold the same checkpoint, log, pictures and models, byte for byte."""
    files = ("*.safetensors", "raw/*.safetensors", "*.png", LOG)
    a, b = (
        {path.relative_to(run): path.read_bytes() for name in files for path in run.glob(name)} for run in (one, two)
    )
    assert Path(CHECKPOINT) in a
    return a == b
