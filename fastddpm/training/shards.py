"""A network in several processes: whole in each, or each holding a share of every tensor (fully_shard).

Weights, gradients, moments and average are shares of the same form, so the optimiser and the average work on them as on
whole tensors. What is saved is whole: no file says by how many processes it was written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastddpm.machine.ranks import Ranks
from fastddpm.unet.blocks import Attention, Downsample, ResnetBlock, Upsample
from fastddpm.unet.unet import UNet


def shard(model: UNet, device: torch.device, ranks: Ranks) -> None:
    """Divide a network among connected processes; each block is whole only while it computes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if device.type == "cuda":
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (ranks.world,))
    # One unit, since they are computed before the blocks that they belong to.
    fully_shard([resnet.time_emb_proj for resnet in model.resnets()], mesh=mesh)
    for block in model.modules():
        if isinstance(block, (ResnetBlock, Attention, Downsample, Upsample)):
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def gathered(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Return whole copies on rank 0's CPU, one after the other, and nothing on the other ranks; all ranks call it."""
    copies = {}
    for name, tensor in tensors.items():
        whole = tensor.detach()
        if hasattr(whole, "full_tensor"):
            whole = whole.full_tensor()
        if ranks.rank == 0:
            copies[name] = whole.cpu().clone(memory_format=torch.contiguous_format)
    return copies


@torch.no_grad()
def fill(tensor: Any, whole: Tensor) -> Tensor:
    """Copy a whole tensor, or this process's share of it, into ``tensor`` and return that."""
    if hasattr(tensor, "placements"):
        from torch.distributed.tensor import distribute_tensor

        # Without a source: every process has the whole tensor, and none needs to send.
        whole = distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
    return tensor.copy_(whole)
