"""Saving and loading: what the fast classes write is what diffusers writes, and each side reads the other's files."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
)

from fastddpm.integrations.diffusers import FastDDIMPipeline, FastDDIMScheduler, FastDDPMPipeline, FastDDPMScheduler
from fastddpm.integrations.diffusers.schedulers import FAST_FORM
from tests.integrations.diffusers.cases import SHAPE, normal, tiny_unet

CONFIG = {"beta_schedule": "squaredcos_cap_v2", "clip_sample_range": 2.0, "timestep_spacing": "trailing"}
PAIRS = [(FastDDPMScheduler, DDPMScheduler), (FastDDIMScheduler, DDIMScheduler)]
FAST: dict[Any, Any] = {original: fast for fast, original in PAIRS}
BOTH = pytest.mark.parametrize(("fast", "original"), PAIRS, ids=["ddpm", "ddim"])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@BOTH
def test_scheduler_files_are_equal_to_diffusers_byte_for_byte(fast: Any, original: Any, tmp_path: Path) -> None:
    fast(**CONFIG).save_pretrained(tmp_path / "ours")
    original(**CONFIG).save_pretrained(tmp_path / "theirs")
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    assert json.loads((tmp_path / "ours/scheduler_config.json").read_text())["_class_name"] == original.__name__


@BOTH
def test_scheduler_loads_what_the_other_side_saved(fast: Any, original: Any, tmp_path: Path) -> None:
    for writer, reader in ((fast, original), (original, fast)):
        written = writer(**CONFIG)
        written.save_pretrained(tmp_path)
        read = reader.from_pretrained(tmp_path)
        assert type(read) is reader
        assert {k: v for k, v in read.config.items() if k != "_use_default_values"} == json.loads(
            (tmp_path / "scheduler_config.json").read_text()
        )
        assert torch.equal(read.alphas_cumprod, written.alphas_cumprod)


@BOTH
def test_from_config_is_the_whole_change(fast: Any, original: Any) -> None:
    theirs = original(**CONFIG)
    ours = fast.from_config(theirs.config)
    assert isinstance(ours, original)
    assert set(ours.compatibles) == set(theirs.compatibles)
    assert len(ours) == len(theirs)
    assert (ours.order, ours.init_noise_sigma) == (theirs.order, theirs.init_noise_sigma)
    for name in ("betas", "alphas", "alphas_cumprod", "timesteps"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    back = original.from_config(ours.config)
    assert json.loads(back.to_json_string()) == json.loads(original.from_config(theirs.config).to_json_string())
    assert DPMSolverMultistepScheduler.from_config(ours.config).config.beta_schedule == "squaredcos_cap_v2"
    x = normal(*SHAPE, seed=1)
    assert ours.scale_model_input(x, 3) is x


@BOTH
def test_scheduler_can_be_pickled_and_copied(fast: Any, original: Any) -> None:
    scheduler = fast(**CONFIG)
    scheduler.set_timesteps(10)
    t, x, m = scheduler.timesteps[3], normal(*SHAPE, seed=1), normal(*SHAPE, seed=2)
    expected = scheduler.step(m, t, x, generator=torch.Generator().manual_seed(1)).prev_sample
    for duplicate in (pickle.loads(pickle.dumps(scheduler)), copy.deepcopy(scheduler)):
        assert type(duplicate) is fast
        assert torch.equal(duplicate.step(m, t, x, generator=torch.Generator().manual_seed(1)).prev_sample, expected)


@pytest.mark.parametrize(
    ("fast", "original", "scheduler"),
    [(FastDDPMPipeline, DDPMPipeline, DDPMScheduler), (FastDDIMPipeline, DDIMPipeline, DDIMScheduler)],
    ids=["ddpm", "ddim"],
)
def test_pipeline_files_are_equal_to_diffusers_byte_for_byte(
    fast: Any, original: Any, scheduler: Any, tmp_path: Path
) -> None:
    unet = tiny_unet()
    theirs, swapped = original(unet, scheduler(**CONFIG)), original(unet, scheduler(**CONFIG))
    swapped.scheduler = FAST[scheduler].from_config(swapped.scheduler.config)
    theirs.save_pretrained(tmp_path / "theirs")
    swapped.save_pretrained(tmp_path / "swapped")
    fast(unet, scheduler(**CONFIG)).save_pretrained(tmp_path / "fast")
    expected = files(tmp_path / "theirs")
    assert files(tmp_path / "fast") == expected
    assert files(tmp_path / "swapped").keys() == expected.keys()
    assert files(tmp_path / "swapped")["model_index.json"] == expected["model_index.json"]
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "fast")) is original
    loaded = fast.from_pretrained(tmp_path / "theirs")
    assert type(loaded) is fast
    assert isinstance(loaded.scheduler, scheduler)
    assert type(loaded.scheduler) is not scheduler


def test_saved_pipeline_loads_in_a_process_without_fastddpm(tmp_path: Path) -> None:
    FastDDPMPipeline(tiny_unet(), FastDDPMScheduler(**CONFIG)).save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['fastddpm'] = None\n"
        "from diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(tmp_path)!r})\n"
        "print(type(pipe).__name__, type(pipe.scheduler).__name__, type(pipe.scheduler).__module__)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["DDPMPipeline", "DDPMScheduler", "diffusers.schedulers.scheduling_ddpm"], (
        result.stderr
    )


@pytest.mark.parametrize("fast", FAST_FORM.values(), ids=lambda fast: fast._original.__name__)
def test_methods_have_the_signatures_at_which_pipelines_look(fast: Any) -> None:
    for name in ("step", "set_timesteps", "scale_model_input", "add_noise"):
        ours, theirs = (inspect.signature(getattr(kind, name)).parameters.values() for kind in (fast, fast._original))
        assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs], name


@pytest.mark.parametrize(
    ("arguments", "options"),
    [((), {"eta": 0.5, "foo": 1}), ((0.0, False, None, None, True, 9), {}), ((0.5,), {"eta": 1.0})],
    ids=["unknown", "too many", "twice"],
)
def test_step_refuses_what_does_not_fit_its_signature_as_diffusers_does(arguments: Any, options: Any) -> None:
    messages = []
    for kind in (FastDDIMScheduler, DDIMScheduler):
        scheduler, x = kind(), normal(*SHAPE, seed=1)
        scheduler.set_timesteps(4)
        with pytest.raises(TypeError) as error:
            scheduler.step(x, 750, x, *arguments, **options)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
