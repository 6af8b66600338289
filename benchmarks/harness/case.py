"""What a benchmark measures: cases, and the providers that are compared."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastddpm.checks import one_of
from fastddpm.machine import hardware as machine

# The benchmarks, in the order in which the report has them.
NAMES = ("sampling", "unet", "p_sample", "q_sample", "randn", "training_step", "drop_in", "settings")
# Why a provider has no row at all, not even one that gives a reason.
NOT_ASKED = "not part of this case"


@dataclass(frozen=True)
class Case:
    """One set of sizes.

    Attributes:
        network: name of the network, see `networks.build`; empty where none runs.
        steps: network calls per sample; 0 where no loop runs.
        sampler: "ddpm" or "ddim".
        device: "cpu" or "cuda".
        sweep: part of a series over `steps`, which only the providers marked `sweep` run.
        original: what is replaced, where the benchmark is a drop-in.
    """

    benchmark: str
    batch: int
    shape: tuple[int, ...]
    network: str = ""
    steps: int = 0
    sampler: str = "ddpm"
    device: str = "cpu"
    sweep: bool = False
    original: str = ""

    @property
    def id(self) -> str:
        """Short name, such as "sampling-cifar10-B16-S20-ddpm"."""
        size = "x".join(map(str, self.shape)) if not self.network else self.network
        parts = [self.benchmark, *([self.original] if self.original else []), size, f"B{self.batch}"]
        parts += [f"S{self.steps}", self.sampler] if self.steps else []
        return "-".join(parts)

    @property
    def compiles(self) -> bool:
        """Whether a UNet runs as compiled code; the tiny one only shows that everything works."""
        return self.network != "tiny"

    @property
    def full_shape(self) -> tuple[int, ...]:
        """(B, ...)."""
        return (self.batch, *self.shape)

    @property
    def n_elements(self) -> int:
        """Elements of x_t."""
        return math.prod(self.full_shape)


@dataclass
class Prepared:
    """A provider made ready for a case.

    Attributes:
        evaluate: runs once more, on declared inputs, and returns what the gate needs to judge it.
    """

    run: Callable[[], Any]
    evaluate: Callable[[], dict[str, Tensor]]


def not_installed(needs: Mapping[str, str]) -> str | None:
    """Return what to install, given import names and what pip calls them; None where nothing is missing."""
    missing = [pip for module, pip in needs.items() if importlib.util.find_spec(module) is None]
    return f"not installed: pip install {' '.join(missing)}" if missing else None


@dataclass(frozen=True)
class Provider:
    """An implementation of what is measured.

    Attributes:
        name: unique in its benchmark.
        build: makes it ready for a case; may take long.
        needs: packages without which it cannot run: import name to what pip calls it.
        compiled: its first call compiles.
        skips: returns why a case is not for this provider; None if it is.
        tolerance: what its gate allows, where that is not its dtype's usual.
        sweep: takes part in series over the number of steps.
    """

    name: str
    build: Callable[[Case], Prepared]
    dtype: str = "float32"
    needs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    compiled: bool = False
    skips: Callable[[Case], str | None] = lambda case: None
    tolerance: float | None = None
    sweep: bool = False

    def why_not(self, case: Case) -> str | None:
        """Return why this provider has no number for a case; None if it can run."""
        if case.sweep and not self.sweep:
            return NOT_ASKED
        return not_installed(self.needs) or self.skips(case) or self._emulated(case)

    def _emulated(self, case: Case) -> str | None:
        """A network in a type that the processor lacks takes twenty times as long, and shows nothing."""
        runs = case.device != "cpu" or case.network in ("", "tiny")
        if runs or self.dtype != "bfloat16" or machine.cpu()["native_bfloat16"]:
            return None
        return "this processor has no bfloat16 instructions"


@dataclass(frozen=True)
class Check:
    """A gate's verdict.

    Attributes:
        error: what was found, in the unit of `tolerance`.
    """

    error: float
    tolerance: float
    what: str

    @property
    def ok(self) -> bool:
        """Whether the error is allowed; NaN is not."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Benchmark:
    """A thing to measure, with every implementation of it.

    Attributes:
        name: the stem of its benchmark.
        providers: the first is the baseline of the ratios.
        second: a provider whose ratios are printed beside the baseline's, by the dtype of the row.
        cases: (device, smoke) to the cases.
        check: the gate: (case, provider, what `Prepared.evaluate` returned) to a verdict.
        traffic: bytes that the work must move at least; None where memory is not the question.
        isolated: each provider runs in a process of its own.
    """

    name: str
    title: str
    providers: tuple[Provider, ...]
    cases: Callable[[str, bool], list[Case]]
    check: Callable[[Case, Provider, dict[str, Tensor]], Check]
    traffic: Callable[[Case, Provider], int] | None = None
    isolated: bool = False
    second: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def provider(self, name: str) -> Provider:
        """Return a provider by its name.

        Raises:
            ValueError: there is none of that name.
        """
        providers = {provider.name: provider for provider in self.providers}
        return providers[one_of(f"provider of {self.name}", name, providers)]


def find(name: str) -> Benchmark:
    """Return a benchmark of `NAMES`; its module, and the libraries that it compares, are imported here.

    Raises:
        ValueError: there is none of that name.
    """
    one_of("benchmark", name, NAMES)
    benchmark: Benchmark = importlib.import_module(f"fastddpm.benchmarks.bench_{name}").BENCHMARK
    return benchmark
