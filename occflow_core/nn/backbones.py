"""ResNet (arXiv 1512.03385) with torchvision's parameter names, without its classifier.

M pictures, C channels, H W pixels.
"""

import torch
from torch import Tensor, nn


class ResNet(nn.Module):
    """Pictures (M, 3, H, W) -> four maps (M, C_i, H / s_i, W / s_i) at strides s = 4, 8, 16, 32.

    depth: 18 (basic blocks, C = w, 2w, 4w, 8w) or 50 (bottlenecks with the stride on the 3x3 convolution, C = 4w, 8w,
    16w, 32w), where w = `width`; 64 is the published one. ValueError for other depths.
    """

    def __init__(self, depth: int, width: int = 64):
        super().__init__()
        if depth not in _DEPTHS:
            raise ValueError(f"resnet: depth must be one of {sorted(_DEPTHS)}, got {depth}")
        block, counts = _DEPTHS[depth]
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        taken, self.channels = width, []
        for stage, count in enumerate(counts):
            inner = width * 2**stage
            blocks = []
            for place in range(count):
                blocks.append(block(taken, inner, stride=2 if stage > 0 and place == 0 else 1))
                taken = inner * block.growth
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            self.channels.append(taken)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Random weights as torchvision draws them."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pictures: Tensor) -> list[Tensor]:
        assert pictures.ndim == 4 and pictures.shape[1] == 3, pictures.shape
        x = self.maxpool(self.relu(self.bn1(self.conv1(pictures))))
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps


class _Basic(nn.Module):
    growth = 1

    def __init__(self, taken: int, inner: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(taken, inner, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(taken, inner * self.growth, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class _Bottleneck(nn.Module):
    growth = 4

    def __init__(self, taken: int, inner: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(taken, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, inner * self.growth, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(inner * self.growth)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(taken, inner * self.growth, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


def _shortcut(taken: int, given: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and taken == given:
        return None
    return nn.Sequential(nn.Conv2d(taken, given, 1, stride=stride, bias=False), nn.BatchNorm2d(given))


_DEPTHS = {18: (_Basic, (2, 2, 2, 2)), 50: (_Bottleneck, (3, 4, 6, 3))}
