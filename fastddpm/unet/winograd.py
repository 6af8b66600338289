"""3x3 convolutions by Winograd's minimal filtering F(4x4, 3x3): 36 products for 16 outputs instead of 144.

Y = A^T [ (G g G^T) * (B^T d B) ] A for each tile of 6x6 inputs d and 4x4 outputs Y, the products being one batched
matrix multiplication over channels (Lavin & Gray 2016, arXiv:1509.09308, section 4.1). The transforms are sums of
slices of channels-last images, written for torch.compile to fuse: uncompiled they cost more than they save.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

Transform = Callable[[Sequence[Tensor]], list[Tensor]]

TILE = 4
# Filter transform for the interpolation points 0, 1, -1, 2, -2 and infinity.
_G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)


class _Winograd(nn.Module):
    """A convolution whose filter is transformed (in float64, rounded once) for the points that its outputs need."""

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d, points: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("weight", _transform_filter(conv.weight, points), persistent=False)
        self.register_buffer("bias", conv.bias, persistent=False)

    def finish(self, tiles: Tensor, transform: Transform) -> Tensor:
        """Transformed tiles -> [B, C_out, H, W], channels last."""
        return (_multiply(tiles, self.weight, transform) + self.bias).permute(0, 3, 1, 2)


class WinogradConv2d(_Winograd):
    """A 3x3 convolution with stride 1 and padding 1, of images whose sizes are multiples of 4; float32."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv, range(6))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, H, W], channels last."""
        return self.finish(_cut(x, 6, TILE, _transform_input), _transform_output)


class WinogradUpsample(_Winograd):
    """Nearest upsampling by 2 and the 3x3 convolution behind it, of images whose sizes are multiples of 2; float32.

    The 6 inputs of an upsampled tile are 4 pixels, b and c twice, for which the third of the six products is zero:
    25 products are left of 36.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv, (0, 1, 3, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, 2H, 2W], channels last."""
        return self.finish(_cut(x, 4, TILE // 2, _transform_upsampled), _transform_upsampled_output)


def fits(conv: nn.Conv2d) -> bool:
    """Whether a convolution is one that the classes above express."""
    return (
        (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and conv.bias is not None
        and conv.weight.dtype == torch.float32
    )


def _transform_filter(weight: Tensor, kept: Sequence[int]) -> Tensor:
    """(G g G^T)^T: [C_out, C_in, 3, 3] -> [n * n, C_in, C_out], for the n of the six points that are kept."""
    g = torch.tensor(_G, dtype=torch.float64, device=weight.device)[list(kept)]
    u = torch.einsum("ia,oqab,jb->jiqo", g, weight.detach().double(), g)
    return u.flatten(0, 1).to(weight.dtype).contiguous()


def _cut(x: Tensor, size: int, step: int, transform: Transform) -> Tensor:
    """Cut a zero-padded image into tiles, size x size every `step` pixels, and transform both sides of each.

    Returns:
        [n, n, B, H / step, W / step, C] for a transform that returns n tensors; by column, then by row.
    """
    # cat, not stack: Inductor takes what has a dimension of 1 in the place of channels for channels last, and puts the
    # points innermost.
    image = functional.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # [B, H + 2, W + 2, C]
    rows = torch.cat(transform(_windows(image, 1, size, step)))  # [n * B, H / step, W + 2, C]
    columns = transform(_windows(rows, 2, size, step))  # n x [n * B, H / step, W / step, C]
    return torch.cat(columns).unflatten(0, (len(columns), len(columns), -1))


def _windows(x: Tensor, dim: int, count: int, step: int) -> list[Tensor]:
    """Inputs 0 to count - 1 of every tile along a dimension."""
    size, stride = list(x.shape), list(x.stride())
    size[dim] = (size[dim] - count) // step + 1
    stride[dim] *= step
    # Inductor lays out what it computes as it likes, not with channels innermost, unless somebody looks at its strides.
    return [x.as_strided(size, stride, i * x.stride(dim)) for i in range(count)]


def _transform_input(d: Sequence[Tensor]) -> list[Tensor]:
    """B^T d."""
    even, odd = d[4] - 4 * d[2], d[3] - 4 * d[1]
    outer, inner = d[4] - d[2], 2 * (d[3] - d[1])
    return [
        4 * d[0] - 5 * d[2] + d[4],
        even + odd,
        even - odd,
        outer + inner,
        outer - inner,
        4 * d[1] - 5 * d[3] + d[5],
    ]


def _transform_upsampled(d: Sequence[Tensor]) -> list[Tensor]:
    """B^T (a, b, b, c, c, d), without its third row, which is zero."""
    a, b, c, e = d
    return [4 * a - 5 * b + c, 2 * (c - 4 * b), 3 * (c - b), b - c, 4 * b - 5 * c + e]


def _transform_output(m: Sequence[Tensor]) -> list[Tensor]:
    """A^T m."""
    sum_1, difference_1, sum_2, difference_2 = m[1] + m[2], m[1] - m[2], m[3] + m[4], m[3] - m[4]
    return [
        m[0] + sum_1 + sum_2,
        difference_1 + 2 * difference_2,
        sum_1 + 4 * sum_2,
        difference_1 + 8 * difference_2 + m[5],
    ]


def _transform_upsampled_output(m: Sequence[Tensor]) -> list[Tensor]:
    """A^T m, where the third product is zero and left out."""
    sum_2, difference_2 = m[2] + m[3], m[2] - m[3]
    return [m[0] + m[1] + sum_2, m[1] + 2 * difference_2, m[1] + 4 * sum_2, m[1] + 8 * difference_2 + m[4]]


def _multiply(tiles: Tensor, weight: Tensor, transform: Transform) -> Tensor:
    """Products over channels and back to the image: [n, n, B, h, w, C_in] -> [B, 4h, 4w, C_out]."""
    n, _, B, h, w, _ = tiles.shape
    products = torch.bmm(tiles.flatten(0, 1).flatten(1, 3), weight).reshape(n, n, B, h, w, -1)
    columns = torch.stack(transform(products.unbind(0)), dim=4)  # [n, B, h, w, 4, C_out]
    return torch.stack(transform(columns.unbind(0)), dim=2).reshape(B, h * TILE, w * TILE, -1)
