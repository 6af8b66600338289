"""What decides the bytes of a run's files is in its manifest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastddpm.machine.building import Job, Want
from fastddpm.machine.packages import weights_digest
from fastddpm.sampling import options
from fastddpm.sampling.outputs import Outputs
from fastddpm.sampling.sample import plan_run
from fastddpm.sampling.to_files import describe
from fastddpm.unet import inference
from tests.unet.test_unet import small_unet


def test_weights_digest_sees_every_weight() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    first = weights_digest(model)
    assert weights_digest(model) == first
    for tensor in model.state_dict().values():
        before = tensor.clone()
        tensor.add_(1)
        assert weights_digest(model) != first
        tensor.copy_(before)
    assert weights_digest(model) == first


def test_resumed_run_keeps_the_form_that_began_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, wants = False, []

    def obtain(identity: Any, want: Want, job: Callable[[], Job]) -> Any:
        wants.append(want)
        return job()[0] if there or want is Want.NOW else None

    monkeypatch.setattr(inference, "obtain", obtain)
    monkeypatch.setattr(options, "LOOKS_AFTER", 0)
    model = small_unet(out_channels=2)

    def begin(folder: str, *, resume: bool = True) -> bool:
        run = plan_run(model, (2, 16, 16), seeds=[0], steps=2)
        outputs = Outputs(tmp_path / folder, "npz", run.seeds, run.labels, run.batches, run.batches)
        config = describe(model, run, outputs, sampler="ddpm", classes=None, overwrite=False)
        with outputs.folder.locked():
            outputs.folder.begin(config, resume=resume, overwrite=False)
        return config["compile"]

    assert not begin("uncompiled", resume=False)
    there = True
    assert not begin("uncompiled")
    assert begin("compiled", resume=False)
    there = False
    assert begin("compiled")
    assert wants == [Want.IF_FOUND, Want.IF_FOUND, Want.NOW]
