"""What decides the bytes of a run's files is in its manifest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastddpm.machine import building
from fastddpm.machine.building import Job, Want
from fastddpm.machine.packages import weights_digest
from fastddpm.machine.ranks import Ranks
from fastddpm.sampling import options
from fastddpm.sampling.outputs import Outputs, read_x
from fastddpm.sampling.sample import plan_run
from fastddpm.sampling.to_files import begun
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

    monkeypatch.setattr(building, "obtain", obtain)
    monkeypatch.setattr(options, "LOOKS_AFTER", 0)
    model = small_unet(out_channels=2)

    def begin(folder: str, *, resume: bool = True) -> bool:
        run = plan_run(model, (2, 16, 16), seeds=[0], steps=2)
        outputs = Outputs(tmp_path / folder, "npz", run.seeds, run.labels, run.batches)
        with begun(model, run, outputs, Ranks(), sampler="ddpm", classes=None, resume=resume) as (config, missing):
            assert missing == [0]
        return config["compile"]

    assert not begin("uncompiled", resume=False)
    there = True
    assert not begin("uncompiled")
    assert begin("compiled", resume=False)
    there = False
    assert begin("compiled")
    assert wants == [Want.IF_FOUND, Want.IF_FOUND, Want.NOW]


@pytest.mark.parametrize(("file_format", "name"), [("png", "seed-000012.png"), ("npz", "part-00001.npz")])
def test_files_of_a_process_that_died_are_missed(tmp_path: Path, file_format: str, name: str) -> None:
    outputs = Outputs(tmp_path, file_format, [10, 11, 12, 13, 14], None, [range(2), range(2, 4), range(4, 5)])
    x = torch.rand(5, 1, 4, 4) * 2 - 1
    for i in (0, 2):
        outputs.save(i, x[list(outputs.batches[i])])
    assert outputs.missing() == [1]
    with pytest.raises(FileNotFoundError, match=f"{name} is missing, one of"):
        outputs.finish(grid=True)
    outputs.save(1, x[2:4])
    outputs.finish(grid=True)
    assert outputs.missing() == []
    if file_format == "npz":
        assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "samples.npz"]
        assert torch.equal(torch.from_numpy(read_x(tmp_path / "samples.npz")), x)
        assert torch.equal(torch.from_numpy(read_x(tmp_path / "samples.npz", 3)), x[:3])
