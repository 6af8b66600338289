"""``fastddpm compile``: compile a network ahead of time, for this machine or for one without a compiler."""

from __future__ import annotations

import argparse
import time

from fastddpm.cli.parser import add_shared, examples, new_file, positive

DESCRIPTION = """Compile a network for a CPU: into the cache, where every later process finds it, or into a file. A file
is for machines of the same processor, torch and number of threads that need no compiler then; it holds native code,
which is run only where --compiled or Sampler(compiled=...) names it."""

EPILOG = examples(
    "fastddpm compile --model digits --batch 16",
    "fastddpm compile --model path/to/model --batch 1 --out model.pt2",
    "fastddpm sample --model path/to/model --batch 1 --compiled model.pt2",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_shared(parser, "model")
    parser.add_argument("--batch", type=positive, default=16, help="images per batch")
    parser.add_argument("--guided", action="store_true", help="for guidance, which takes two network rows per image")
    parser.add_argument("--shape", type=_shape, metavar="C,H,W", help="of what the network takes (default: its own)")
    parser.add_argument("--out", type=new_file, metavar="FILE", help="a file, NAME.pt2, instead of the cache")
    add_shared(parser, "dtype")


def run(args: argparse.Namespace) -> int:
    """Compile."""
    import torch

    from fastddpm.machine.building import Want
    from fastddpm.sampling.network import shape_of
    from fastddpm.unet.inference import UNetForms
    from fastddpm.unet.load import load

    model = load(args.model)
    dtype = model.dtype if args.dtype is None else getattr(torch, args.dtype)
    forms = UNetForms(model.to(dtype), torch.zeros(1), want=Want.NEVER, strict=True)
    channels, *size = args.shape or (model.config.in_channels, *shape_of(model)[1:])
    if channels != model.config.in_channels:
        raise ValueError(f"--shape has C = {channels}, and the network takes {model.config.in_channels} channels")
    x = torch.zeros(args.batch * (1 + args.guided), channels, *size, dtype=dtype)
    started = time.perf_counter()
    path = forms.build(x.contiguous(memory_format=torch.channels_last), args.out)
    print(f"{path}: {path.stat().st_size / (1 << 20):.1f} MiB, {time.perf_counter() - started:.0f} s")
    return 0


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split(",")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; write 3,32,32")
    return tuple(map(int, sizes))
