"""``fastddpm sample``: files, resumption, refusals and exit codes."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fastddpm
from fastddpm import DiffusionConfig
from fastddpm.cli import main
from fastddpm.files import images
from fastddpm.files.run_folder import RunFolder
from fastddpm.sampling import outputs
from fastddpm.sampling.step import StaticStep
from tests.tiny import tiny_unet

pytestmark = pytest.mark.usefixtures("still_generators")

STEPS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = tiny_unet(num_class_embeds=4, null_class=3)
    network.diffusion = DiffusionConfig(num_timesteps=200, beta_end=0.1)
    directory = tmp_path_factory.mktemp("model")
    fastddpm.save_pretrained(network, directory)
    return directory


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Any:
    """Run the command on the small model; `out` is its directory."""

    def call(*arguments: str, out: Path = tmp_path / "out", steps: int = STEPS) -> int:
        common = ["--model", str(model), "--device", "cpu", "--steps", str(steps), "--outdir", str(out)]
        return main(["sample", *common, *arguments])

    return call


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def pixels(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image))


def test_sample_writes_one_png_per_seed_and_the_grid(
    run: Any, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--seeds", "0-3,20", "--batch", "2", "--grid") == 0
    names = [f"seed-{seed:06d}.png" for seed in (0, 1, 2, 3, 20)]
    assert sorted(contents(tmp_path / "out")) == sorted([*names, "grid.png", "manifest.json"])
    # Batches of 2, 2 and 1; without labels the class is seed % 3, the number of classes besides the null class.
    for batch, labels in (([0, 1], [0, 1]), ([2, 3], [2, 0]), ([20], [2])):
        x = fastddpm.sample(model, seeds=batch, class_labels=labels, steps=STEPS)
        for seed, image in zip(batch, images.to_uint8(x), strict=True):
            assert torch.equal(pixels(tmp_path / "out" / f"seed-{seed:06d}.png"), image[0])
    drawn = torch.stack([pixels(tmp_path / "out" / name)[None] for name in names])
    assert torch.equal(pixels(tmp_path / "out" / "grid.png"), images.make_grid(drawn)[0])
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith("5 images, 3 steps, ")
    assert captured.out.endswith(", cpu, torch, not compiled, seeds 0-3,20\n")
    assert captured.out.count("\n") == 1


def test_sample_writes_one_npz(run: Any, model: Path, tmp_path: Path) -> None:
    assert run("--seeds", "4-6", "--batch", "2", "--format", "npz", "--class", "1,0", "--grid", "--guidance", "2") == 0
    assert sorted(contents(tmp_path / "out")) == ["grid.png", "manifest.json", "samples.npz"]
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        assert arrays["seeds"].tolist() == [4, 5, 6]
        assert arrays["class_labels"].tolist() == [1, 0, 1]
        x = torch.from_numpy(arrays["x"])
    first = fastddpm.sample(model, seeds=[4, 5], class_labels=[1, 0], steps=STEPS, guidance=2.0)
    assert torch.equal(x[:2], first)
    assert x.shape == (3, 1, 8, 8)


def test_json_summary_is_one_object(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--seeds", "1,1,2", "--json", "--class", "none", "--sampler", "ddim", "--dtype", "bfloat16") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["images"] == 2
    assert summary["steps"] == STEPS
    assert summary["seeds"] == "1-2"
    assert summary["device"] == "cpu"
    assert summary["backend"] == "torch"
    assert summary["outdir"] == str(tmp_path / "out")
    assert summary["images_per_second"] > 0


def test_quiet_says_nothing(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--seeds", "1", "--quiet") == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_existing_output_is_refused_unless_told(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--seeds", "0-2") == 0
    before = contents(tmp_path / "out")
    capsys.readouterr()
    assert run("--seeds", "0-2", "--class", "1") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "seed-000000.png exists already; use --resume" in error
    assert contents(tmp_path / "out") == before
    assert run("--seeds", "0-2", "--class", "1", "--overwrite") == 0
    after = contents(tmp_path / "out")
    assert set(after) == set(before)
    assert after["seed-000000.png"] != before["seed-000000.png"]


@pytest.mark.parametrize("file_format", ["png", "npz"])
def test_resume_completes_with_identical_bytes(
    run: Any, tmp_path: Path, file_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--seeds", "0-6", "--batch", "3", "--format", file_format, "--grid")
    assert run(*arguments) == 0
    whole = contents(tmp_path / "out")
    save, saved = outputs.Outputs.save, []

    def interrupt_after_one(self: outputs.Outputs, i: int, x: torch.Tensor) -> None:
        if saved:
            raise KeyboardInterrupt
        saved.append(i)
        save(self, i, x)

    monkeypatch.setattr(outputs.Outputs, "save", interrupt_after_one)
    assert run(*arguments, out=tmp_path / "cut") == 130
    monkeypatch.undo()
    finished = contents(tmp_path / "cut")
    assert 1 < len(finished) < len(whole)
    # What a killed process leaves of a file: ignored, and removed.
    leftover = tmp_path / "cut" / f".{'seed-000004.png' if file_format == 'png' else 'part-00001.npz'}.123.tmp"
    leftover.write_bytes(b"half")
    foreign = tmp_path / "cut" / ".notes.txt.1.tmp"
    foreign.write_bytes(b"somebody's")
    assert run(*arguments, "--resume", out=tmp_path / "cut") == 0
    foreign.unlink()
    assert contents(tmp_path / "cut") == whole
    assert run(*arguments, "--resume", out=tmp_path / "cut") == 0
    assert contents(tmp_path / "cut") == whole


def test_resume_replaces_a_missing_file_of_a_finished_batch(run: Any, tmp_path: Path) -> None:
    arguments = ("--seeds", "0-4", "--batch", "3")
    assert run(*arguments) == 0
    whole = contents(tmp_path / "out")
    (tmp_path / "out" / "seed-000001.png").unlink()
    assert run(*arguments, "--resume") == 0
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--seeds", "0-3"), "seeds was '0-2' and is '0-3'"),
        (("--guidance", "2"), "guidance was 1.0 and is 2.0"),
        (("--batch", "2"), "batch was 3 and is 2"),
        (("--sampler", "ddim"), "sampler was 'fast' and is 'ddim'"),
        (("--class", "1"), "classes was None and is [1]"),
        (("--dtype", "bfloat16"), "dtype was 'float32' and is 'bfloat16'"),
    ],
)
def test_resume_refuses_another_run(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: tuple[str, ...], message: str
) -> None:
    assert run("--seeds", "0-2") == 0
    before = contents(tmp_path / "out")
    assert run("--seeds", "0-2", *changed, "--resume") == 1
    assert message in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_resume_refuses_other_weights(
    run: Any, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--seeds", "0") == 0
    other = fastddpm.load(model)
    with torch.no_grad():
        other.conv_out.bias.add_(0.1)
    fastddpm.save_pretrained(other, tmp_path / "other")
    assert run("--seeds", "0", "--resume", "--model", str(tmp_path / "other")) == 1
    assert "weights was" in capsys.readouterr().err


def test_overwrite_that_is_interrupted_leaves_no_old_file_to_resume_with(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("--seeds", "0-2") == 0

    def interrupt(self: outputs.Outputs, i: int, x: torch.Tensor) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(outputs.Outputs, "save", interrupt)
    assert run("--seeds", "0-2", "--class", "1", "--overwrite") == 130
    assert list(contents(tmp_path / "out")) == ["manifest.json"]


def test_output_that_cannot_be_written_is_one_line(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    assert run("--seeds", "0", out=tmp_path / "file") == 1
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert run("--seeds", "0", out=tmp_path / "file" / "below") == 1

    def full(path: Path, image: torch.Tensor) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(images, "save_png", full)
    assert run("--seeds", "0") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "No space left on device" in lines[2]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that not even root can write to")
@pytest.mark.parametrize("out", ["/proc/run", "/proc"])
def test_read_only_directory_is_one_line(run: Any, capsys: pytest.CaptureFixture[str], out: str) -> None:
    assert run("--seeds", "0", out=Path(out)) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"fastddpm: error: {out}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seeds", "3-1"],
        ["--seeds", "x"],
        ["--seeds", str(2**64)],
        ["--steps", "0"],
        ["--batch", "-1"],
        ["--class", "a"],
        ["--format", "gif"],
        ["--resume", "--overwrite"],
    ],
    ids=" ".join,
)
def test_usage_errors_exit_with_2(run: Any, tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class", "4"], "class label 4"),
        (["--sampler", "plms"], "unknown sampler"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--backend", "triton"], "triton"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "gpu"], "unknown device 'gpu'; choose cpu"),
        (["--guidance", "nan"], "guidance must be a finite number"),
        (["--sampler", "ddpm", "--eta", "1"], "--eta: the sampler ddpm has no such option"),
        (["--eta", "1"], "--eta: the sampler fast has no such option"),
        (["--spacing", "traling"], "unknown spacing 'traling'"),
        (["--strength", "0.5"], "--strength begins part-way: give --init-image"),
        (["--mask", "mask.png"], "--mask needs --init-image"),
        (["--jump-length", "3", "--sampler", "ddpm"], "give --mask, or leave them out"),
        (["--condition", "small.npy"], "--condition: the model sees nothing beside x"),
    ],
)
def test_errors_are_one_line_and_leave_no_output(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run("--seeds", "0", *arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error.lower()
    assert not list((tmp_path / "out").glob("*.png"))


def test_sample_that_is_not_finite_is_an_error(
    run: Any, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hot = fastddpm.load(model)
    with torch.no_grad():
        # Finite in the file, and infinite after the first convolution; a GroupNorm makes it NaN.
        hot.conv_in.weight.fill_(3e38)
    fastddpm.save_pretrained(hot, tmp_path / "hot")
    assert run("--seeds", "5-6", "--model", str(tmp_path / "hot")) == 1
    assert "the sample of seed 5 is not finite (2 of 2" in capsys.readouterr().err
    assert list(contents(tmp_path / "out")) == ["manifest.json"]


def test_local_rank_beyond_the_devices_is_an_error(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "99")
    assert run("--seeds", "0", "--device", "cuda") == 1
    assert "cuda:99" in capsys.readouterr().err


def test_two_runs_do_not_share_a_directory(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunFolder(tmp_path / "out", []).locked():
        assert run("--seeds", "0") == 1
    assert "another run is writing" in capsys.readouterr().err
    assert run("--seeds", "0") == 0


def start(model: Path, out: Path) -> subprocess.Popen[str]:
    """Start a run of seven files in another process, and wait for the first of them."""
    arguments = ["--model", str(model), "--seeds", "0-5", "--batch", "1", "--steps", "60", "--outdir", str(out)]
    command = [sys.executable, "-m", "fastddpm", "sample", "--device", "cpu", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(out.glob("*.png")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_signal_keeps_finished_files_and_resume_completes(
    run: Any, model: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    process = start(model, tmp_path / "out")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert out == ""
    assert "Traceback" not in err
    # None where it came between two batches.
    assert len(list((tmp_path / "out").glob("state-*"))) == err.count("of 60, state-")
    assert ("finished files" in err) == (number != signal.SIGKILL)
    finished = {name: data for name, data in contents(tmp_path / "out").items() if not name.startswith("state-")}
    assert 2 <= len(finished) < 7
    for name in finished:
        if name.endswith(".png"):
            assert pixels(tmp_path / "out" / name).shape == (8, 8)
    assert run("--seeds", "0-5", "--batch", "1", "--resume", steps=60) == 0
    resumed = contents(tmp_path / "out")
    assert len(resumed) == 7
    whole = {name: data for name, data in finished.items() if not name.endswith(".tmp")}
    assert {name: resumed[name] for name in whole} == whole


@pytest.mark.parametrize("file_format", ["png", "npz"])
def test_signals_at_every_step_leave_the_bytes_of_one_run(
    run: Any, tmp_path: Path, file_format: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "image.png"
    images.save_png(image, torch.arange(64, dtype=torch.uint8).reshape(1, 8, 8) * 3)
    edits = ["--init-image", str(image), "--mask", str(image), "--class", "1", "--guidance", "2"]
    arguments = ["--seeds", "0-4", "--batch", "3", "--sampler", "ddpm", "--format", file_format, *edits]
    assert run(*arguments) == 0
    capsys.readouterr()
    next_row, signals = StaticStep.next_row, itertools.cycle([signal.SIGTERM, signal.SIGINT])

    def interrupted(step: StaticStep) -> None:
        next_row(step)
        signal.raise_signal(next(signals))

    monkeypatch.setattr(StaticStep, "next_row", interrupted)
    statuses, cut = [run(*arguments, out=tmp_path / "cut")], tmp_path / "cut"
    assert len(contents(cut)) == 2  # the manifest and the state
    while statuses[-1]:
        statuses.append(run(*arguments, "--resume", out=cut))
    # Once for each step of both batches, and once more where a batch was whole but not yet in its files.
    assert statuses == [143, 130] * (len(statuses) // 2) + [0]
    assert len(statuses) == 2 * STEPS + 1
    assert f"finished files and step 1 of {STEPS}, state-00001.safetensors, are kept" in capsys.readouterr().err
    assert contents(cut) == contents(tmp_path / "out")


def test_samples_of_any_channels_are_saved_as_the_message_says(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    network = tiny_unet(in_channels=7, out_channels=7, sample_size=(16, 24))
    network.diffusion = DiffusionConfig(num_timesteps=200, beta_end=0.1)
    fastddpm.save_pretrained(network, tmp_path / "model")
    out = tmp_path / "out"
    command = ["sample", "--model", str(tmp_path / "model"), "--steps", "3", "--seeds", "4,9", "--outdir", str(out)]
    for wrong in ([], ["--format", "npz", "--grid"]):
        assert main([*command, *wrong]) == 1
        assert "(7, 16, 24) are no images; use --format npz, without --grid" in capsys.readouterr().err
    assert main([*command, "--format", "npz"]) == 0
    expected = fastddpm.sample(network, seeds=[4, 9], steps=3)
    assert torch.equal(torch.from_numpy(np.load(out / "samples.npz")["x"]), expected)


def test_samples_start_from_a_file(run: Any, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    x_T = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = fastddpm.sample(model, x_T=x_T, seeds=[0, 1, 2], steps=STEPS, sampler="ddpm")
    np.save(tmp_path / "a.npy", x_T.double().numpy())
    np.savez(tmp_path / "b.npz", x_T=x_T.numpy(), more=np.zeros(1))
    save_file({"noise": x_T}, tmp_path / "c.safetensors")
    for name in ("a.npy", "b.npz", "c.safetensors"):
        out = tmp_path / name[0]
        assert run("--x-T", str(tmp_path / name), "--sampler", "ddpm", "--format", "npz", out=out) == 0
        assert torch.equal(torch.from_numpy(np.load(out / "samples.npz")["x"]), expected)
    # What they start from decides their bytes.
    again = ["--sampler", "ddpm", "--format", "npz", "--resume"]
    np.save(tmp_path / "a.npy", -x_T.numpy())
    assert run("--x-T", str(tmp_path / "a.npy"), *again, out=tmp_path / "a") == 1
    assert run("--seeds", "0-2", *again, out=tmp_path / "b") == 1
    assert capsys.readouterr().err.count("x_T was") == 2


def test_a_start_that_does_not_fit_is_refused(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "x.npy"
    for values, message in (
        (np.zeros((3, 1, 8, 8)), "x_T holds 3 samples, and 2 are drawn"),
        (np.zeros((2, 3, 8, 8)), "x_T must have shape [B, 1, 8, 8], got [2, 3, 8, 8]"),
        (np.full((2, 1, 8, 8), np.nan), "x_T holds NaN"),
        (np.array(["text"]), "x_T: holds <U4, not numbers"),
    ):
        np.save(path, values)
        assert run("--seeds", "0,1", "--x-T", str(path)) == 1
        assert message in capsys.readouterr().err
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "x.safetensors")
    np.savez(tmp_path / "x.npz", a=np.zeros(1), b=np.zeros(1))
    os.mkfifo(tmp_path / "fifo.npy")
    for name, message in (("x.safetensors", "no tensor called x_T"), ("x.npz", "no array called x_T")):
        assert run("--x-T", str(tmp_path / name)) == 1
        assert message in capsys.readouterr().err
    assert run("--x-T", str(tmp_path / "fifo.npy")) == 1
    assert "not a regular file" in capsys.readouterr().err


def test_an_image_is_begun_from_and_kept_outside_of_a_mask(run: Any, model: Path, tmp_path: Path) -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(pixels).save(tmp_path / "image.png")
    Image.fromarray(np.repeat([0, 255], 32).astype(np.uint8).reshape(8, 8)).save(tmp_path / "mask.png")
    files = ["--init-image", str(tmp_path / "image.png"), "--mask", str(tmp_path / "mask.png")]
    assert run(*files, "--seeds", "4,7", "--sampler", "ddpm", "--strength", "0.5", "--jump-length", "1", steps=4) == 0
    drawn = np.stack([np.array(Image.open(tmp_path / "out" / f"seed-{seed:06d}.png")) for seed in (4, 7)])
    assert (drawn[:, :4] == pixels[:4]).all()
    assert (drawn[0, 4:] != drawn[1, 4:]).any()
    x_0 = torch.from_numpy(pixels).float()[None, None] / 127.5 - 1
    expected = fastddpm.sample(
        model,
        seeds=[4, 7],
        init=x_0,
        mask=torch.arange(8)[:, None] >= 4,
        strength=0.5,
        sampler="ddpm",
        steps=4,
        sampler_options={"jump_length": 1},
        compile=False,
    )
    assert (images.to_uint8(expected).numpy()[:, 0] == drawn).all()


def test_an_image_of_another_size_is_refused(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.zeros((5, 8), dtype=np.uint8)).save(tmp_path / "image.png")
    assert run("--init-image", str(tmp_path / "image.png")) == 1
    assert "samples are [1, 8, 8]; resize" in capsys.readouterr().err
