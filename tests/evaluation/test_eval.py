"""``fastddpm eval``: the report, resumption after a kill, images of one's own, and the model card."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastddpm
from fastddpm import DiffusionConfig
from fastddpm.cli import main
from fastddpm.data.datasets import digits8x8
from fastddpm.evaluation import fid, report
from fastddpm.evaluation.classifier import Classifier
from fastddpm.files import images
from fastddpm.machine.packages import weights_digest
from fastddpm.training.folder import LOG
from fastddpm.training.likelihood import bits_per_dim
from tests.evaluation import model_card as card
from tests.evaluation.classifier_training import save_classifier
from tests.tiny import tiny_unet

pytestmark = pytest.mark.usefixtures("still_generators")

SAMPLES = 20
ROWS = ("accuracy", "frechet", "nearest", "diversity")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of ten classes of 8x8 images, and a classifier for them; neither has learned anything."""
    torch.manual_seed(0)
    network = tiny_unet(num_class_embeds=11, null_class=10)
    network.diffusion = DiffusionConfig(num_timesteps=200, beta_end=0.1)
    path = tmp_path_factory.mktemp("eval")
    fastddpm.save_pretrained(network, path / "model")
    save_classifier(path / "c.safetensors", Classifier(10))
    return path


@pytest.fixture
def command(folder: Path) -> list[str]:
    options = ["--model", str(folder / "model"), "--classifier", str(folder / "c.safetensors"), "--data", "digits8x8"]
    return ["eval", *options, "--samples", str(SAMPLES), "--steps", "2", "--batch", "6", "--device", "cpu"]


@pytest.fixture(scope="module")
def evaluated(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with two guidance weights."""
    out = tmp_path_factory.mktemp("run") / "out"
    options = ["--model", str(folder / "model"), "--classifier", str(folder / "c.safetensors"), "--data", "digits8x8"]
    size = ["--samples", str(SAMPLES), "--steps", "2", "--guidance", "2,1", "--device", "cpu"]
    assert main(["eval", *options, *size, "--bits-per-dim", "--outdir", str(out), "--quiet"]) == 0
    return out


def numbers(out: Path) -> dict[str, Any]:
    """The report without what depends on the clock."""
    found = json.loads((out / "eval.json").read_text())
    for result in found["results"]:
        assert result.pop("images_per_second") > 0
    return found


def test_eval_reports_samples_beside_real_images(evaluated: Path) -> None:
    found = numbers(evaluated)
    assert [result["run"]["guidance"] for result in found["results"]] == [2.0, 1.0]
    for result in found["results"]:
        assert result["compared"] == SAMPLES
        assert result["notes"] == []
        for name in ROWS:
            for estimate in (result[name]["samples"], result[name]["real"]):
                assert estimate["low"] <= estimate["value"] <= estimate["high"], name
        assert set(result["accuracy_by_class"]) == set("0123456789")
        assert result["accuracy"]["samples"]["value"] == pytest.approx(
            np.mean(list(result["accuracy_by_class"].values()))
        )
        # Noise is no copy of a digit.
        assert result["nearest"]["ratio"]["low"] > 1
        assert result["near"] == 0


def test_eval_measures_the_samples_that_it_writes(evaluated: Path, folder: Path) -> None:
    with np.load(evaluated / "guidance-1" / "samples.npz") as arrays:
        assert arrays["seeds"].tolist() == list(range(SAMPLES))
        assert arrays["class_labels"].tolist() == [k % 10 for k in range(SAMPLES)]
        drawn = images.to_uint8(torch.from_numpy(arrays["x"]))
    with Image.open(evaluated / "guidance-1" / "samples.png") as picture:
        assert torch.equal(torch.from_numpy(np.array(picture)), images.make_grid(drawn, 10)[0])


def test_eval_bounds_the_likelihood_of_real_images(evaluated: Path, folder: Path) -> None:
    held_out = digits8x8("test")
    k = torch.arange(SAMPLES) * len(held_out) // SAMPLES
    assert held_out.labels is not None
    model = fastddpm.load(folder / "model")
    assert model.diffusion is not None
    expected = bits_per_dim(model, held_out.x_0(k), model.diffusion, class_labels=held_out.labels[k])
    found = numbers(evaluated)["bits_per_dim"]
    assert set(found) == {"held_out", "train"}
    assert found["held_out"]["value"] == pytest.approx(expected.mean)
    assert found["held_out"]["high"] == pytest.approx(expected.mean + 1.96 * expected.standard_error, rel=1e-4)


def test_eval_plots_guidance_weights(evaluated: Path) -> None:
    with Image.open(evaluated / "guidance.png") as picture:
        assert picture.width == 800


def test_text_report_reads_at_80_columns(evaluated: Path) -> None:
    found = json.loads((evaluated / "eval.json").read_text())
    found["model"] = "digits"
    found["results"][0] |= {"fid": 12.3, "notes": ["something that takes very many words to explain to anybody " * 3]}
    lines = report.text_report(found).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("Bits per dimension, at most: held-out") for line in lines) == 1
    for title in (*report.TITLES.values(), "FID 12.30", "Not measured: something"):
        assert sum(line.startswith(title) for line in lines) == (1 if "FID" in title or "Not" in title else 2)


def test_eval_prints_the_report(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--outdir", str(tmp_path / "a")]) == 0
    out, err = capsys.readouterr()
    assert "Frechet distance" in out
    assert err == ""
    assert not (tmp_path / "a" / "guidance.png").exists()
    # Nothing is left to draw; the speed is remembered.
    assert main([*command, "--outdir", str(tmp_path / "a"), "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "a" / "eval.json").read_text())


def test_eval_that_is_killed_and_resumed_gives_the_same_numbers(command: list[str], tmp_path: Path) -> None:
    command = [*command, "--steps", "25", "--batch", "2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*command, "--outdir", str(whole), "--quiet"]) == 0
    arguments = [sys.executable, "-m", "fastddpm", *command, "--outdir", str(cut)]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while len(list(cut.glob("*/part-*.npz"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, err
    assert 2 <= len(list(cut.glob("*/part-*.npz"))) < SAMPLES // 2
    assert not (cut / "eval.json").exists()
    assert main([*command, "--outdir", str(cut), "--resume", "--quiet"]) == 0
    assert numbers(cut) == numbers(whole)
    name = "guidance-1/samples.npz"
    assert (cut / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ([], "exists already; use --resume"),
        (["--resume", "--steps", "3"], "steps was 2 and is 3"),
        (["--resume", "--samples", "30"], "seeds was '0-19' and is '0-29'"),
    ],
    ids=["neither", "steps", "samples"],
)
def test_eval_refuses_to_mix_runs(
    command: list[str], evaluated: Path, capsys: pytest.CaptureFixture[str], changed: list[str], message: str
) -> None:
    assert main([*command, *changed, "--batch", "20", "--outdir", str(evaluated)]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--data", "nowhere"], "no data at 'nowhere'"),
        (["--classifier", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--sampler", "plms"], "unknown sampler"),
        (["--model", "no-such-model"], "no-such-model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_eval_errors_are_one_line(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    assert main([*command, *extra, "--outdir", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "extra", [["--samples", "0"], ["--guidance", "much"], ["--guidance", "1,nan"], ["--resume", "--overwrite"]]
)
def test_eval_usage_errors_exit_with_2(command: list[str], extra: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, *extra])
    assert caught.value.code == 2


@pytest.fixture
def own_images(command: list[str], tmp_path: Path) -> list[str]:
    """The command with a folder of images, of any size and no classes."""
    (tmp_path / "pictures").mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(5):
        pixels = torch.randint(0, 256, (1, 12, 10), dtype=torch.uint8, generator=generator)
        images.save_png(tmp_path / "pictures" / f"{i}.png", pixels)
    at = command.index("--classifier")
    del command[at : at + 2]
    return [*command, "--data", str(tmp_path / "pictures"), "--outdir", str(tmp_path / "out"), "--json"]


def test_eval_of_own_images_reports_what_needs_no_classifier(
    own_images: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fid.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(own_images) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("fastddpm: reading ")
    assert "fastddpm: measuring ...\n" in captured.err
    (result,) = json.loads(captured.out)["results"]
    assert result["compared"] == 5
    assert [name for name in ROWS if name in result] == ["nearest", "diversity"]
    assert result["fid"] is None
    assert "there is no classifier of these images" in result["notes"][0]
    assert "pip install torch-fidelity" in result["notes"][1]


def test_eval_of_own_images_takes_no_classifier(own_images: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*own_images, "--classifier", "c.safetensors"]) == 1
    assert "nothing is held out" in capsys.readouterr().err


@pytest.fixture
def torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A torch-fidelity that counts what it is given, and the place of its weights, which are not there."""

    def calculate_metrics(**arguments: Any) -> dict[str, float]:
        assert arguments["feature_extractor_weights_path"] == str(fid.weights_path())
        for pictures in (arguments["input1"], arguments["input2"]):
            assert pictures[0].dtype == torch.uint8
            assert pictures[0].shape == (3, 8, 8)
        return {"frechet_inception_distance": 100.0 * len(arguments["input1"]) + len(arguments["input2"])}

    module = types.ModuleType("torch_fidelity")
    module.calculate_metrics = calculate_metrics  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", module)
    monkeypatch.setattr(fid.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(fid, "SHA256", "a" * 64)
    monkeypatch.setattr(fid, "sha256", lambda path: path.read_text() * 64)
    return fid.weights_path()


def test_eval_downloads_the_weights_of_fid_only_when_told(
    own_images: list[str], torch_fidelity: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, progress: Path(path).write_text("a"))
    assert main(own_images) == 0
    assert "--download fetches it" in json.loads(capsys.readouterr().out)["results"][0]["notes"][-1]
    assert not torch_fidelity.exists()
    assert main([*own_images, "--resume", "--download"]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["fid"] == 100 * SAMPLES + 5


def test_eval_gives_fid_no_weights_but_its_own(
    own_images: list[str], torch_fidelity: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch_fidelity.parent.mkdir(parents=True)
    torch_fidelity.write_text("b")
    assert main(own_images) == 1
    assert "has the SHA-256 bbb" in capsys.readouterr().err


def test_card_takes_the_numbers_between_its_markers(evaluated: Path, tmp_path: Path) -> None:
    page = tmp_path / "digits" / "README.md"
    page.parent.mkdir()
    page.write_text(f"# A card\n\n{card.BEGIN}\nold\n{card.END}\n\nThe end.\n")
    (tmp_path / LOG).write_text('{"step": 10, "loss": 0.5, "lr": 0.001}\n')
    command = [str(page), str(evaluated), "--images", str(tmp_path / "images")]
    card.main([*command, "--training", str(tmp_path)])
    card.main(command)
    text = page.read_text()
    assert text.startswith("# A card\n\n<!-- numbers -->\n| sampler | N |")
    assert text.endswith("<!-- /numbers -->\n\nThe end.\n")
    assert "| fast, 2 steps, guidance 2 | 20 | " in text
    assert "old" not in text
    assert "Bits per dimension, at most: held-out images" in text
    for kind in ("samples", "loss", "guidance"):
        assert f"](../images/digits-{kind}.png)" in text
    found = json.loads((evaluated / "eval.json").read_text())["results"][1]
    assert report.show(found["frechet"]["ratio"]) in text
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [
        "digits-guidance.png",
        "digits-loss.png",
        "digits-samples.png",
    ]


def test_card_of_the_digits_is_about_the_weights_that_ship() -> None:
    page = Path(fastddpm.__file__).parent / "models" / "digits" / "README.md"
    assert f"Weights {weights_digest(fastddpm.load('digits'))[:16]}." in page.read_text(encoding="utf-8")


def test_card_refuses_other_weights(evaluated: Path) -> None:
    results = json.loads((evaluated / "eval.json").read_text())["results"]
    results[0]["run"]["weights"] = "other"
    with pytest.raises(ValueError, match="2 models with different weights"):
        card.numbers(results)
