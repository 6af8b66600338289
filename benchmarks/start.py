"""From the start of a process to its first images, and the calls from which one library has overtaken another.

`python -m fastddpm.benchmarks.start` draws each case in processes of their own, in interleaved rounds: with an empty
cache, and with what an earlier process has left there. A process imports, loads the network from a folder, draws one
batch, and then more of them, which shows what a call costs once everything is ready.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fastddpm.benchmarks.harness.case import not_installed

STEPS = 20
CASES = {"digits": 16, "cifar10": 1}
# Kept code: what an earlier process may have left.
CACHES = ("FASTDDPM_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "OPENVINO_CACHE_DIR")

Draw = Callable[[], object]


def _fastddpm(folder: Path, batch: int) -> Draw:
    import fastddpm

    return lambda: fastddpm.sample(folder, seeds=range(batch), sampler="ddpm", steps=STEPS, batch_size=batch)


def _sampler(folder: Path, batch: int) -> Draw:
    """One sampler that is kept, and compiled code waited for."""
    import fastddpm
    from fastddpm.tables.by_name import make_table

    model = fastddpm.load(folder)
    assert model.diffusion is not None
    sampler = fastddpm.Sampler(model, make_table("ddpm", model.diffusion, steps=STEPS), _shape(model), compile=True)
    return lambda: sampler.sample(seeds=range(batch))


def diffusers_loop(
    folder: Path,
    batch: int,
    prepare: Callable[[Any], Any] = lambda unet: lambda *args, **labels: unet(*args, **labels).sample,
    *,
    steps: int = STEPS,
    scheduler: str = "DDPMScheduler",
    **options: Any,
) -> Draw:
    """A loop of diffusers' network, as the function that `prepare` makes of it, and of a scheduler with options."""
    diffusers: Any = importlib.import_module("diffusers")
    unet = diffusers.UNet2DModel.from_pretrained(folder).eval()
    schedule = getattr(diffusers, scheduler).from_pretrained(folder, **options)
    shape, labels = _shape(unet), _labels(unet.config, batch)
    network = prepare(unet)

    @torch.no_grad()
    def draw() -> object:
        schedule.set_timesteps(steps)
        x = torch.randn(batch, *shape)
        for t in schedule.timesteps:
            x = schedule.step(network(x, t, **labels), t, x).prev_sample
        return x

    return draw


def _tuned(folder: Path, batch: int) -> Draw:
    """Its documented fast settings for a CPU."""
    from fastddpm.benchmarks.peers.networks import compile_frozen

    def prepare(unet: Any) -> Any:
        compiled = compile_frozen(unet.to(memory_format=torch.channels_last))
        return lambda x, t, **labels: compiled(x.contiguous(memory_format=torch.channels_last), t, **labels).sample

    return diffusers_loop(folder, batch, prepare)


def _openvino(folder: Path, batch: int) -> Draw:
    from fastddpm.benchmarks.peers import openvino
    from fastddpm.benchmarks.peers.networks import WithLabels

    def prepare(unet: Any) -> Any:
        model = WithLabels(unet, _labels(unet.config, batch).get("class_labels"))
        cache = Path(os.environ["OPENVINO_CACHE_DIR"])
        predict = openvino.compile_module(model, (batch, *_shape(unet)), "f32", cache)
        return lambda x, t, **labels: predict(x, t.expand(batch))

    return diffusers_loop(folder, batch, prepare)


PROVIDERS = {
    "fastddpm": _fastddpm,
    "fastddpm-compiled": _sampler,
    "diffusers": diffusers_loop,
    "diffusers-tuned": _tuned,
    "openvino": _openvino,
}
NEEDS = {"diffusers": {"diffusers", "diffusers-tuned", "openvino"}, "openvino": {"openvino"}}


def _shape(model: Any) -> tuple[int, int, int]:
    return (model.config.in_channels, model.config.sample_size, model.config.sample_size)


def _labels(config: Any, batch: int) -> dict[str, torch.Tensor]:
    classes = config.num_class_embeds
    return {} if classes is None else {"class_labels": torch.arange(batch) % (classes - 1)}


def folder_of(case: str, work: Path) -> Path:
    """A folder with the network of a case, which every provider reads."""
    from fastddpm.benchmarks.peers import networks

    from fastddpm.schedules.diffusion import DiffusionConfig
    from fastddpm.unet.load import SHIPPED

    if case in networks.TRAINED:
        return SHIPPED / case
    model = networks.build(case)
    model.diffusion = DiffusionConfig()
    model.save_pretrained(work / case)
    return work / case


class Start(NamedTuple):
    """Seconds: from the process's start to its first images, and a network call once everything is ready."""

    first: float
    call: float


def child(provider: str, folder: Path | str, batch: int, repeats: int) -> None:
    """Draw, print when the first images were there and what the later ones took."""
    draw = PROVIDERS[provider](Path(folder), batch)
    draw()
    first = time.time()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        draw()
        seconds.append(time.perf_counter() - start)
    print(json.dumps([first, statistics.median(seconds) / STEPS]), flush=True)


def measure(provider: str, folder: Path, batch: int, repeats: int, cache: Path, limit: float) -> Start | None:
    """Run one provider in a process of its own; None where it has not ended within the limit, in seconds."""
    environment = {**os.environ, **{name: str(cache / name.lower()) for name in CACHES}}
    for name in CACHES:
        (cache / name.lower()).mkdir(parents=True, exist_ok=True)
    draws = f"child({provider!r}, {str(folder)!r}, {batch}, {repeats})"
    command = [sys.executable, "-c", f"from fastddpm.benchmarks.start import child; {draws}"]
    started = time.time()
    try:
        run = subprocess.run(command, env=environment, timeout=limit, check=True, stdout=subprocess.PIPE, text=True)
    except subprocess.TimeoutExpired:
        return None
    first, call = json.loads(run.stdout.splitlines()[-1])
    return Start(first - started, call)


def overtakes(ours: Start, theirs: Start) -> float:
    """Network calls from which `ours` has taken less time in all than `theirs`; inf if never."""
    ahead = (ours.first - STEPS * ours.call) - (theirs.first - STEPS * theirs.call)
    if ahead <= 0:
        return 0 if ours.call <= theirs.call else math.inf
    return math.ceil(ahead / (theirs.call - ours.call)) if ours.call < theirs.call else math.inf


def compare(case: str, rounds: int, repeats: int, limit: float, chosen: list[str]) -> None:
    """Measure a case and print its table."""
    batch = CASES[case]
    found: dict[tuple[str, str], list[Start]] = {}
    with tempfile.TemporaryDirectory(prefix="fastddpm-start-") as work:
        folder = folder_of(case, Path(work))
        for round in range(rounds):
            for provider in chosen:
                cache = Path(work) / f"{provider}-{round}"
                for state in ("empty", "kept"):
                    print(f"{case}, round {round + 1} of {rounds}, {provider}, {state} cache", file=sys.stderr)
                    start = measure(provider, folder, batch, repeats, cache, limit)
                    if start is not None:
                        found.setdefault((provider, state), []).append(start)
    print(f"{case}, batch {batch}, {STEPS} network calls to the first images, {torch.get_num_threads()} threads")
    print("| | cache | first images | a call | faster in all than diffusers from | than openvino from |")
    print("|---|---|---:|---:|---:|---:|")
    medians = {key: Start(*map(statistics.median, zip(*starts, strict=True))) for key, starts in found.items()}
    for (provider, state), start in medians.items():
        spread = [s.first for s in found[provider, state]]
        calls = [
            "" if peer not in medians or peer[0] == provider else f"{overtakes(start, medians[peer]):.0f} calls"
            for peer in (("diffusers", "kept"), ("openvino", state))
        ]
        seconds = f"{start.first:.1f} s ({min(spread):.1f} to {max(spread):.1f})"
        print(f"| {provider} | {state} | {seconds} | {1000 * start.call:.1f} ms | {calls[0]} | {calls[1]} |")


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m fastddpm.benchmarks.start", description=__doc__)
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="default: all")
    parser.add_argument("--provider", action="append", choices=sorted(PROVIDERS), help="default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5, help="batches that a process draws after its first")
    parser.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="that one process may take")
    options = parser.parse_args(arguments)
    chosen = options.provider or list(PROVIDERS)
    for package, rows in NEEDS.items():
        without = sorted(rows.intersection(chosen))
        if without and (missing := not_installed({package: package})) is not None:
            print(f"without {', '.join(without)}: {missing}", file=sys.stderr)
            chosen = [provider for provider in chosen if provider not in rows]
    for case in options.case or list(CASES):
        compare(case, options.rounds, options.repeats, options.limit, chosen)


if __name__ == "__main__":
    main()
