"""``fastddpm train`` as a user runs it: exit codes, one-line errors, and settings remembered by --resume."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastddpm
from fastddpm.cli import main
from fastddpm.machine import progress
from fastddpm.sampling.outputs import read_x
from fastddpm.training import trainer as training
from fastddpm.training.checkpoint import CHECKPOINT, read_state
from fastddpm.training.folder import LOG, SETTINGS
from fastddpm.unet.load import load
from tests.training.train_cases import TINY, at_step

pytestmark = pytest.mark.usefixtures("still_generators")

NAMES = (("loss", "loss"), ("learning rate", "lr"))


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Arguments of a run that takes a second."""
    np.savez(tmp_path / "d.npz", images=np.zeros((32, 8, 8), np.uint8), labels=np.arange(32) % 10)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    options = ["--model", str(tmp_path / "tiny.json"), "--batch", "8", "--log-every", "1", "--save-every", "2"]
    return ["train", "--data", str(tmp_path / "d.npz"), "--outdir", str(tmp_path / "run"), *options]


def test_train_takes_arrays_of_two_channels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "d.npy", np.random.default_rng(0).integers(0, 256, (16, 2, 8, 8), dtype=np.uint8))
    (tmp_path / "tiny.json").write_text(
        json.dumps({**TINY, "in_channels": 2, "out_channels": 2, "num_class_embeds": None, "null_class": None})
    )
    options = ["--model", str(tmp_path / "tiny.json"), "--batch", "8", "--steps", "1", "--quiet"]
    command = ["train", "--data", str(tmp_path / "d.npy"), "--outdir", str(tmp_path / "run"), *options]
    assert main([*command, "--sample-every", "1"]) == 0, capsys.readouterr().err
    assert load(tmp_path / "run").config.in_channels == 2
    with Image.open(tmp_path / "run" / "samples-0000001.png") as grid:
        # Sixteen samples, their two channels side by side: 8 columns of 8 pixels, eight times enlarged.
        assert grid.size == (8 * 66 + 2, 4 * 66 + 2)


def test_a_condition_goes_from_the_data_to_the_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng, run = np.random.default_rng(0), str(tmp_path / "run")
    images, condition = (rng.integers(0, 256, (16, n, 8, 8), dtype=np.uint8) for n in (1, 2))
    np.savez(tmp_path / "d.npz", images=images, condition=condition)
    (tmp_path / "tiny.json").write_text(
        json.dumps({**TINY, "in_channels": 3, "num_class_embeds": None, "null_class": None})
    )
    options = ["--model", str(tmp_path / "tiny.json"), "--batch", "8", "--steps", "1", "--sample-every", "1"]
    assert main(["train", "--data", str(tmp_path / "d.npz"), "--outdir", run, "--quiet", *options]) == 0
    np.save(tmp_path / "c.npy", condition[:3])
    sample = [
        "sample",
        "--model",
        run,
        "--seeds",
        "0-2",
        "--steps",
        "3",
        "--format",
        "npz",
        "--quiet",
        "--guidance",
        "2",
    ]
    sample += ["--outdir", str(tmp_path / "drawn")]
    assert main(sample) == 1
    assert "the model sees 2 channels beside x: give them as --condition FILE" in capsys.readouterr().err
    given = [*sample, "--guidance-interval", "100", "900", "--guidance-rescale", "0.5", "--condition"]
    assert main([*given, str(tmp_path / "c.npy")]) == 0, capsys.readouterr().err
    beside = torch.from_numpy(condition[:3]) / 127.5 - 1
    expected = fastddpm.sample(
        run,
        seeds=range(3),
        steps=3,
        guidance=2.0,
        guidance_interval=(100, 900),
        guidance_rescale=0.5,
        model_kwargs={"condition": beside},
        null_kwargs={"condition": 0.0},
    )
    assert np.array_equal(read_x(tmp_path / "drawn" / "samples.npz"), expected.numpy())
    for other in (condition[3:6], condition[:2]):
        np.save(tmp_path / "c.npy", other)
        assert main([*given, str(tmp_path / "c.npy"), "--resume"]) == 1
        said = capsys.readouterr().err
        assert ("condition" in said and "differ" in said) or "2 conditions for 3 samples" in said
    np.save(tmp_path / "c.npy", condition[:3])
    measured = ["eval", "--model", run, "--data", str(tmp_path / "d.npz"), "--samples", "3", "--steps", "3", "--json"]
    measured += ["--guidance", "2", "--outdir", str(tmp_path / "eval"), "--condition", str(tmp_path / "c.npy")]
    assert main(measured) == 0, capsys.readouterr().err
    drawn = fastddpm.sample(
        run,
        seeds=range(3),
        steps=3,
        guidance=2.0,
        model_kwargs={"condition": beside},
        null_kwargs={"condition": 0.0},
    )
    assert np.array_equal(read_x(tmp_path / "eval" / "guidance-2" / "samples.npz"), drawn.numpy())
    profiled = ["profile", "--model", run, "--batch", "2", "--steps", "2", "--compile", "off", "--json"]
    capsys.readouterr()
    assert main([*profiled, "--trace", str(tmp_path / "trace.json")]) == 0
    assert json.loads(capsys.readouterr().out)["unet"]["calls"] == 2
    assert main(["compile", "--model", run, "--shape", "1,8,8"]) == 1
    assert "--shape has C = 1, and the network takes 3 channels" in capsys.readouterr().err


def test_train_writes_a_model_and_says_so(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--steps", "4"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("4 steps, loss ")
    assert err == ""
    expected = {
        CHECKPOINT,
        LOG,
        SETTINGS,
        "config.json",
        "scheduler_config.json",
        "diffusion_pytorch_model.safetensors",
        "raw",
    }
    assert {p.name for p in (tmp_path / "run").iterdir()} == expected


def test_train_prints_a_line_now_and_then_where_there_is_no_terminal(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    assert main([*command, "--steps", "2"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(", loss ")[0] for line in lines] == ["training: step 1 of 2", "training: step 2 of 2"]
    assert main([*command, "--steps", "4", "--resume", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_train_says_on_a_terminal_that_it_reads(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main([*command, "--steps", "1"]) == 0
    assert capsys.readouterr().err.startswith("fastddpm: reading ")


def test_train_resumes_with_the_settings_of_the_run(command: list[str], tmp_path: Path) -> None:
    assert main([*command, "--steps", "4", "--lr", "0.01", "--quiet"]) == 0
    assert main(["train", "--out", str(tmp_path / "run"), "--resume", "--steps", "6", "--quiet"]) == 0
    settings = json.loads((tmp_path / "run" / SETTINGS).read_text())["settings"]
    assert (settings["lr"], settings["steps"], settings["batch"]) == (0.01, 6, 8)
    assert read_state(tmp_path / "run")["step"] == 6


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        pytest.param(["--steps", "0"], "steps must be an integer >= 1, got 0", id="steps"),
        pytest.param(["--lr", "nan"], "lr must be a finite number >= 0, got nan", id="lr"),
        pytest.param(["--batch", "64"], "a batch of 64 is more than the 32 images", id="batch"),
        pytest.param(["--data", "nowhere"], "no data at 'nowhere'", id="data"),
        pytest.param(["--model", "nowhere.json"], "nowhere.json", id="model"),
        pytest.param(["--model", "bad.json"], "in_channels must be an integer", id="configuration"),
        pytest.param(["--model", "rgb.json"], "rgb.json: 3 channels in and 1 out", id="channels"),
        pytest.param(["--schedule", "cosin"], "unknown beta_schedule 'cosin'", id="schedule"),
        pytest.param(["--tensorboard"], "pip install tensorboard", id="tensorboard"),
        pytest.param(["--resume", "--overwrite"], "exclude each other", id="contradiction"),
        pytest.param(["--init", "digits"], "init and model exclude each other", id="two-networks"),
        pytest.param(["--device", "cuda:99"], "cuda:99", id="device"),
        pytest.param(["--device", "gpu"], "unknown device 'gpu'; choose cpu", id="no-device"),
    ],
)
def test_train_reports_an_error_in_one_line(
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    extra: list[str],
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    (tmp_path / "bad.json").write_text('{"in_channels": "one"}')
    (tmp_path / "rgb.json").write_text(json.dumps({**TINY, "in_channels": 3}))
    monkeypatch.chdir(tmp_path)
    assert main([*command, *extra]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    # Nothing that would make the corrected command fail; a manifest alone does not.
    assert {path.name for path in tmp_path.glob("run/*")} <= {SETTINGS}
    assert "--tensorboard" in extra or not (tmp_path / "run").exists()


def test_train_writes_tensorboard_scalars_when_installed(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert (folder, purge_step) == (str(tmp_path / "run"), 1)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, step, value))

        def close(self) -> None:
            written.append(("closed", 0, 0.0))

    written: list[tuple[str, int, float]] = []
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    assert main([*command, "--steps", "2", "--tensorboard", "--quiet"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / LOG).read_text().splitlines()]
    expected = [(name, line["step"], line[key]) for line in lines for name, key in NAMES]
    assert written == [*expected, ("closed", 0, 0.0)]


def test_train_refuses_a_file_as_folder(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("occupied")
    assert main(command) == 1
    assert "is a file" in capsys.readouterr().err
    assert (tmp_path / "run").read_text() == "occupied"


def test_train_reports_a_full_disk_in_one_line(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, *rest: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / CHECKPOINT))

    assert main([*command, "--steps", "2", "--quiet"]) == 0
    before = (tmp_path / "run" / CHECKPOINT).read_bytes()
    monkeypatch.setattr(training, "save_checkpoint", full)
    assert main(["train", "--out", str(tmp_path / "run"), "--resume", "--steps", "4"]) == 1
    err = capsys.readouterr().err
    assert "No space left on device" in err
    assert err.count("\n") == 1
    assert (tmp_path / "run" / CHECKPOINT).read_bytes() == before


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that not even root can write to")
def test_train_reports_a_read_only_folder_in_one_line(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--out", "/proc/run"]) == 1
    err = capsys.readouterr().err
    assert "/proc/run" in err
    assert err.count("\n") == 1


def test_train_needs_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--out", str(tmp_path / "run")]) == 1
    assert "give --data" in capsys.readouterr().err


def test_train_usage_error_exits_with_2() -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "--steps", "many", "--out", "x"])
    assert exit_info.value.code == 2


def test_train_exits_with_143_when_terminated(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(2, lambda: signal.raise_signal(signal.SIGTERM), monkeypatch)
    assert main([*command, "--steps", "9"]) == 143
    assert capsys.readouterr().err == "fastddpm: stopped by SIGTERM at step 3; continue with --resume\n"
    assert read_state(tmp_path / "run")["step"] == 3


def test_train_saves_and_exits_with_130_at_ctrl_c(command: list[str], tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "fastddpm", *command, "--steps", "1000000", "--save-every", "0"]
    # Its own group, and SIGINT as a shell's foreground job has it, whatever the test runner's parent did.
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    log = tmp_path / "run" / LOG
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "continue with --resume" in err
    assert "Traceback" not in err
    steps = read_state(tmp_path / "run")["step"]
    assert steps == len(log.read_text().splitlines()) > 0
