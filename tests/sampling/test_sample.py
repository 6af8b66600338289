"""The front door: fastddpm.sample by name, directory, module or function."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastddpm
from fastddpm import DiffusionConfig, Sampler, UNet
from fastddpm.sampling import sample as sampling
from fastddpm.sampling.conditions import GuidanceArguments, resolve_guidance
from fastddpm.sampling.options import SamplerArguments
from fastddpm.sampling.request import RequestArguments, resolve_request
from fastddpm.tables import by_name as samplers
from tests import tiny

CONFIG = DiffusionConfig(num_timesteps=20, beta_start=1e-3, beta_end=0.4)


class Toy(nn.Module):
    """Elementwise, so that a sample's bits do not depend on its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.diffusion = CONFIG
        self.batches: list[int] = []

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        self.batches.append(len(x))
        shift = 0 if class_labels is None else class_labels.reshape(-1, *[1] * (x.dim() - 1)) / 8
        return x * self.scale / (1 + x.abs()) + shift


def tiny_unet(**config: Any) -> UNet:
    model = tiny.tiny_unet(**config)
    model.diffusion = CONFIG
    return model


def test_sample_is_the_sampler_of_the_models_diffusion() -> None:
    model = Toy().eval()
    table = samplers.make_table("ddpm", CONFIG, steps=5)
    expected = Sampler(model, table, (3, 4, 4), compile=False).sample(seeds=[3, 1, 2])
    assert torch.equal(fastddpm.sample(model, (3, 4, 4), seeds=[3, 1, 2], steps=5, sampler="ddpm"), expected)
    assert torch.equal(fastddpm.sample(model, (3, 4, 4), seeds=1, steps=5, sampler="ddpm"), expected[1:2])
    full = Sampler(model, samplers.make_table("ddpm", CONFIG), (3, 4, 4), compile=False).sample(seeds=[3])
    assert torch.equal(fastddpm.sample(model, (3, 4, 4), seeds=[3], sampler="ddpm"), full)


def test_sample_takes_eight_steps_of_unipc_by_default() -> None:
    model = Toy().eval()
    table = samplers.make_table("unipc", CONFIG, steps=8)
    expected = Sampler(model, table, (3, 4, 4), compile=False).sample(seeds=[3])
    assert torch.equal(fastddpm.sample(model, (3, 4, 4), seeds=[3]), expected)


def test_sample_takes_any_sampler_and_its_options() -> None:
    model = Toy().eval()
    table = samplers.make_table("ddim", CONFIG, steps=5, eta=0.5)
    expected = Sampler(model, table, (2,), compile=False).sample(seeds=[1, 2])
    got = fastddpm.sample(model, (2,), seeds=[1, 2], steps=5, sampler="ddim", sampler_options={"eta": 0.5})
    assert torch.equal(got, expected)


def test_sample_does_not_depend_on_the_batch_size() -> None:
    model = Toy().eval()
    whole = fastddpm.sample(model, (2,), seeds=range(7), steps=4)
    for batch_size in (1, 2, 3, 100):
        model.batches.clear()
        got = fastddpm.sample(model, (2,), seeds=range(7), steps=4, batch_size=batch_size, class_labels=None)
        assert torch.equal(got, whole)
        assert max(model.batches) <= batch_size
        assert sum(model.batches) == 7 * 4


def test_batches_keep_their_size_where_another_would_be_compiled() -> None:
    model = Toy().eval()
    run = sampling.plan_run(model, (2,), seeds=range(7), steps=2, batch_size=3, compile=False)
    run.sampler.options = dataclasses.replace(run.sampler.options, uses_graph=True)
    parts = [run.draw(batch) for batch in run.batches]
    assert [len(part) for part in parts] == [3, 2, 2]
    assert set(model.batches) == {3}
    assert torch.equal(torch.cat(parts), fastddpm.sample(model, (2,), seeds=range(7), steps=2))


@pytest.mark.parametrize(
    ("n", "size", "lengths"), [(0, 4, []), (1, 4, [1]), (4, 4, [4]), (5, 4, [3, 2]), (17, 16, [9, 8]), (7, 1, [1] * 7)]
)
def test_split_evenly_covers_every_index_once(n: int, size: int, lengths: list[int]) -> None:
    batches = sampling.split_evenly(n, size)
    assert [len(batch) for batch in batches] == lengths
    assert [i for batch in batches for i in batch] == list(range(n))


def test_labels_default_to_the_seed() -> None:
    model = tiny_unet(num_class_embeds=4, null_class=3)
    assert sampling.labels_for(model, [0, 1, 5, 2**63], None) == [0, 1, 2, 2**63 % 3]
    assert sampling.labels_for(tiny_unet(), [0, 1], None) is None
    assert sampling.labels_for(model, [5, 5], 2) == [2, 2]
    assert sampling.labels_for(model, [5, 5], torch.tensor([1, 0])) == [1, 0]
    with pytest.raises(ValueError, match="1 labels for 2 seeds"):
        sampling.labels_for(model, [5, 5], [1])
    explicit = fastddpm.sample(model, seeds=[4, 5], class_labels=[1, 2], steps=2)
    assert torch.equal(fastddpm.sample(model, seeds=[4, 5], steps=2), explicit)
    assert not torch.equal(fastddpm.sample(model, seeds=[4, 5], class_labels=3, steps=2), explicit)


def test_sample_loads_a_directory(tmp_path: Path) -> None:
    model = tiny_unet()
    fastddpm.save_pretrained(model, tmp_path)
    expected = fastddpm.sample(model, seeds=[1, 2], steps=3)
    assert expected.shape == (2, 1, 8, 8)
    for source in (tmp_path, str(tmp_path)):
        assert torch.equal(fastddpm.sample(source, seeds=[1, 2], steps=3), expected)


def test_guidance_reaches_the_sampler() -> None:
    model = tiny_unet(num_class_embeds=4, null_class=3)
    plain = fastddpm.sample(model, seeds=[4], steps=3)
    assert torch.equal(fastddpm.sample(model, seeds=[4], steps=3, guidance=1.0), plain)
    assert not torch.equal(fastddpm.sample(model, seeds=[4], steps=3, guidance=3.0), plain)


def test_sample_of_a_function_assumes_the_papers_diffusion() -> None:
    calls: list[int] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        calls.append(int(t[0]))
        return torch.zeros_like(x)

    fastddpm.sample(model, (2,), seeds=[0], steps=None, sampler="ddpm")
    assert calls == list(range(999, -1, -1))


def test_x_T_and_model_kwargs_are_split_among_the_batches() -> None:
    def shifted(x: Tensor, t: Tensor, shift: Any, scale: float) -> Tensor:
        return scale * x + shift

    x_T, shift = torch.randn(5, 2, generator=torch.Generator().manual_seed(1)), torch.arange(5.0)[:, None] / 8
    got = fastddpm.sample(
        shifted, (2,), x_T=x_T, steps=3, batch_size=2, diffusion=CONFIG, model_kwargs={"shift": shift, "scale": 0.5}
    )
    table = samplers.make_table("fast", CONFIG, steps=3)
    for i in range(5):
        alone = Sampler(lambda x, t, i=i: 0.5 * x + shift[i], table, (2,), compile=False)
        assert torch.equal(got[i : i + 1], alone.sample(seeds=[i], x_T=x_T[i : i + 1]))
    with pytest.raises(ValueError, match="x_T holds 5 samples, and 3 are drawn"):
        fastddpm.sample(Toy().eval(), (2,), x_T=x_T, seeds=[1, 2, 3])


def test_noise_may_come_from_a_generator_or_from_the_caller() -> None:
    model, table = Toy().eval(), samplers.make_table("ddpm", CONFIG, steps=3)
    expected = Sampler(model, table, (2,), compile=False)
    call: dict[str, Any] = {"shape": (2,), "steps": 3, "sampler": "ddpm"}
    got = fastddpm.sample(model, **call, generator=torch.Generator().manual_seed(3), batch_size=4)
    assert torch.equal(got, expected.sample(generator=torch.Generator().manual_seed(3), batch_size=4))
    generators = [[torch.Generator().manual_seed(seed) for seed in (1, 2)] for _ in range(2)]
    assert torch.equal(
        fastddpm.sample(model, **call, generator=generators[0]), expected.sample(generator=generators[1])
    )
    x_T, z = torch.ones(2, 2), torch.ones(3, 2, 2)
    assert torch.equal(fastddpm.sample(model, **call, noise=z, x_T=x_T), expected.sample(noise=z, x_T=x_T))
    with pytest.raises(ValueError, match="one source"):
        fastddpm.sample(model, **call, noise=z, x_T=x_T, seeds=[1, 2])


def test_callback_sees_every_step_of_every_batch() -> None:
    seen: list[tuple[int, int]] = []
    fastddpm.sample(
        Toy().eval(), (2,), seeds=range(3), steps=2, batch_size=2, callback=lambda r: seen.append((r.index, len(r.x_t)))
    )
    assert seen == [(0, 2), (1, 2), (0, 1), (1, 1)]


def test_numpy_integers_are_integers() -> None:
    model = Toy().eval()
    expected = fastddpm.sample(model, (2,), seeds=[3], steps=4)
    got = fastddpm.sample(model, np.array([2]), seeds=np.int64(3), steps=np.int64(4), batch_size=np.int32(1))  # type: ignore[arg-type]
    assert torch.equal(got, expected)
    labels = np.array([1])
    got = fastddpm.sample(model, (2,), seeds=np.array([3]), steps=4, class_labels=labels)  # type: ignore[arg-type]
    assert torch.equal(got, fastddpm.sample(model, (2,), seeds=[3], steps=4, class_labels=1))


def test_without_seeds_as_many_are_drawn_as_other_arguments_say() -> None:
    model = Toy().eval()
    three = fastddpm.sample(model, (2,), seeds=range(3), steps=2)
    assert torch.equal(fastddpm.sample(model, (2,), steps=2, batch_size=3), three)
    assert torch.equal(fastddpm.sample(model, (2,), steps=2, class_labels=[0, 0, 0]), three)
    assert torch.equal(fastddpm.sample(model, (2,), steps=2), three[:1])


def test_arrays_of_numpy_are_taken_as_tensors() -> None:
    model = Toy().eval()
    table = samplers.make_table("ddpm", CONFIG, steps=3)
    edits = {"init": torch.full((3, 2), 0.5), "known": torch.full((3, 2), 0.25), "mask": torch.tensor([0, 1])}
    for given in ({"x_T": edits["init"]}, edits):
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in given.items()}
        call: dict[str, Any] = {"seeds": range(3), **given}
        expected = Sampler(model, table, (2,), compile=False).sample(**call)
        assert torch.equal(Sampler(model, table, (2,), compile=False).sample(**{**call, **arrays}), expected)
        how: dict[str, Any] = {"steps": 3, "sampler": "ddpm", "diffusion": CONFIG, "batch_size": 2}
        assert torch.equal(fastddpm.sample(model, (2,), **how, **{**call, **arrays}), expected)


def test_rows_of_one_batch_are_not_repeated_for_the_others() -> None:
    def shifted(x: torch.Tensor, t: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return x + shift

    call: dict[str, Any] = {"seeds": range(4), "steps": 2, "batch_size": 2}
    with pytest.raises(ValueError, match=r"'shift' has 2 rows.* for 4 samples"):
        fastddpm.sample(shifted, (2,), **call, model_kwargs={"shift": torch.ones(2, 1)})
    one = fastddpm.sample(shifted, (2,), **call, model_kwargs={"shift": torch.ones(1, 1)})
    assert torch.equal(one, fastddpm.sample(shifted, (2,), **call, model_kwargs={"shift": torch.ones(4, 1)}))


@pytest.mark.parametrize("width", [2, 4])
def test_a_null_as_wide_as_a_batch_or_as_all_samples_is_no_row_of_each(width: int) -> None:
    def shifted(x: torch.Tensor, t: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return x + shift.sum(dim=1, keepdim=True)

    call: dict[str, Any] = {"seeds": range(4), "steps": 2, "batch_size": 2, "guidance": 2.0}
    call["model_kwargs"] = {"shift": torch.linspace(0, 1, 4 * width).reshape(4, width)}
    null = torch.arange(float(width))
    drawn = fastddpm.sample(shifted, (2,), **call, null_kwargs={"shift": null})
    assert torch.equal(drawn, fastddpm.sample(shifted, (2,), **call, null_kwargs={"shift": null.expand(4, width)}))


def test_an_image_that_is_no_batch_is_told_its_shape() -> None:
    with pytest.raises(ValueError, match=r"init must be .* \[B, 3, 2, 2\].*image\[None\]"):
        fastddpm.sample(Toy().eval(), (3, 2, 2), seeds=[0], steps=2, init=torch.zeros(3, 2, 2))


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (Toy, {}, "got the class Toy"),
        (Toy().state_dict(), {}, "got OrderedDict"),
        (Toy().eval(), {"diffusion": {"num_timesteps": 10}}, r"got dict.*from_scheduler_config"),
        (Toy().eval(), {"eta": 1.0}, "'eta'; see model_kwargs and sampler_options"),
    ],
)
def test_sample_refuses_other_kinds_of_things(model: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        fastddpm.sample(model, (2,), seeds=[0], steps=2, **arguments)


def test_sampler_takes_a_table_not_a_name() -> None:
    with pytest.raises(TypeError, match=r"got str; fastddpm\.sample takes samplers by name"):
        Sampler(Toy().eval(), "ddpm", (2,))  # type: ignore[arg-type]


def test_unknown_keyword_is_named_by_the_function_that_was_called() -> None:
    with pytest.raises(TypeError, match=r"^sample\(\) got an unexpected .* 'sedes'; did you mean 'seeds'"):
        fastddpm.sample(Toy().eval(), (2,), sedes=[1])  # type: ignore[call-arg]
    s = Sampler(Toy().eval(), samplers.make_table("ddpm", CONFIG, steps=3), (2,), compile=False)
    for name in ("sample", "steps", "warmup"):
        with pytest.raises(TypeError, match=rf"^{name}\(\) got .* 'batchsize'; did you mean 'batch_size'"):
            getattr(s, name)(seeds=[1], batchsize=1)


def test_typed_arguments_are_those_of_the_functions() -> None:
    keywords = {
        function: [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        for function in (Sampler.__init__, resolve_request)
    }
    assert list(SamplerArguments.__annotations__) == keywords[Sampler.__init__]
    guiding = inspect.signature(resolve_guidance).parameters.keys() - {"table"}
    assert guiding == GuidanceArguments.__annotations__.keys()
    assert {*RequestArguments.__annotations__, "x0_out"} == {*keywords[resolve_request], *guiding}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": None}, "does not name a shape"),
        ({"seeds": [-1]}, "seeds"),
        ({"seeds": [0.5]}, "seeds"),
        ({"sampler": "plms"}, "unknown sampler"),
        ({"steps": 21}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": -1}, "batch_size"),
        ({"guidance": 2.0}, "class_labels"),
    ],
)
def test_sample_refuses(arguments: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"shape": (2,), "seeds": [0], "steps": 2, **arguments}
    with pytest.raises(ValueError, match=message):
        fastddpm.sample(Toy().eval(), call.pop("shape"), **call)


def test_sample_stays_a_function_when_its_module_is_imported() -> None:
    importlib.import_module("fastddpm.sampling.sample")
    assert callable(fastddpm.sample)


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    fastddpm.sample(Toy().eval(), (2,), seeds=range(3), steps=4, batch_size=2, progress=True)
    captured = capsys.readouterr()
    assert "8/8" in captured.err
    assert captured.out == ""
    fastddpm.sample(Toy().eval(), (2,), seeds=[1], steps=4)
    assert capsys.readouterr().err == ""
