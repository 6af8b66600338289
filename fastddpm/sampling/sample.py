"""The front door: samples from a model, by name or as a module, in one call."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastddpm.checks import integer
from fastddpm.machine.devices import resolve_device
from fastddpm.machine.ranks import refuse_other_calls
from fastddpm.noise.seeds import resolve_seeds
from fastddpm.sampling import network as net
from fastddpm.sampling.conditions import Labels, Weight, aligned, is_guided, labels_for, rows_of
from fastddpm.sampling.edits import as_mask, as_tensor, for_batch
from fastddpm.sampling.options import SamplerArguments, check_shape
from fastddpm.sampling.request import Conditions, Generators, Noise, RequestArguments, given_batch, refuse_unknown
from fastddpm.sampling.sampler import Sampler, StepResult
from fastddpm.sampling.tuned import tuned_table
from fastddpm.schedules.diffusion import DiffusionConfig
from fastddpm.tables.by_name import make_table
from fastddpm.tables.names import canonical
from fastddpm.tables.table import Table
from fastddpm.unet.load import load

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Elements of x_t per batch when the caller names no batch size: 16 images of 32x32 on a CPU, whose caches are then
# full; enough to keep the largest GPU busy.
_ELEMENTS_PER_BATCH = {"cpu": 2**14, "cuda": 2**20}


class SampleArguments(SamplerArguments, Conditions, total=False):
    """Keyword arguments that `sample` hands on."""

    strength: float


def sample(
    model: net.Model | str | os.PathLike[str],
    shape: Sequence[int] | None = None,
    *,
    seeds: int | Sequence[int] | None = None,
    steps: int | None = None,
    sampler: str = "fast",
    class_labels: Labels | None = None,
    batch_size: int | None = None,
    generator: Generators | None = None,
    noise: Noise | None = None,
    callback: Callable[[StepResult[None]], None] | None = None,
    progress: bool = False,
    diffusion: DiffusionConfig | None = None,
    sampler_options: dict[str, Any] | None = None,
    process_group: ProcessGroup | None = None,
    **options: Unpack[SampleArguments],
) -> Tensor:
    """Draw one sample per seed, in batches; or one batch whose noise comes from a generator or from the caller.

    The noise of a sample depends on its seed alone, not on the batch that it is drawn in.

    Args:
        model: a module or callable that keeps `Sampler`'s model contract; or what `fastddpm.load` takes: the name of a
            shipped model ("digits") or a directory.
        shape: one sample's shape, (C, H, W) or (D,); default from the model's config.
        seeds: one seed per sample; an int is one sample. Default 0, 1, ... for as many as `x_T`, `init`, `batch_size`
            or `class_labels` say, the first of them that is given; else one sample.
        steps: steps per sample; default those of "fast" (8, or 10 with guidance), else all timesteps of the diffusion.
        sampler: the name of a sampler, see `fastddpm.tables.names`; "fast" brings its own number of steps.
        class_labels: one label per sample or one for all. By default a class-conditional model draws class
            seed % number of classes; pass its null class for samples of no class.
        batch_size: the most samples per batch; default by size and device. Batches are made equally large. Without
            `seeds` it is the number of samples, where `x_T` and `init` do not tell.
        generator: a torch.Generator, or one per sample, instead of seeds; see `Sampler.sample`.
        noise: z of every step instead of seeds, with `x_T`; see `Sampler.sample`.
        callback: called after each step of each batch, see `Sampler.sample`.
        progress: show a progress bar on stderr.
        diffusion: what the model was trained for; default `model.diffusion`, else Ho et al.'s (linear schedule of 1000
            steps, epsilon, fixed_small).
        sampler_options: further arguments of the sampler's table (eta, spacing, ...).
        process_group: of torch.distributed, whose processes all make this call: each draws a share of the batches, by
            default small enough for all to have one, and all return all samples.
        **options: further arguments of `Sampler`: device, dtype, compile, cuda_graph, backend, check_finite, ...; and
            of `Sampler.sample`: x_T, init, mask, guidance, model_kwargs, ..., whose tensors of N rows are split among
            the batches; and strength, in (0, 1]: the share of the steps that is taken, the last ones, from `init` (or
            from an x_T of that level): how much of `init` changes. 1 draws anew.

    Returns:
        float32 [N, *shape] on the sampler's device.

    Raises:
        ValueError: the shape is not known, or an argument does not fit, or is not that of the group's other processes.
        TypeError: there is no argument of that name.
    """
    refuse_unknown("sample", options, [*SampleArguments.__annotations__, *inspect.signature(sample).parameters])
    start = options.get("x_T") if options.get("init") is None else options["init"]
    drawn = generator is not None or noise is not None
    if drawn and seeds is not None:
        raise ValueError(f"noise comes from one source, got seeds and {'generator' if noise is None else 'noise'}")
    if drawn and process_group is not None:
        raise ValueError("processes share the batches of seeds=; a generator or noise draws one batch")
    n = given_batch(generator, noise, start, batch_size, class_labels, default=None if drawn else 1)
    run = plan_run(
        model,
        shape,
        # Where noise is drawn, seeds only give class-conditional models their default labels.
        seeds=range(n) if seeds is None else seeds if isinstance(seeds, Iterable) else [seeds],
        steps=steps,
        sampler=sampler,
        class_labels=class_labels,
        batch_size=max(1, n) if drawn else batch_size,
        diffusion=diffusion,
        sampler_options=sampler_options,
        **options,
    )
    if not drawn:
        run.settle()
    rank, world = (0, 1) if process_group is None else (process_group.rank(), process_group.size())
    if world > 1 and batch_size is None and run.seeds:
        run.batches = split_evenly(len(run.seeds), min(len(run.batches[0]), math.ceil(len(run.seeds) / world)))
    if process_group is not None:
        call = {"seeds": run.seeds, "labels": run.labels, "batches": run.batches, "steps": len(run.sampler.table)}
        refuse_other_calls(call, process_group)
    batches = run.batches[rank::world]
    with tqdm(total=len(batches) * len(run.sampler.table), desc="sampling", unit="step", disable=not progress) as bar:

        def after(result: StepResult[None]) -> None:
            bar.update()
            if callback is not None:
                callback(result)

        if drawn:
            return run.sampler.sample(
                generator=generator,
                noise=noise,
                batch_size=n,
                class_labels=run.labels,
                callback=after,
                **run.conditions,
            )
        out = torch.zeros(len(run.seeds), *run.sampler.shape, dtype=torch.float32, device=run.sampler.device)
        for batch in batches:
            out[batch.start : batch.stop] = run.draw(batch, after)
        if world > 1:
            # What others have drawn is zero here. As integers, since floating-point sums would lose the sign of 0.
            torch.distributed.all_reduce(out.view(torch.int32), group=process_group)
        return out


@dataclass
class Run:
    """A sampler, and what it is to draw.

    Attributes:
        sampler: ready to be called.
        seeds: one per sample.
        labels: one per sample, or None.
        batches: ranges of indices into seeds; which samples share a batch depends on nothing but seeds and batch size.
        conditions: further arguments of `Sampler.sample`; a tensor with a row per sample is split.
    """

    sampler: Sampler
    seeds: list[int]
    labels: list[int] | None
    batches: list[range]
    conditions: Conditions
    _compiled: bool | None = field(default=None, init=False, repr=False)

    @property
    def guidance(self) -> Weight:
        """The weight of classifier-free guidance, or one per row."""
        return self.conditions.get("guidance", 1.0)

    def settle(self, compiled: bool | None = None) -> bool:
        """Decide once for all batches whether the network runs compiled, see `Sampler.settle`, and return that."""
        if self._compiled is None and self.batches:
            self._compiled = self.sampler.settle(compiled, **self._arguments(list(self.batches[0])))
        return bool(self._compiled)

    def draw(
        self, batch: range, callback: Callable[[StepResult[None]], None] | None = None, state: Path | None = None
    ) -> Tensor:
        """Draw the samples of one batch, float32 [len(batch), ...]; or the rest of it, from its saved `State`."""
        indices = list(batch)
        if self.settle() or self.sampler.options.uses_graph:
            # Another size would mean another compilation or capture; the last seed fills the place.
            indices += indices[-1:] * (len(self.batches[0]) - len(indices))

        def after(result: StepResult[None]) -> None:
            if callback is not None:
                callback(result._replace(x_t=result.x_t[: len(batch)]))

        if state is not None:
            return self.sampler.resume(state, callback=after)[: len(batch)]
        return self.sampler.sample(callback=after, **self._arguments(indices))[: len(batch)]

    def _arguments(self, indices: list[int]) -> RequestArguments:
        arguments: dict[str, Any] = rows_of("conditions", self.conditions, indices, len(self.seeds))
        arguments["seeds"] = [self.seeds[i] for i in indices]
        if self.labels is not None:
            arguments["class_labels"] = [self.labels[i] for i in indices]
        return cast(RequestArguments, arguments)


def plan_run(
    model: net.Model | str | os.PathLike[str],
    shape: Sequence[int] | None = None,
    *,
    seeds: Sequence[int],
    steps: int | None = None,
    sampler: str = "fast",
    class_labels: Labels | None = None,
    batch_size: int | None = None,
    diffusion: DiffusionConfig | None = None,
    sampler_options: dict[str, Any] | None = None,
    **options: Unpack[SampleArguments],
) -> Run:
    """Load the model, build its sampler and split the seeds into batches; arguments as in `sample`."""
    if isinstance(model, (str, os.PathLike)):
        with torch.device("cpu"):
            model = load(model)
    seeds = list(seeds)
    resolve_seeds(seeds=seeds)
    known = SamplerArguments.__annotations__
    conditions: Any = {name: value for name, value in options.items() if name in Conditions.__annotations__}
    how = cast(SamplerArguments, {name: value for name, value in options.items() if name in known})
    strength, guidance = options.get("strength", 1.0), conditions.get("guidance", 1.0)
    if strength != 1.0 and conditions.get("x_T") is None and conditions.get("init") is None:
        raise ValueError(f"strength={strength} begins part-way: pass init= too, or x_T= at the level of that step")
    diffusion = net.diffusion_of(model, diffusion)
    shape = net.shape_of(model, diffusion) if shape is None else check_shape(shape)
    for name in ("x_T", "init", "known", "mask"):
        if conditions.get(name) is not None:
            data = conditions[name] = as_tensor(conditions[name])
            # One of another shape is refused, with advice, where it is used.
            if tuple(data.shape[1:]) == shape:
                for_batch(name, data, len(seeds))
    if conditions.get("mask") is not None:
        conditions["mask"] = as_mask(conditions["mask"], (len(seeds), *shape))
    if nulls := conditions.get("null_kwargs"):
        values = conditions.get("model_kwargs") or {}
        conditions["null_kwargs"] = {name: aligned(null, values.get(name)) for name, null in nulls.items()}
    steps = None if steps is None else integer("steps", steps, 1)
    if isinstance(guidance, Tensor):  # one weight per row of the table, not per sample
        conditions["guidance"] = guidance.tolist()
    # Whatever torch.set_default_device asks for.
    with torch.device("cpu"):
        given = {"steps": steps, "strength": strength, **(sampler_options or {})}
        table = table_for(sampler, model, diffusion, guidance, **given)
    device = how.get("device")
    how["device"] = device = net.device_of(model) if device is None else resolve_device(device)
    if batch_size is None:
        batch_size = max(1, _ELEMENTS_PER_BATCH.get(device.type, 2**14) // math.prod(shape))
    how.setdefault("samples_ahead", len(seeds))
    return Run(
        Sampler(model, table, shape, **how),
        seeds,
        labels_for(model, seeds, class_labels),
        split_evenly(len(seeds), integer("batch_size", batch_size, 1)),
        conditions,
    )


def table_for(
    name: str,
    model: Any,
    diffusion: DiffusionConfig,
    guidance: Weight = 1.0,
    *,
    steps: int | None = None,
    strength: float = 1.0,
    **options: Any,
) -> Table:
    """Build the table of a named sampler for a model: by `make_table`, or "tuned", the model's own."""
    if canonical(name) != "tuned":
        guided = is_guided(guidance)
        return make_table(name, diffusion, steps=steps, strength=strength, guided=guided, **options)
    if options or strength != 1.0:
        raise ValueError(f"sampler='tuned' takes no {' and no '.join(options or ['strength'])}")
    return tuned_table(model, diffusion, guidance, steps)


def split_evenly(n: int, batch_size: int) -> list[range]:
    """Split range(n) into the fewest ranges of at most batch_size, equally long up to one."""
    parts = np.array_split(np.arange(n), max(1, math.ceil(n / batch_size)))
    return [range(part[0], part[-1] + 1) for part in parts if len(part)]
