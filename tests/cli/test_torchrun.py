"""Commands in several processes: what they write is what one process writes, whoever dies."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import fastddpm
from fastddpm import DiffusionConfig
from fastddpm.cli import main
from fastddpm.data.array_file import array_file
from fastddpm.evaluation import real_images
from fastddpm.evaluation.classifier import Classifier
from tests.evaluation.classifier_training import save_classifier
from tests.tiny import PLAIN, tiny_unet
from tests.torchrun import torchrun

# Of the first two processes, rank 1 dies by SIGKILL between the writing of its first part and its renaming, and rank 0
# waits for that with its own.
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
from fastddpm.cli import main
from fastddpm.data.array_file import array_file
from fastddpm.evaluation import real_images
from fastddpm.files import atomic

replace, sign = os.replace, Path(sys.argv[4], "dying")

def dying(source, target):
    if target.name.startswith("part-") and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if os.environ["RANK"] == "1":
            sign.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        while not sign.exists():
            time.sleep(0.01)
    replace(source, target)

atomic.os.replace = dying
real_images.BUILT_IN["digits8x8"] = lambda split: array_file(Path(sys.argv[2], split + ".npz"))
if any(main(arguments) for arguments in json.loads(sys.argv[1])):
    sys.exit(1)

import numpy as np
import runpy
import torch.distributed as dist
import fastddpm
dist.destroy_process_group, destroy = lambda: None, dist.destroy_process_group
runpy.run_path(sys.argv[3])
for i, n, more in ((0, 7, {"batch_size": 2}), (1, 3, {}), (2, 1, {})):
    x = fastddpm.sample(sys.argv[2], seeds=range(n), steps=3, process_group=dist.group.WORLD, **more)
    np.save(os.path.join(sys.argv[4], f"x{i}-{dist.get_rank()}.npy"), x.numpy())
try:
    fastddpm.sample(sys.argv[2], seeds=[dist.get_rank()], steps=3, process_group=dist.group.WORLD)
except ValueError as error:
    Path(sys.argv[4], f"refused-{dist.get_rank()}").write_text(str(error))
destroy()
"""
SAMPLE = ["sample", "--steps", "12", "--seeds", "0-22", "--batch", "2", "--format", "npz", "--grid"]
TRAIN = ["train", "--batch", "7", "--accumulate", "2", "--dropout", "0", "--warmup", "5", "--decay", "0", "--log-every"]
TRAIN += ["1", "--sample-every", "12", "--timesteps", "50", "--schedule", "cosine"]
EVAL = ["eval", "--steps", "2", "--samples", "300", "--batch", "50", "--data", "digits8x8", "--json"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A network and a classifier that have learned nothing; and images, in place of digits that are slow to import."""
    classes = {"num_class_embeds": 11, "null_class": 10}
    network = tiny_unet(**classes)
    network.diffusion = DiffusionConfig(num_timesteps=200, beta_end=0.1)
    fastddpm.save_pretrained(network, tmp_path / "model")
    (tmp_path / "model" / "net.json").write_text(json.dumps({**PLAIN, **classes}))
    save_classifier(tmp_path / "model" / "c.safetensors", Classifier(10))
    for split in ("train", "test"):
        images = np.random.default_rng(len(split)).integers(0, 256, (300, 8, 8), np.uint8)
        np.savez(tmp_path / "model" / f"{split}.npz", images=images, labels=np.arange(300) % 10)
    return tmp_path / "model"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As torchrun has it: more threads add in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("one_thread")
def test_processes_write_what_one_writes_though_one_is_killed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(real_images.BUILT_IN, "digits8x8", lambda split: array_file(folder / f"{split}.npz"))
    common = ["--device", "cpu", "--resume", "--outdir"]
    train = [*TRAIN, "--data", str(folder / "train.npz"), "--model", str(folder / "net.json"), *common]
    sample = [*SAMPLE, "--model", str(folder), *common]
    judge = [*EVAL, "--model", str(folder), "--classifier", str(folder / "c.safetensors"), *common]

    def paths(name: str) -> dict[str, str]:
        return {command: str(tmp_path / name / command) for command in ("sample", "train", "eval")}

    alone, together = paths("alone"), paths("together")
    for command in ([*sample, alone["sample"]], [*train, alone["train"], "--steps", "18"], [*judge, alone["eval"]]):
        assert main(command) == 0
    capsys.readouterr()
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    commands = [
        [*sample, together["sample"]],
        [*train, together["train"], "--steps", "6"],
        [*train, together["train"], "--steps", "12", "--fsdp"],
        [*judge, together["eval"]],
    ]
    example = Path(__file__).parents[2] / "examples" / "several_processes.py"
    runpy.run_path(str(example))
    said = capsys.readouterr().out.splitlines()
    ended = torchrun(program, json.dumps(commands), str(folder), str(example), str(tmp_path), restarts=1)
    assert ended.returncode == 0, ended.stderr
    assert "exitcode: -9" in ended.stderr
    summary, copied, divided, report, *by_example = ended.stdout.splitlines()
    assert by_example == said
    assert len(said) == 4
    for i, n, more in ((0, 7, {"batch_size": 2}), (1, 3, {"batch_size": 2}), (2, 1, {})):
        x = fastddpm.sample(folder, seeds=range(n), steps=3, **more)
        for rank in (0, 1):
            assert torch.equal(torch.from_numpy(np.load(tmp_path / f"x{i}-{rank}.npy")), x)
    for rank in (0, 1):
        refused = (tmp_path / f"refused-{rank}").read_text()
        assert refused.startswith("rank 1 does not do what rank 0 does: ")
        assert "seeds was [0] and is [1]" in refused
    # Those that were missing after the restart.
    assert 0 < int(summary.partition(" images, 12 steps, ")[0]) <= 23
    assert ", 2 processes, cpu, " in summary

    sampled = contents(tmp_path / "together" / "sample")
    assert sorted(sampled) == ["grid.png", "manifest.json", "samples.npz"]
    assert sampled == contents(tmp_path / "alone" / "sample")
    found, expected = json.loads(report), json.loads((tmp_path / "alone" / "eval" / "eval.json").read_text())
    for result in (*found["results"], *expected["results"]):
        assert result.pop("images_per_second") > 0
    # To the last digit: all sums are of float64 values in the images' order.
    assert found == expected
    assert "frechet" in found["results"][0]

    assert copied.startswith("6 steps, loss ")
    assert divided.startswith("12 steps, loss ")
    # A checkpoint of two processes that have a share each, resumed by one.
    assert main([*train, together["train"], "--steps", "18", "--no-fsdp"]) == 0
    ours, theirs = Path(together["train"]), Path(alone["train"])
    assert contents(ours).keys() == contents(theirs).keys()
    expected = losses(theirs)
    assert len(expected) == 18
    np.testing.assert_allclose(losses(ours), expected, rtol=0, atol=1e-5)
    assert max(expected) - min(expected) > 0.1
    average, weights = fastddpm.load(theirs), fastddpm.load(ours).state_dict()
    for name, weight in average.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-5)
