"""Models by their id on the Hugging Face Hub: configurations and safetensors, from its cache where it has them."""

from __future__ import annotations

import re
from pathlib import Path

from fastddpm.checks import shown

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
_FOLDERS = ("", "unet/", "unet_ema/")
_PATTERNS = [
    *("model_index.json", "scheduler_config.json", "scheduler/scheduler_config.json"),
    *(f"{folder}config.json" for folder in _FOLDERS),
    *(f"{folder}diffusion_pytorch_model.safetensors" for folder in _FOLDERS),
    *(f"{folder}diffusion_pytorch_model-*-of-*.safetensors" for folder in _FOLDERS),
]


def is_hub_id(name: str) -> bool:
    """Tell whether a name may be a model of the Hub, "owner/model" or "owner/model@revision", and no mistaken path."""
    return _ID.fullmatch(name) is not None and not Path(name).parent.exists()


def snapshot(name: str, revision: str | None = None) -> Path:
    """Return the folder of a model of the Hub in its cache, downloading what is not there yet.

    Args:
        name: "owner/model", or "owner/model@revision".
        revision: a branch, tag or commit; default: the Hub's, usually main.

    Raises:
        ImportError: huggingface_hub is not installed.
        FileNotFoundError: the model is neither in the cache nor to be had, for the reason in the message.
        ValueError: two revisions are given.
    """
    match = _ID.fullmatch(name)
    if match is None:
        raise ValueError(f"no id of a model of the Hub: {shown(name)}")
    repository, named = match[1], match[2]
    if named and revision and named != revision:
        raise ValueError(f"{name} names a revision, and revision={revision!r} is another")
    revision = revision or named
    by_hand = f"hf download {repository}{f' --revision {revision}' if revision else ''} --local-dir DIR"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError(
            f"{name}: there is no such folder, and models of the Hugging Face Hub need huggingface_hub: "
            f"pip install 'fastddpm[hub]'; or download it elsewhere ({by_hand}) and load DIR"
        ) from None
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_PATTERNS))
    except Exception as error:
        reason = shown(str(error).strip().partition("\n")[0], 200)
        raise FileNotFoundError(
            f"{name}: there is no such folder, and the Hugging Face Hub's cache has no such model nor could it be "
            f"downloaded ({type(error).__name__}: {reason}); download it elsewhere ({by_hand}) and load DIR"
        ) from None
