"""``fastddpm diffuse``: files, reports and refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastddpm import Schedule
from fastddpm.cli import main
from fastddpm.data import points

pytestmark = pytest.mark.usefixtures("still_generators")


def run(*arguments: str) -> int:
    return main(["diffuse", "--quiet", *arguments])


def test_diffuse_trains_draws_and_reports(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", "two-moons", "--steps", "2", "--train-steps", "3", "--show", "20", "--json"]
    assert run(*arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["files"] == ["diffuse-two-moons.png"]
    assert report["alpha_bar_T"] == pytest.approx(float(Schedule.cosine(2).alphas_cumprod[-1]))
    assert report["ends_gaussian"] is True
    assert [path.name for path in workdir.iterdir()] == ["diffuse-two-moons.png"]


def test_diffuse_measures_the_network_s_samples(
    workdir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def compare(name: str, sample: Any, first_seed: int) -> tuple[float, float]:
        x = sample(50, first_seed)
        asked.append((len(x), first_seed))
        return points.sliced_wasserstein(x, points.draw(name, 50, first_seed)), 0.5

    monkeypatch.setattr(points, "compare", compare)
    assert run("--steps", "1", "--train-steps", "1", "--show", "9", "--measure", "--json", "--out", "a.png") == 0
    report = json.loads(capsys.readouterr().out)
    assert asked == [(50, 1)]
    assert report["sw_ratio"] == pytest.approx(report["sw_samples"] / 0.5)


def test_diffuse_names_the_models_own_T(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("images.npy", np.tile(np.arange(32, dtype=np.uint8) * 8, (2, 1, 32, 1)))
    assert main(["diffuse", "--data", "images.npy", "--model", "digits", "--steps", "2", "--out", "a.png"]) == 0
    assert capsys.readouterr().out.startswith("T = 1000: ends Gaussian, alpha_bar_T = 4.04e-05")


def test_diffuse_refuses_to_overwrite(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workdir / "a.gif").write_bytes(b"mine")
    arguments = ["--exact", "--steps", "1", "--show", "5", "--out", "a.png", "--gif"]
    assert run(*arguments) == 1
    assert "a.gif exists already; use --overwrite" in capsys.readouterr().err
    assert (workdir / "a.gif").read_bytes() == b"mine"
    assert not (workdir / "a.png").exists()
    assert run(*arguments, "--overwrite") == 0
    assert (workdir / "a.gif").read_bytes()[:4] == b"GIF8"
    assert sorted(path.name for path in workdir.iterdir()) == ["a.gif", "a.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "num_timesteps must be an integer >= 1 and <= 1000000, got 0"),
        (["--steps", "-3"], "num_timesteps must be an integer >= 1 and <= 1000000, got -3"),
        (["--schedule", "cosin"], "unknown beta_schedule 'cosin' (did you mean 'cosine'?); choose one of linear"),
        (["--schedule", "linear_rescaled"], "use the cosine schedule for so few steps"),
        (["--data", "nothing.npy"], "no data at 'nothing.npy'; give swiss-roll"),
        (["--data", "wide.npy"], "wide.npy: points must be numbers [N, 2]"),
        (["--data", "empty.png"], "empty.png: not a usable image"),
        (["--device", "gpu"], "unknown device 'gpu'; choose cpu, cuda, or one of several: cuda:1"),
        (["--out", "a.jpg"], "--out a.jpg must end in .png"),
        (["--out", "empty.png/a.png"], "empty.png is no folder that can be written to; choose another --out"),
        (["--show", "0"], "must be an integer >= 1, got 0"),
        (["--train-steps", "0"], "must be an integer >= 1, got 0"),
        (["--seed", "-1"], "seed must be an integer >= 0 and <= 2"),
        (["--model", "digits", "--data", "two-moons"], "--model goes with images, and two-moons are points"),
        (["--model", "digits", "--schedule", "cosine"], "a model brings its own schedule"),
        (["--measure", "--data", "points.npy"], "--measure needs data to draw anew"),
        (["--measure", "--exact"], "--measure is for the trained network"),
    ],
)
def test_diffuse_refuses_in_one_line(
    workdir: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    np.save(workdir / "wide.npy", np.zeros((4, 7)))
    (workdir / "empty.png").write_bytes(b"")
    before = sorted(workdir.iterdir())
    assert run(*arguments) == 1
    assert message in (error := capsys.readouterr().err)
    assert error.count("\n") == 1
    assert sorted(workdir.iterdir()) == before


def test_diffuse_names_what_is_missing(
    workdir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run("--steps", "1") == 1
    assert "pip install 'fastddpm[train]'" in capsys.readouterr().err
