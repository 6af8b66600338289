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
class Call:
    """What a sampling method was asked.

    Attributes:
        kind: "p" (ancestral), "ddim" or "reverse" (DDIM towards noise).
        source: where z comes from.
        model, clip, denoised_fn, cond_fn, model_kwargs, eta: as in `GaussianDiffusion`, of each step.
        shape, noise, device, progress: as there, of loops.
    """

    kind: str
    source: NoiseSource
    model: Any
    clip: bool
    denoised_fn: Callable[[Tensor], Tensor] | None
    cond_fn: Model | None
    model_kwargs: Kwargs
    eta: float = 0.0
    shape: Sequence[int] = ()
    noise: Tensor | None = None
    device: Any = None
    progress: bool = False

    @property
    def plain(self) -> bool:
        """Whether a row can express a step."""
        return self.denoised_fn is None and self.cond_fn is None

    def arguments(self) -> dict[str, Any]:
        """Return what p_sample or ddim_sample is told, cond_fn only where it is set (one package has none)."""
        arguments: dict[str, Any] = {
            "clip_denoised": self.clip,
            "denoised_fn": self.denoised_fn,
            "model_kwargs": self.model_kwargs,
            **self.source.arguments,
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
            self._rows(kind, 0.0)

    def _step(self, call: Call, x: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Advance every sample of x by one step from its own t."""
        model, clip, kwargs = call.model, call.clip, call.model_kwargs
        if not call.plain or overrides(self, _PARTS):
            how: dict[str, Any] = {"clip_denoised": clip, "denoised_fn": call.denoised_fn, "model_kwargs": kwargs}
            return self._advance(self.p_mean_variance(model, x, t, **how), x, t, call)
        output, rows = self._predict(model, x, t, kwargs), self._rows(call.kind, call.eta)
        if rows is None or not fits_rows(x, output):
            return self._advance(self._distribution(output, x, t, clip, None), x, t, call)
        x_start = torch.empty_like(x)
        sample = ops.p_sample(
            x,
            output,
            self._upload(f"rows {call.kind} {call.eta}", x.device, rows.float),
            t,
            None if call.kind == "reverse" else call.source.at(self.num_timesteps - 1 - t, x),
            x0_out=x_start,
            backend=self.sampler_options.get("backend", "auto"),
            **self._flags(call),
        )
        return {"sample": sample, "pred_xstart": x_start}

    def _advance(self, out: dict[str, Tensor], x: Tensor, t: Tensor, call: Call) -> dict[str, Tensor]:
        order = self.num_timesteps - 1 - t
        noisy = (t != 0).float().reshape(-1, *[1] * (x.dim() - 1))
        if call.kind == "p":
            z = call.source.z(order, x)
            mean = out["mean"]
            if call.cond_fn is not None:
                mean = self.condition_mean(call.cond_fn, out, x, t, model_kwargs=call.model_kwargs)
            return {
                "sample": mean + noisy * (0.5 * out["log_variance"]).exp() * z,
                "pred_xstart": out["pred_xstart"],
            }
        if call.cond_fn is not None:
            out = self.condition_score(call.cond_fn, out, x, t, model_kwargs=call.model_kwargs)
        x_start = out["pred_xstart"]
        eps = self._predict_eps_from_xstart(x, t, x_start)
        if call.kind == "reverse":
            bar = self._at("alphas_cumprod_next", t, x)
            return {"sample": x_start * bar.sqrt() + (1 - bar).sqrt() * eps, "pred_xstart": x_start}
        bar, bar_prev = self._at("alphas_cumprod", t, x), self._at("alphas_cumprod_prev", t, x)
        sigma = call.eta * ((1 - bar_prev) / (1 - bar)).sqrt() * (1 - bar / bar_prev).sqrt()
        mean = x_start * bar_prev.sqrt() + (1 - bar_prev - sigma**2).sqrt() * eps
        return {"sample": mean + noisy * sigma * call.source.z(order, x), "pred_xstart": x_start}

    def _progressive(self, call: Call) -> Iterator[dict[str, Tensor]]:
        """Yield the result of each step, by this object's own p_sample or ddim_sample."""
        x = self._start(call)
        method = getattr(self, f"{call.kind}_sample")
        for i in tqdm(range(self.num_timesteps)[::-1], disable=not call.progress):
            t = torch.full((len(x),), i, device=x.device, dtype=torch.int64)
            with torch.no_grad():
                out = method(call.model, x, t, **call.arguments())
            yield out
            x = out["sample"]

    def _loop(self, call: Call) -> Tensor:
        """Return the last state: one run of `Sampler` where that does the same, else the progressive loop's."""
        name = f"{call.kind}_sample"
        if overrides(self, (*_PARTS, name, f"{name}_loop_progressive")) or not self._runs_whole(call):
            steps = getattr(self, f"{name}_loop_progressive")
            options = {**call.arguments(), "noise": call.noise, "device": call.device, "progress": call.progress}
            out: dict[str, Tensor] = {}
            for out in steps(call.model, call.shape, **options):  # noqa: B007
                pass
            return out["sample"]
        x_T = self._start(call)
        kwargs = dict(call.model_kwargs or {})
        labels = kwargs.pop("class_labels", None)
        with torch.no_grad(), tqdm(total=self.num_timesteps, disable=not call.progress) as bar:
            return replay(
                self._sampler(call, x_T),
                call.source,
                x_T,
                # The originals draw a z at every step, even at t = 0 and where eta = 0 multiplies it.
                [True] * self.num_timesteps,
                lambda _: bar.update() and None,
                class_labels=labels,
                model_kwargs=kwargs,
            )

    def _start(self, call: Call) -> Tensor:
        shape = call.shape
        require(isinstance(shape, (tuple, list)), f"shape must be a tuple or a list, got {type(shape).__name__}")
        if call.noise is not None:
            return call.noise
        device = next(call.model.parameters()).device if call.device is None else call.device
        return call.source.start(torch.empty(*shape, device=device))

    def _runs_whole(self, call: Call) -> bool:
        """Whether `Sampler` gives the original's result: nothing but rows, and no random draws in the network."""
        return (
            call.plain
            and isinstance(call.model, nn.Module)
            and not draws_randomly(call.model)
            and self._rows(call.kind, call.eta) is not None
            and (call.noise is None or call.noise.dtype == torch.float32)
            and all(isinstance(value, (Tensor, Hashable)) for value in (call.model_kwargs or {}).values())
        )

    def _rows(self, kind: str, eta: float) -> Tensor | None:
        """Return the rows of a kind of step, row t for timestep t, or None where a coefficient is not finite."""
        if (kind, eta) not in self._rows_of:
            if torch.compiler.is_compiling():
                # It cannot trace the check below, and fuses the plain form itself.
                return None
            with torch.inference_mode(False), torch.no_grad():
                rows = self._build_rows(kind, eta)
            self._rows_of[kind, eta] = rows if rows.isfinite().all() else None
        return self._rows_of[kind, eta]

    def _build_rows(self, kind: str, eta: float) -> Tensor:
        if kind == "p":
            return tables.p_rows(self._tables, self.model_mean_type, self.model_var_type)
        if kind == "ddim":
            return tables.ddim_rows(self._tables, self.model_mean_type, eta)
        return tables.ddim_reverse_rows(self._tables, self.model_mean_type)

    def _flags(self, call: Call) -> dict[str, Any]:
        return {
            "clip": call.clip,
            "learned": self.model_var_type in tables.LEARNED,
            "use_m": call.kind == "p" and self.model_mean_type is ModelMeanType.PREVIOUS_X,
        }

    def _sampler(self, call: Call, x_T: Tensor) -> Sampler:
        network, shape = look_through(call.model), tuple(x_T.shape[1:])
        key = (call.kind, call.eta, call.clip, self.rescale_timesteps, network, network.training, shape, x_T.device)
        rows = self._rows(call.kind, call.eta)
        assert rows is not None
        timesteps = self._scale_timesteps(torch.arange(self.num_timesteps, device="cpu")).flip(0)
        table = Table(rows.flip(0), timesteps, name=f"openai-{call.kind}", **self._flags(call))
        return self._samplers.get(
            key, network, table, shape, batch=len(x_T), device=x_T.device, options=self.sampler_options
        )
