"""Steps and loops of `fastddpm.integrations.openai`: rows where they fit, the original's arithmetic elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastddpm import ops
from fastddpm.integrations.kept_samplers import KeptSamplers
from fastddpm.integrations.openai import tables
from fastddpm.integrations.openai.process import DiffusionProcess, Kwargs, Model
from fastddpm.integrations.openai.tables import ModelMeanType
from fastddpm.integrations.shared import (
    NoiseSource,
    draws_randomly,
    fits_rows,
    look_through,
    overrides,
    replay,
    require,
)
from fastddpm.sampling.sampler import Sampler
from fastddpm.tables.table import Table

# Methods that rows stand for: a subclass that replaces one is run with it.
_PARTS = (
    "p_mean_variance",
    "q_posterior_mean_variance",
    "_predict_xstart_from_eps",
    "_predict_xstart_from_xprev",
    "_predict_eps_from_xstart",
)


@dataclass(frozen=True)
class Step:
    """What a call asks of a step.

    Attributes:
        kind: "p" (ancestral), "ddim" or "reverse" (DDIM towards noise).
        clip, denoised_fn, cond_fn, model_kwargs, eta: as in `GaussianDiffusion`.
    """

    kind: str
    clip: bool = True
    denoised_fn: Callable[[Tensor], Tensor] | None = None
    cond_fn: Model | None = None
    model_kwargs: Kwargs = None
    eta: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether a row can express it."""
        return self.denoised_fn is None and self.cond_fn is None

    def arguments(self) -> dict[str, Any]:
        """Return it as arguments of p_sample or ddim_sample, cond_fn only where it is set (one package has none)."""
        arguments: dict[str, Any] = {
            "clip_denoised": self.clip,
            "denoised_fn": self.denoised_fn,
            "model_kwargs": self.model_kwargs,
        }
        if self.cond_fn is not None:
            arguments["cond_fn"] = self.cond_fn
        if self.kind == "ddim":
            arguments["eta"] = self.eta
        return arguments


class StepRunner(DiffusionProcess):
    """Executes steps and loops; see `fastddpm.integrations.openai`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sampler_options: dict[str, Any] = {}
        self._rows_of: dict[tuple[str, float], Tensor | None] = {}
        self._samplers = KeptSamplers()
        for kind in ("p", "ddim", "reverse"):
            self._rows(Step(kind))

    def _step(self, model: Model, x: Tensor, t: Tensor, step: Step, source: NoiseSource) -> dict[str, Tensor]:
        """Advance every sample of x by one step from its own t."""
        if not step.plain or overrides(self, _PARTS):
            out = self.p_mean_variance(
                model,
                x,
                t,
                clip_denoised=step.clip,
                denoised_fn=step.denoised_fn,
                model_kwargs=step.model_kwargs,
            )
            return self._advance(out, x, t, step, source)
        output = self._predict(model, x, t, step.model_kwargs)
        rows = self._rows(step)
        if rows is None or not fits_rows(x, output):
            return self._advance(self._distribution(output, x, t, step.clip, None), x, t, step, source)
        x_start = torch.empty_like(x)
        sample = ops.p_sample(
            x,
            output,
            self._upload(f"rows {step.kind} {step.eta}", x.device, rows.float),
            t,
            None if step.kind == "reverse" else source.at(self.num_timesteps - 1 - t, x),
            x0_out=x_start,
            backend=self.sampler_options.get("backend", "auto"),
            **self._flags(step),
        )
        return {"sample": sample, "pred_xstart": x_start}

    def _advance(
        self, out: dict[str, Tensor], x: Tensor, t: Tensor, step: Step, source: NoiseSource
    ) -> dict[str, Tensor]:
        order = self.num_timesteps - 1 - t
        noisy = (t != 0).float().reshape(-1, *[1] * (x.dim() - 1))
        if step.kind == "p":
            z = source.z(order, x)
            mean = out["mean"]
            if step.cond_fn is not None:
                mean = self.condition_mean(step.cond_fn, out, x, t, model_kwargs=step.model_kwargs)
            return {
                "sample": mean + noisy * (0.5 * out["log_variance"]).exp() * z,
                "pred_xstart": out["pred_xstart"],
            }
        if step.cond_fn is not None:
            out = self.condition_score(step.cond_fn, out, x, t, model_kwargs=step.model_kwargs)
        x_start = out["pred_xstart"]
        eps = self._predict_eps_from_xstart(x, t, x_start)
        if step.kind == "reverse":
            bar = self._at("alphas_cumprod_next", t, x)
            return {"sample": x_start * bar.sqrt() + (1 - bar).sqrt() * eps, "pred_xstart": x_start}
        bar, bar_prev = self._at("alphas_cumprod", t, x), self._at("alphas_cumprod_prev", t, x)
        sigma = step.eta * ((1 - bar_prev) / (1 - bar)).sqrt() * (1 - bar / bar_prev).sqrt()
        mean = x_start * bar_prev.sqrt() + (1 - bar_prev - sigma**2).sqrt() * eps
        return {"sample": mean + noisy * sigma * source.z(order, x), "pred_xstart": x_start}

    def _progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None,
        step: Step,
        device: Any,
        progress: bool,
        source: NoiseSource,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the result of each step, by this object's own p_sample or ddim_sample."""
        x = self._start(model, shape, noise, device, source)
        method = getattr(self, f"{step.kind}_sample")
        for i in tqdm(range(self.num_timesteps)[::-1], disable=not progress):
            t = torch.full((len(x),), i, device=x.device, dtype=torch.int64)
            with torch.no_grad():
                out = method(model, x, t, **step.arguments(), **source.arguments)
            yield out
            x = out["sample"]

    def _loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None,
        step: Step,
        device: Any,
        progress: bool,
        source: NoiseSource,
    ) -> Tensor:
        """Return the last state: one run of `Sampler` where that does the same, else the progressive loop's."""
        name = f"{step.kind}_sample"
        if overrides(self, (*_PARTS, name, f"{name}_loop_progressive")) or not self._runs_whole(model, noise, step):
            steps = getattr(self, f"{name}_loop_progressive")
            options = {**step.arguments(), "device": device, "progress": progress, **source.arguments}
            out: dict[str, Tensor] = {}
            for out in steps(model, shape, noise=noise, **options):  # noqa: B007
                pass
            return out["sample"]
        x_T = self._start(model, shape, noise, device, source)
        kwargs = dict(step.model_kwargs or {})
        labels = kwargs.pop("class_labels", None)
        with torch.no_grad(), tqdm(total=self.num_timesteps, disable=not progress) as bar:
            return replay(
                self._sampler(model, step, x_T),
                source,
                x_T,
                # The originals draw a z at every step, even at t = 0 and where eta = 0 multiplies it.
                [True] * self.num_timesteps,
                lambda _: bar.update() and None,
                class_labels=labels,
                model_kwargs=kwargs,
            )

    def _start(
        self, model: Model, shape: Sequence[int], noise: Tensor | None, device: Any, source: NoiseSource
    ) -> Tensor:
        require(isinstance(shape, (tuple, list)), f"shape must be a tuple or a list, got {type(shape).__name__}")
        if noise is not None:
            return noise
        device = next(model.parameters()).device if device is None else device  # type: ignore[attr-defined]
        return source.start(torch.empty(*shape, device=device))

    def _runs_whole(self, model: Model, noise: Tensor | None, step: Step) -> bool:
        """Whether `Sampler` gives the original's result: nothing but rows, and no random draws in the network."""
        return (
            step.plain
            and isinstance(model, nn.Module)
            and not draws_randomly(model)
            and self._rows(step) is not None
            and (noise is None or noise.dtype == torch.float32)
            and all(isinstance(value, (Tensor, Hashable)) for value in (step.model_kwargs or {}).values())
        )

    def _rows(self, step: Step) -> Tensor | None:
        """Return the rows of a step, row t for timestep t, or None where a coefficient is not finite."""
        key = (step.kind, step.eta)
        if key not in self._rows_of:
            if torch.compiler.is_compiling():
                # It cannot trace the check below, and fuses the plain form itself.
                return None
            with torch.inference_mode(False), torch.no_grad():
                rows = self._build_rows(step)
            self._rows_of[key] = rows if rows.isfinite().all() else None
        return self._rows_of[key]

    def _build_rows(self, step: Step) -> Tensor:
        if step.kind == "p":
            return tables.p_rows(self._tables, self.model_mean_type, self.model_var_type)
        if step.kind == "ddim":
            return tables.ddim_rows(self._tables, self.model_mean_type, step.eta)
        return tables.ddim_reverse_rows(self._tables, self.model_mean_type)

    def _flags(self, step: Step) -> dict[str, Any]:
        return {
            "clip": step.clip,
            "learned": self.model_var_type in tables.LEARNED,
            "use_m": step.kind == "p" and self.model_mean_type is ModelMeanType.PREVIOUS_X,
        }

    def _sampler(self, model: Any, step: Step, x_T: Tensor) -> Sampler:
        network, shape = look_through(model), tuple(x_T.shape[1:])
        key = (step.kind, step.eta, step.clip, self.rescale_timesteps, network, network.training, shape, x_T.device)
        rows = self._rows(step)
        assert rows is not None
        timesteps = self._scale_timesteps(torch.arange(self.num_timesteps, device="cpu")).flip(0)
        table = Table(rows.flip(0), timesteps, name=f"openai-{step.kind}", **self._flags(step))
        return self._samplers.get(
            key, network, table, shape, batch=len(x_T), device=x_T.device, options=self.sampler_options
        )
