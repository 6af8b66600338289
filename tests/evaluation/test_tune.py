"""Fitting a table: nearer to the closed form, restarts that change nothing, and files that are refused."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fastddpm
from fastddpm import DiffusionConfig, UNet, UNetConfig
from fastddpm.cli import main
from fastddpm.evaluation.tune import Batch, Family, Targets, tune
from fastddpm.noise.v1 import STREAM_X_T
from fastddpm.sampling.tuned import TUNED, Tuned, read_tuned, tuned_bytes
from fastddpm.schedules.levels import alpha_bar_at
from fastddpm.tables.by_name import make_table

DIFFUSION = DiffusionConfig(clip_range=None)
SCHEDULE = DIFFUSION.schedule()
ALPHAS_CUMPROD = SCHEDULE.alphas_cumprod


SMALL = UNetConfig(
    sample_size=8,
    block_out_channels=(8,),
    down_block_types=("DownBlock2D",),
    up_block_types=("UpBlock2D",),
    norm_num_groups=4,
)
# Standard deviations of a picture's pixels.
S = torch.linspace(0.05, 0.6, 16).reshape(1, 4, 4)


class GaussianPixels(nn.Module):
    """The exact noise prediction for independent pixels N(0, S^2)."""

    diffusion = DIFFUSION
    config = UNetConfig(sample_size=4, in_channels=1, out_channels=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha_bar = alpha_bar_at(SCHEDULE, t.double())[:, None, None, None]
        return ((1 - alpha_bar).sqrt() * x / (alpha_bar * S**2 + 1 - alpha_bar)).to(x.dtype)


@pytest.fixture(scope="module")
def tuned() -> Tuned:
    return tune(Targets(GaussianPixels().eval(), samples=64), 3, minutes=0.05)


def test_a_fitted_table_is_nearer_to_the_solution_on_samples_it_never_saw(tuned: Tuned) -> None:
    model, seeds, shape = GaussianPixels().eval(), range(200, 232), (1, 4, 4)
    # The probability-flow ODE of a Gaussian scales x_T by the ratio of the standard deviations.
    x_T = fastddpm.randn((32, *shape), seeds=seeds, stream=STREAM_X_T).double()
    solution = S * x_T / (ALPHAS_CUMPROD[-1] * S**2 + 1 - ALPHAS_CUMPROD[-1]).sqrt()
    unfitted = fastddpm.sample(model, shape, seeds=seeds, steps=3)
    fitted = fastddpm.Sampler(model, tuned.table(DIFFUSION), shape).sample(seeds=seeds)
    errors = [float((x - solution).square().mean().sqrt()) for x in (unfitted, fitted)]
    assert errors[1] < 0.2 * errors[0]
    assert tuned.error_after < 0.2 * tuned.error_before


@torch.no_grad()
def test_a_changed_number_runs_the_rows_behind_it_alone_and_to_the_same_result() -> None:
    torch.manual_seed(0)
    model = UNet(dataclasses.replace(SMALL, num_class_embeds=4, null_class=3), zero_init=False).eval()
    clipped = DiffusionConfig()
    for guidance in (1.0, 2.0):
        family = Family(clipped, 3, guidance)
        batch = Batch(model, range(3), guidance, make_table("fast", clipped, steps=3))
        path = batch.run(family.table(family.start))
        drawn = fastddpm.sample(model, seeds=range(3), steps=3, guidance=guidance, diffusion=clipped, compile=False)
        torch.testing.assert_close(path.x[-1], drawn, rtol=0, atol=1e-4)
        calls = []
        for change in family.reach.diag()[family.reach.nonzero()[:, 0]]:
            moved = family.table(family.start + change)
            with mock.patch.object(batch, "progress") as progress:
                changed = batch.run(moved, path)
            calls.append(progress.call_count)
            assert torch.equal(changed.x[-1], batch.run(moved).x[-1])
            assert not torch.equal(changed.x[-1], path.x[-1])
        # A level ends the step before it, where the network is asked as before; a timestep is told one row later.
        assert calls == [2, 1] * 2 + [2] * 2 + [1] * 3 + [0] * 4
        assert batch.run(family.table(family.start), path) is path


def test_a_second_fit_goes_on_from_the_first(tuned: Tuned) -> None:
    family = Family(DIFFUSION, 3, 1.0)
    theta = family.parameters(tuned)
    again = family.tuned(theta, tuned.error_before, tuned.error_after)
    torch.testing.assert_close(torch.tensor(again.coefficients), torch.tensor(tuned.coefficients))
    torch.testing.assert_close(torch.tensor(again.timesteps), torch.tensor(tuned.timesteps))
    further = tune(Targets(GaussianPixels().eval(), samples=64), 3, minutes=1e-9, start=tuned)
    assert further.error_after == pytest.approx(tuned.error_after, rel=1e-3)


def small(folder: Path) -> UNet:
    torch.manual_seed(0)
    model = UNet(SMALL, zero_init=False)
    model.diffusion = DIFFUSION
    fastddpm.save_pretrained(model, folder)
    return fastddpm.load(folder)


def test_tune_writes_a_table_that_sample_and_eval_find(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(tmp_path)
    with pytest.raises(FileNotFoundError, match="fastddpm tune"):
        fastddpm.sample(model, seeds=0, sampler="tuned")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert (
        main(["tune", "--model", str(tmp_path), "--steps", "2,3", "--minutes", "1e-6", "--samples", "4", "--json"]) == 0
    )
    captured = capsys.readouterr()
    assert "3 steps: " in captured.err
    assert ": : " not in captured.err
    printed = json.loads(captured.out)
    assert [len(table["levels"]) for table in printed["tables"]] == [2, 3]
    assert main(["sample", "--model", str(tmp_path), "--sampler", "tuned", "--outdir", str(tmp_path / "out")]) == 0
    # Unfitted, it is the solver itself.
    x = fastddpm.sample(model, seeds=range(2), sampler="tuned", steps=3)
    torch.testing.assert_close(x, fastddpm.sample(model, seeds=range(2), steps=3), rtol=0, atol=1e-5)
    wrongs: list[dict[str, Any]] = [{"steps": 4}, {"guidance": 2.0}, {"sampler_options": {"spacing": "karras"}}]
    wrongs += [{"guidance_interval": (1, 9)}, {"guidance_rescale": 0.5}, {"cond_fn": lambda x, t: x}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="tuned"):
            fastddpm.sample(model, seeds=0, sampler="tuned", **wrong)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(ValueError, match=r"tuned\.json: its tables were fitted to other weights"):
        fastddpm.sample(model, seeds=0, sampler="tuned")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(diffusion={**f["diffusion"], "num_timesteps": 999}), "another diffusion"),
        (lambda f: f.update(more=1), "must have the keys"),
        (lambda f: f.update(tables={}), "tables must be a list"),
        (lambda f: f["tables"].append(3), "must be an object"),
        (lambda f: f["tables"][0].pop("levels"), "must have the keys"),
        (lambda f: f["tables"][0].update(levels="999"), "levels must be a list"),
        (lambda f: f["tables"][0].update(levels=[999.0, 1999.0]), "levels"),
        (lambda f: f["tables"][0].update(levels=[5.0, 500.0]), "must descend"),
        (lambda f: f["tables"][0].update(levels=[]), "row for each step"),
        (lambda f: f["tables"][0].update(timesteps=[999.0]), "row for each step"),
        (lambda f: f["tables"][0].update(timesteps=[999.0, -1.0]), "timesteps"),
        (lambda f: f["tables"][0].update(coefficients=[[1.0], [1.0]]), "2 to 5 columns"),
        (lambda f: f["tables"][0].update(coefficients=[[1.0] * 9] * 2), "2 to 5 columns"),
        (lambda f: f["tables"][0].update(coefficients=[1.0, 2.0]), "list of lists"),
        (lambda f: f["tables"][0].update(coefficients=[[1.0, 1e30], [0.0, 1.0]]), "coefficients must be"),
        (lambda f: f["tables"][0].update(coefficients=[[1.0, "x"], [0.0, 1.0]]), "coefficients must be"),
        (lambda f: f["tables"][0].update(guidance=None), "guidance must be"),
    ],
)
def test_a_hostile_or_foreign_table_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    model = small(tmp_path)
    family = Family(DIFFUSION, 2, 1.0)
    content = json.loads(tuned_bytes([family.tuned(family.start)], model, DIFFUSION))
    path = tmp_path / TUNED
    path.write_text(json.dumps(content))
    assert read_tuned(path, model, DIFFUSION)[0].table(DIFFUSION).name == "tuned"
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        read_tuned(path, model, DIFFUSION)
    assert str(caught.value).startswith(str(path))
