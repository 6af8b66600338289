"""A module of the user's own runs from a package, in another process too, and only while it is what it was."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastddpm import Sampler, Schedule, ddpm_table
from fastddpm.errors import BackendUnavailable
from fastddpm.machine import building
from fastddpm.machine.building import Want
from fastddpm.machine.packages import Code
from fastddpm.sampling import options

SHAPE = (4,)
SEEDS = [1, 2]
FACTOR = 1.0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.doubled = nn.Linear(4, 4), False

    def forward(self, x: Tensor, t: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        m = FACTOR * torch.tanh(self.inner(x) + 1e-3 * t[:, None] + shift)
        return 2 * m if self.doubled else m


class Picky(Net):
    def forward(self, x: Tensor, t: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        return super().forward(x, t, 0.0 if x.sum() > 0 else 1.0)


def sampler(model: nn.Module, **given: Any) -> Sampler:
    return Sampler(model.eval(), ddpm_table(Schedule.linear_rescaled(50), steps=3), SHAPE, **given)


def draw(model: nn.Module, **given: Any) -> Tensor:
    return sampler(model, **given).sample(seeds=SEEDS)


def compiled(drawn: Sampler) -> bool:
    """Whether its last run was."""
    network = drawn._steps._idle[-1].network
    return network._call is network._compiled


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package that a process built which is gone."""
    out = tmp_path_factory.mktemp("built") / "model.pt2"
    code = f"from tests.sampling.test_kept import Net, draw; draw(Net(), compile=True, compiled={str(out)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    return out


@pytest.mark.slow
def test_module_runs_from_a_file_while_it_is_what_it_was(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, before = Net(), built.stat().st_mtime_ns
    kept = sampler(model, compile=True, compiled=built)
    expected = draw(model, compile=False)
    assert (kept.sample(seeds=SEEDS) - expected).norm() < 1e-5 * expected.norm()
    assert compiled(kept)
    assert built.stat().st_mtime_ns == before

    def refuses(what: str, model: nn.Module = model) -> None:
        with pytest.raises(BackendUnavailable, match=what):
            draw(model, compiled=built)

    model.doubled = True
    with pytest.raises(BackendUnavailable, match="does not predict what the model does now"):
        kept.sample(seeds=SEEDS)
    refuses("compiled for network")
    model.doubled = False
    monkeypatch.setattr(f"{__name__}.FACTOR", 1.1)
    refuses("compiled for network")
    monkeypatch.undo()
    nn.init.zeros_(model.inner.bias)
    refuses("compiled for weights")
    refuses("torch.export does not take the model", Picky())


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> dict[str, building.Job]:
    """What would have been built in the background, and is found from then on, uncompiled; whatever the work."""
    built: dict[str, building.Job] = {}

    def obtain(identity: dict[str, str], want: Want, job: Any) -> Code | None:
        found = built.get(str(identity))
        if found is None and want is Want.FOR_LATER:
            built[str(identity)] = job()
        program = None if found is None else torch.export.load(io.BytesIO(found[0])).module()  # type: ignore[arg-type]
        return program  # type: ignore[return-value]

    monkeypatch.setattr(building, "obtain", obtain)
    monkeypatch.setattr(options, "BACKGROUND_AFTER", 0)
    return built


@pytest.mark.slow
def test_module_is_compiled_from_the_next_call_on_and_never_within_a_run(
    cache: dict[str, building.Job], caplog: pytest.LogCaptureFixture
) -> None:
    model = Net()
    one, expected = sampler(model), draw(model, compile=False)
    assert torch.equal(one.sample(seeds=SEEDS), expected)
    assert not compiled(one)
    assert len(cache) == 1
    settled = sampler(model)
    assert settled.settle(seeds=SEEDS)
    assert (one.sample(seeds=SEEDS) - expected).norm() < 1e-5 * expected.norm()
    assert compiled(one)
    shifted = sampler(model)
    shifted.sample(seeds=SEEDS, model_kwargs={"shift": torch.zeros(2, 4)})
    for shift, runs_compiled in ((torch.ones(2, 4), True), (torch.ones(1), False), (0.5, False)):
        images = shifted.sample(seeds=SEEDS, model_kwargs={"shift": shift})
        plain = sampler(model, compile=False).sample(seeds=SEEDS, model_kwargs={"shift": shift})
        assert (images - plain).norm() < 1e-5 * plain.norm()
        assert compiled(shifted) is runs_compiled
    model.doubled = True
    assert torch.equal(one.sample(seeds=SEEDS), draw(model, compile=False))
    assert "runs uncompiled: compiled code does not predict what the model does now" in caplog.text


@pytest.mark.parametrize("threshold", ["BACKGROUND_AFTER", "REPAYS_AFTER"])
def test_module_that_cannot_be_compiled_runs_uncompiled(
    threshold: str, cache: dict[str, building.Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, threshold, 0)
    model, calls = Picky(), []
    one = sampler(model)
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: calls.append(1) or _export(*_, **__))
    for _ in range(2):
        assert torch.equal(one.sample(seeds=SEEDS), draw(model, compile=False))
    assert cache == {}
    assert len(calls) == 1


_export = torch.export.export
