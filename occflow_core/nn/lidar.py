"""From voxels of LiDAR points to a map seen from above, under the parameter names of mmdet3d (v1.0.0rc6).

B batch, M voxels, C channels, X Y Z voxels along the car's axes. Volumes and maps run z, y, x, as there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops

STRIDE, LAYERS = 8, 40  # LiDAR voxels along x and y that make one cell of the map; voxels along z
_PADDINGS = ((1, 1, 1), (1, 1, 1), (0, 1, 1))  # of the convolutions that thin, z first


class SparseConv(nn.Module):
    """Weights of a sparse convolution without bias, laid out as spconv stores them: (out, k, k, k, in)."""

    def __init__(self, taken: int, given: int, kernel: Sequence[int] = (3, 3, 3)):
        super().__init__()
        self.kernel = tuple(kernel)
        self.weight = nn.Parameter(torch.empty(given, *kernel, taken))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = self.weight[0].numel() ** -0.5  # as torch and spconv draw convolutions
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, features: Tensor, taps: Tensor) -> Tensor:
        """Features (M, C) and taps as `ops.sparse_conv` makes them -> (M', C')."""
        return ops.convolve(features, taps, self.weight.permute(0, 4, 1, 2, 3))


class SparseEncoder(nn.Module):
    """Voxels (M, C) in a grid of 41 x Y x X -> a map (B, 16 width, Y/8, X/8): SECOND's middle (Sensors 18(10), 2018).

    As mmdet3d's `SparseEncoder` with basic blocks: four stages of 1, 2, 4, 8 times `width` channels, each but the last
    thinned by 2 along all axes. Channel c at height h of the two that are left is channel 2 c + h of the map.
    """

    def __init__(self, taken: int, width: int):
        super().__init__()
        self.conv_input = _normed(taken, width)
        stages = {}
        for k in range(4):
            inner = width << k
            thin = [_normed(inner, 2 * inner)] if k < 3 else []
            stages[f"encoder_layer{k + 1}"] = nn.ModuleList([_Block(inner), _Block(inner), *thin])
        self.encoder_layers = nn.ModuleDict(stages)
        self.conv_out = _normed(8 * width, 8 * width, (3, 1, 1))

    def forward(self, sites: Tensor, features: Tensor, lanes: int, shape: Sequence[int]) -> Tensor:
        """sites (M, 4) int64: lane, z, y, x. lanes: B. shape: of the grid, (41, Y, X)."""
        taps = ops.submanifold_taps(sites, shape, (3, 3, 3))
        features = _apply(self.conv_input, features, taps)
        for k, blocks in enumerate(self.encoder_layers.values()):
            for block in blocks[:2]:
                features = block(features, taps)
            if k < 3:
                sites, shape, taps = ops.regular_taps(sites, shape, (3, 3, 3), (2, 2, 2), _PADDINGS[k])
                features = _apply(blocks[2], features, taps)
                taps = ops.submanifold_taps(sites, shape, (3, 3, 3))
        sites, shape, taps = ops.regular_taps(sites, shape, (3, 1, 1), (2, 1, 1))
        return ops.dense(sites, _apply(self.conv_out, features, taps), lanes, shape).flatten(1, 2)


class _Block(nn.Module):
    """ResNet's basic block, on the sites that there are."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.bn1 = SparseConv(channels, channels), _norm1d(channels)
        self.conv2, self.bn2 = SparseConv(channels, channels), _norm1d(channels)

    def forward(self, features: Tensor, taps: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(features, taps)))
        return F.relu(self.bn2(self.conv2(y, taps)) + features)


class Second(nn.Module):
    """A map (B, C, Y, X) -> two, of `width` channels at its size and 2 `width` at half of it (mmdet3d `SECOND`)."""

    def __init__(self, taken: int, width: int, depth: int = 5):
        """depth: convolutions of a block after its first."""
        super().__init__()
        blocks = []
        for inner, before, stride in ((width, taken, 1), (2 * width, width, 2)):
            layers = [nn.Conv2d(before, inner, 3, stride, 1, bias=False), _norm2d(inner), nn.ReLU()]
            for _ in range(depth):
                layers += [nn.Conv2d(inner, inner, 3, padding=1, bias=False), _norm2d(inner), nn.ReLU()]
            blocks.append(nn.Sequential(*layers))
        self.blocks = nn.ModuleList(blocks)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        _kaiming(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        return maps


class SecondFPN(nn.Module):
    """What `Second` gives -> one map of 4 `width` channels at the finer size (mmdet3d `SECONDFPN`)."""

    def __init__(self, width: int):
        super().__init__()
        same = nn.Conv2d(width, 2 * width, 1, bias=False)
        doubled = nn.ConvTranspose2d(2 * width, 2 * width, 2, 2, bias=False)
        self.deblocks = nn.ModuleList(nn.Sequential(x, _norm2d(2 * width), nn.ReLU()) for x in (same, doubled))
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        _kaiming(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return torch.cat([deblock(x) for deblock, x in zip(self.deblocks, maps, strict=True)], dim=1)


def _normed(taken: int, given: int, kernel: Sequence[int] = (3, 3, 3)) -> nn.ModuleList:
    return nn.ModuleList([SparseConv(taken, given, kernel), _norm1d(given)])


def _apply(normed: nn.ModuleList, features: Tensor, taps: Tensor) -> Tensor:
    conv, norm = normed
    return F.relu(norm(conv(features, taps)))


def _norm1d(channels: int) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(channels, eps=1e-3, momentum=0.01)


def _norm2d(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def _kaiming(module: nn.Module) -> None:
    """As mmcv's `KaimingInit` draws."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
