"""``fastddpm convert``: bring a model of another library into this library's format."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from fastddpm.checks import DTYPES
from fastddpm.cli.parser import examples

USAGE = "%(prog)s SOURCE DESTINATION [options]"
DESCRIPTION = """Convert a model of another library: a diffusers folder (DDPMPipeline or UNet2DModel), or a checkpoint
of OpenAI's improved-diffusion or guided-diffusion, of latent-diffusion, or of Ho et al.'s code in PyTorch. Nothing in a
checkpoint is executed: files that hold more than tensors are refused. Its networks are found by their parameters'
names, whatever stands before them, and a moving average is preferred. A network is converted exactly or not at all."""

EPILOG = """denoising-diffusion-pytorch's own Unet is another architecture: sample it through
fastddpm.integrations.lucidrains. Checkpoints of OpenAI and of Ho et al. do not say how they were trained:
repeat the flags of the training script, which default to those of improved-diffusion.

""" + examples(
    "fastddpm convert ddpm-cifar10-32 converted",
    "fastddpm convert ema_0.9999_050000.pt converted --num-heads 4 --image-size 64",
    "fastddpm sample --model converted",
)


# Arguments of `integrations.convert.convert`, each an option of the same name.
_OPTIONS = ("layout", "config", "weights", "prefix", "prediction")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("source", type=Path, help="a folder, or a .pt, .pth, .ckpt, .bin or .safetensors file")
    parser.add_argument("destination", type=Path, help="a folder that holds no model yet")
    parser.add_argument("--layout", choices=("flat", "pipeline"), default="flat", help="pipeline: as DDPMPipeline's")
    parser.add_argument("--dtype", choices=DTYPES, help="to store (default: float32)")
    parser.add_argument("--config", type=Path, help="config.json, for a .pt with the weights of a UNet2DModel")
    weights = "take a moving average of the weights where there is one (default), or the last weights"
    parser.add_argument("--weights", choices=("average", "last"), default="average", help=weights)
    parser.add_argument("--prefix", help="what stands before the names of the network to take, of several")
    parser.add_argument("--prediction", choices=("epsilon", "x_0", "v"), help="for files that do not say it")
    openai = parser.add_argument_group("what OpenAI's and Ho et al.'s scripts were given in training")
    heads = openai.add_mutually_exclusive_group()
    heads.add_argument("--num-heads", type=int, help="of every attention layer")
    heads.add_argument("--num-head-channels", type=int, help="width of every head")
    openai.add_argument("--new-attention-order", action="store_true", help="use_new_attention_order")
    openai.add_argument("--image-size", type=int, help="of the training images")
    openai.add_argument("--diffusion-steps", type=int, default=1000, help="default: 1000")
    openai.add_argument("--noise-schedule", choices=("linear", "cosine"), default="linear", help="default: linear")
    openai.add_argument("--rescale-timesteps", action=argparse.BooleanOptionalAction, help="matters if not 1000 steps")
    openai.add_argument("--predict-xstart", action="store_true", help="the network predicts x_0")
    openai.add_argument("--sigma-small", action="store_true", help="the smaller of the two fixed variances")


def run(args: argparse.Namespace) -> int:
    """Convert, write and say what it was."""
    import torch

    from fastddpm.integrations.convert import convert
    from fastddpm.integrations.openai.unet_weights import OpenAIFlags

    flags = OpenAIFlags(**{flag.name: getattr(args, flag.name) for flag in dataclasses.fields(OpenAIFlags)})
    converted = convert(
        args.source,
        args.destination,
        dtype=None if args.dtype is None else getattr(torch, args.dtype),
        flags=flags,
        **{name: getattr(args, name) for name in _OPTIONS},
    )
    print(f"{args.destination}: {_describe(converted)}")
    if converted.taken is not None and (converted.taken.prefix or converted.others):
        print(f"taken: {converted.taken}")
    for other in converted.others:
        print(f"left:  {other}")
    return 0


def _describe(converted: Any) -> str:
    trained = "schedule unknown"
    if diffusion := converted.model.diffusion:
        betas = "its own betas" if diffusion.trained_betas else f"{diffusion.beta_schedule} betas"
        trained = f"T = {diffusion.num_timesteps}, {betas}, predicts {diffusion.prediction_type}"
        trained += f", variance {diffusion.variance_type}"
    count = sum(parameter.numel() for parameter in converted.model.parameters())
    return f"network of {count / 1e6:.1f} M parameters from {converted.kind} ({trained})"
