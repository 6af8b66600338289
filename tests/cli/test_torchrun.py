"""Commands in several processes: what they write is what one process writes, whoever dies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastddpm
from fastddpm import DiffusionConfig
from fastddpm.cli import main
from tests.tiny import tiny_unet
from tests.torchrun import torchrun

# Of the first two processes, rank 1 dies by SIGKILL between the writing of its second file and its renaming.
PROGRAM = """
import os, signal, sys
from fastddpm.cli import main
from fastddpm.files import atomic

replace, files = os.replace, []

def dying(source, target):
    files.append(target)
    if len(files) == 2 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

atomic.os.replace = dying
sys.exit(main(sys.argv[1:]))
"""


def test_sample_survives_the_death_of_a_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, program = tmp_path / "model", tmp_path / "program.py"
    network = tiny_unet(num_class_embeds=4, null_class=3)
    network.diffusion = DiffusionConfig(num_timesteps=200, beta_end=0.1)
    fastddpm.save_pretrained(network, model)
    program.write_text(PROGRAM)
    arguments = ["sample", "--model", str(model), "--device", "cpu", "--steps", "12", "--seeds", "0-22", "--batch", "2"]
    arguments += ["--format", "npz", "--grid", "--resume", "--outdir"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main([*arguments, str(tmp_path / "alone")]) == 0
    torch.set_num_threads(threads)
    capsys.readouterr()
    ended = torchrun(program, *arguments, str(tmp_path / "together"), restarts=1)
    assert ended.returncode == 0, ended.stderr
    assert "Signal 9" in ended.stderr or "exitcode: -9" in ended.stderr
    assert " images, 12 steps, " in ended.stdout
    assert ", 2 processes, cpu, " in ended.stdout
    alone, together = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("alone", "together")
    )
    assert sorted(together) == ["grid.png", "manifest.json", "samples.npz"]
    assert together == alone
