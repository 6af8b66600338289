"""The benchmark of starts: what overtakes what, and that a child reports."""

import json
import math
import time

import pytest
from fastddpm.benchmarks import start
from fastddpm.benchmarks.peers import networks
from fastddpm.benchmarks.start import STEPS, Start, overtakes

from fastddpm.schedules.diffusion import DiffusionConfig


@pytest.mark.parametrize(
    ("preparing", "call", "others", "calls"), [(12, 1, 3, 5), (3, 1, 3, 1), (1, 1, 3, 0), (12, 3, 3, math.inf)]
)
def test_calls_from_which_one_has_overtaken_another(preparing: float, call: float, others: float, calls: float) -> None:
    ours, theirs = Start(preparing + STEPS * call, call), Start(2 + STEPS * others, others)
    assert overtakes(ours, theirs) == calls


@pytest.mark.parametrize("provider", ["fastddpm", "diffusers"])
def test_a_child_says_when_its_first_images_were_there(provider, tmp_path, capsys) -> None:
    if provider == "diffusers":
        pytest.importorskip("diffusers")
    model = networks.build("tiny")
    model.diffusion = DiffusionConfig()
    model.save_pretrained(tmp_path)
    before = time.time()
    start.child(provider, tmp_path, 2, 1)
    first, call = json.loads(capsys.readouterr().out)
    assert before < first < time.time()
    assert call > 0
