"""Stop after any step and go on in a new process, to the same bits; states of another run are refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddpm import DiffusionConfig, Sampler
from fastddpm.noise import v1 as noise
from fastddpm.tables.by_name import make_table
from tests.sampling.test_sampler import SHAPE, Pointwise

CONFIG = DiffusionConfig(num_timesteps=50, beta_start=1e-3, beta_end=0.2)
X_0 = torch.linspace(-1, 1, 210).reshape(2, *SHAPE)
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "stochastic": ("ddpm", {"seeds": [1, 2**63]}, {}),
    "history": ("unipc3", {"seeds": [1, 2]}, {}),
    "guided, by row": (
        "ddim",
        {"seed": 7, "batch_size": 2, "class_labels": [0, 2], "guidance": [1.0] * 5 + [2.5] * 15},
        {},
    ),
    "masked": ("ddpm", {"seeds": [1, 2], "known": X_0, "mask": torch.arange(7) < 3}, {}),
    "from data": ("ddpm", {"seeds": [1, 2], "init": X_0, "model_kwargs": {"shift": 0.5}}, {}),
    "tensor beside x": ("dpm++2m", {"seeds": [1, 2], "model_kwargs": {"shift": X_0.clone()}}, {}),
    "self-conditioned": ("ddpm", {"seeds": [1, 2]}, {"self_condition": "shift"}),
}


def sampler(name: str, steps: int = 20, model: Any = None, **options: Any) -> Sampler:
    model = Pointwise(null_class=3).eval() if model is None else model
    return Sampler(model, make_table(name, CONFIG, steps=steps), SHAPE, compile=False, **options)


def resume_all(folder: Path) -> None:
    """In a process of its own: go on from every state in a folder."""
    for run, (name, _, options) in RUNS.items():
        s = sampler(name, **options)
        ends = {path.stem: s.resume(path) for path in sorted((folder / run).glob("*.safetensors"))}
        torch.save(ends, folder / f"{run}.pt")


def test_every_state_goes_on_to_the_same_bits_in_a_new_process(tmp_path: Path) -> None:
    whole: dict[str, Tensor] = {}
    for run, (name, arguments, options) in RUNS.items():
        (tmp_path / run).mkdir()
        s = sampler(name, **options)
        whole[run] = s.sample(**arguments)
        for result in s.steps(**arguments):
            result.state().save(tmp_path / run / f"{result.index}.safetensors")
    code = (
        "import pathlib, sys; from tests.sampling.test_state import resume_all; resume_all(pathlib.Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).resolve().parents[2])
    for run, expected in whole.items():
        ends = torch.load(tmp_path / f"{run}.pt", weights_only=True)
        assert len(ends) == 20
        assert all(torch.equal(x, expected) for x in ends.values()), run


def test_a_state_in_memory_is_not_the_live_buffer() -> None:
    s = sampler("unipc3", steps=4)
    states = [result.state() for result in s.steps(seeds=[1, 2])]
    live: list[Any] = []
    x = s.sample(seeds=[1, 2], callback=lambda result: live.append(result.state()))
    assert all(torch.equal(s.resume(state), x) for state in (*states, *live))
    assert torch.equal(states[0].buffers["x_t"], live[0].buffers["x_t"])


def other_weights() -> Sampler:
    model = Pointwise(null_class=3).eval()
    model.weight.data.add_(1e-6)
    return sampler("ddpm", steps=4, model=model)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: sampler("ddpm", steps=5), "table was"),
        (lambda: sampler("ddim", steps=4), "table was"),
        (other_weights, "weights was"),
        (lambda: sampler("ddpm", steps=4, dtype=torch.bfloat16), "dtype was"),
        (lambda: Sampler(Pointwise().eval(), make_table("ddpm", CONFIG, steps=4), (2,), compile=False), "shape was"),
    ],
)
def test_a_state_of_another_run_is_refused(other: Any, named: str, tmp_path: Path) -> None:
    state = next(sampler("ddpm", steps=4).steps(seeds=[1, 2])).state()
    state.save(tmp_path / "state")
    for given in (state, tmp_path / "state"):
        with pytest.raises(ValueError, match=named):
            other().resume(given)


def test_a_state_of_another_noise_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s = sampler("ddpm", steps=4)
    next(s.steps(seeds=[1])).state().save(tmp_path / "state")
    monkeypatch.setattr("fastddpm.sampling.state.NOISE_VERSION", "noise-v2")
    assert noise.NOISE_VERSION == "noise-v1"
    with pytest.raises(ValueError, match=r"noise was .?noise-v1.? and is .?noise-v2"):
        s.resume(tmp_path / "state")


def test_what_no_file_can_hold_is_refused(tmp_path: Path) -> None:
    s = sampler("ddpm", steps=4)
    with pytest.raises(ValueError, match="generator="):
        next(s.steps(generator=torch.Generator(), batch_size=1)).state().save(tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    s, path = sampler("ddpm", steps=4), tmp_path / "state"
    next(s.steps(seeds=[1])).state().save(path)
    content = path.read_bytes()
    renamed = [content.replace(old, new) for old, new in ((b"state-1", b"state-2"), (b"seeded", b"sealed"))]
    for damaged in (b"", content[:100], content[:-1], *renamed):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="state"):
            s.resume(path)
