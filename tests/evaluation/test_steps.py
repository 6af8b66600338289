"""Error against the number of calls: beside the closed form of a Gaussian, and as the command prints it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastddpm
from fastddpm import DiffusionConfig, UNet, UNetConfig
from fastddpm.cli import main
from fastddpm.evaluation.steps import measure_steps
from fastddpm.noise.v1 import STREAM_X_T

DIFFUSION = DiffusionConfig(clip_range=None)
ALPHAS_CUMPROD = DIFFUSION.schedule().alphas_cumprod
# Standard deviation of the data.
S = 0.5


class GaussianModel:
    """The exact noise prediction for data N(0, S^2 I)."""

    diffusion = DIFFUSION

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        alpha_bar = ALPHAS_CUMPROD[t.long()][:, None]
        return ((1 - alpha_bar).sqrt() * x / (alpha_bar * S**2 + 1 - alpha_bar)).to(x.dtype)


def test_errors_are_those_to_the_exact_solution_of_a_gaussian() -> None:
    seeds = range(12)
    report = measure_steps(
        GaussianModel(), samplers=["ddim", "dpm++2m"], calls=(5, 10, 20), many=1000, seeds=seeds, shape=(3,)
    )
    # The probability-flow ODE of a Gaussian scales x_T by the ratio of the standard deviations.
    alpha_bar = ALPHAS_CUMPROD[-1]
    x_T = fastddpm.randn((12, 3), seeds=seeds, stream=STREAM_X_T).double()
    exact = S * x_T / (alpha_bar * S**2 + 1 - alpha_bar).sqrt()
    spread = (exact - exact.mean(dim=0)).square().mean().sqrt()
    for row in report["rows"]:
        options: dict[str, Any] = {"steps": row["calls"], "sampler": row["sampler"], "shape": (3,)}
        x = fastddpm.sample(GaussianModel(), seeds=seeds, **options).double()
        # But for the converged result's own error.
        assert row["error"] == pytest.approx(float((x - exact).square().mean().sqrt() / spread), abs=2e-3)
    within = [row for row in report["rows"] if row["error"] <= 0.05]
    assert report["enough"] == min(within, key=lambda row: row["calls"])
    assert report["many"]["calls"] == 1000


def test_steps_measures_features_and_counts_calls() -> None:
    counted: list[int] = []
    report = measure_steps(
        GaussianModel(),
        samplers=["heun"],
        calls=[3],
        many=10,
        seeds=range(4),
        within=1e-6,
        features=lambda x: x[:, :1] * 7,
        progress=counted.append,
        shape=(3,),
        batch_size=2,
    )
    (row,) = report["rows"]
    assert row["calls"] == 5
    assert sum(counted) == 2 * (10 + 5)
    assert 0 < row["feature_error"] < 1
    assert report["enough"] is None


def test_steps_command_writes_a_report_and_a_curve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = UNetConfig(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
    )
    network = UNet(config, zero_init=False).eval()
    network.diffusion = DiffusionConfig(num_timesteps=30, beta_end=0.3)
    fastddpm.save_pretrained(network, "model")
    command = ["steps", "--model", "model", "--outdir", "out", "--device", "cpu"]
    size = ["--samples", "2", "--samplers", "ddim, dpmpp_2m", "--calls", "2,4,999", "--within", "1e9"]
    assert main([*command, *size]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert max(map(len, out.splitlines())) <= 80
    assert "with the fewest calls: --sampler " in out
    report = json.loads((tmp_path / "out" / "steps.json").read_text())
    found = [(row["sampler"], row["calls"]) for row in report["rows"]]
    assert found == [("ddim", 2), ("ddim", 4), ("dpm++2m", 2), ("dpm++2m", 4)]
    assert report["many"]["calls"] == 30
    assert (tmp_path / "out" / "steps.png").stat().st_size > 5000
    assert main([*command, *size]) == 1
    assert "steps.json exists already; use --overwrite" in capsys.readouterr().err
    assert main([*command, "--samplers", "ddpm", "--overwrite"]) == 1
    assert "--samplers: ddpm draws noise" in capsys.readouterr().err
