"""`fastddpm verify`: it passes here, says what it leaves out, and fails when a promise is broken."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
import torch

from fastddpm.cli import main
from fastddpm.diagnostics import verify
from fastddpm.noise import known_answers
from fastddpm.noise import v1 as noise
from fastddpm.ops.operators import DTYPES
from fastddpm.sampling.sampler import Sampler

pytestmark = pytest.mark.usefixtures("still_generators")

CPU = torch.device("cpu")


def test_verify_passes_on_the_cpu_and_says_what_it_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--device", "cpu", "--json"]) == 0
    checks = {c["name"]: c for c in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["noise-v1 digests"]["status"] == "passed"
    assert checks["step = paper"]["status"] == "passed"
    assert checks["batch invariance"]["status"] == "passed"
    assert checks["graph = eager loop"] == checks["graph = eager loop"] | {
        "status": "left out",
        "detail": "needs a CUDA device",
    }


def test_verify_prints_80_columns_and_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    main(["verify", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1].startswith("cpu: verified (")
    assert sum("TRITON_INTERPRET" in line for line in lines) <= 1  # a reason once


def test_verify_fails_when_a_bit_of_the_noise_changes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(noise, "PHILOX_M", (noise.PHILOX_M[0] ^ 2, noise.PHILOX_M[1]))
    assert main(["verify", "--device", "cpu"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_known_answers_tell_the_counter_words_apart() -> None:
    assert len(set(known_answers.NOISE_V1.values())) == len(known_answers.NOISE_V1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_tells_an_ulp_and_equates_nans(dtype: torch.dtype) -> None:
    a = torch.tensor([1.0, torch.nan, 0.0], dtype=dtype)
    assert verify.same_bits(a, a.clone())
    assert not verify.same_bits(a, torch.nextafter(a.float(), a.float() + 1).to(dtype) + a * 2**-6)
    assert not verify.same_bits(a, torch.tensor([1.0, torch.nan, -0.0], dtype=dtype))


@pytest.mark.parametrize(
    ("compiled", "captured", "said"),
    [(0.0, 0.0, None), (0.0, 1e-6, "its own eager loop"), (0.5, 0.0, "compiled and uncompiled differ by")],
)
def test_verify_tells_a_wrong_network_from_a_wrong_capture(
    compiled: float, captured: float, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faults of a size that no GPU is needed for, added to what the CPU's plain loop gives."""

    class Faulty(Sampler):
        def __init__(self, *args: Any, compile: bool, cuda_graph: bool, norm: str, **options: Any) -> None:
            super().__init__(*args, compile=False, **options)
            self.fault = compiled * compile + captured * cuda_graph

        def sample(self, **arguments: Any) -> Any:
            x: torch.Tensor = super().sample(**arguments)
            return x + self.fault

    monkeypatch.setattr(verify, "Sampler", Faulty)
    monkeypatch.setattr(verify, "_require_cuda", lambda device: None)
    monkeypatch.setattr(verify, "BATCH", 2)
    with pytest.raises(AssertionError, match=said) if said else contextlib.nullcontext():
        assert "bfloat16, norm='fused'" in verify.check_network(CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("name", verify.CHECKS)
def test_verify_check_passes_on_cuda(name: str) -> None:
    assert verify.CHECKS[name](torch.device("cuda"))
