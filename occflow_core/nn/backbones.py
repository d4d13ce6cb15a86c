"""Backbones without their classifiers: ResNet (arXiv 1512.03385) with torchvision's names, EfficientNet-Lite.

M pictures, C channels, H W pixels.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# What a picture's RGB is normalised by, (mean, standard deviation), before it enters a backbone
IMAGENET = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # torchvision's weights
LITE = (127.0, 127.0, 127.0), (128.0, 128.0, 128.0)  # tensorflow/tpu, `efficientnet/lite/efficientnet_lite_builder.py`


class ResNet(nn.Module):
    """Pictures (M, 3, H, W) -> four maps (M, C_i, H / s_i, W / s_i) at strides s = 4, 8, 16, 32.

    depth: 18 (basic blocks, C = w, 2w, 4w, 8w) or 50 (bottlenecks with the stride on the 3x3 convolution, C = 4w, 8w,
    16w, 32w), where w = `width`; 64 is the published one. ValueError for other depths.
    """

    normal = IMAGENET

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


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0: pictures (M, 3, H, W) -> maps (M, C_i, H / s_i, W / s_i), C = 24 40 112 320, s = 4 8 16 32.

    EfficientNet-B0 (arXiv 1905.11946) without squeeze-and-excitation and with ReLU6, as github.com/tensorflow/tpu has
    it in `models/official/efficientnet/lite`. ValueError unless H and W are multiples of 32, where the odd cell of its
    "same" padding lies on the right and below.
    """

    normal, channels = LITE, (24, 40, 112, 320)

    def __init__(self):
        super().__init__()
        self.stem = _Stem(3, 32, 3, stride=2)
        taken, blocks = 32, []
        for expand, kernel, stride, given, count in _LITE0:
            for place in range(count):
                blocks.append(_Inverted(taken, given, expand, kernel, stride if place == 0 else 1))
                taken = given
        self.blocks = nn.ModuleList(blocks)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Random weights as the authors draw them."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, pictures: Tensor) -> list[Tensor]:
        assert pictures.ndim == 4 and pictures.shape[1] == 3, pictures.shape
        if pictures.shape[2] % 32 or pictures.shape[3] % 32:
            raise ValueError(f"efficientnet: height and width must be multiples of 32, got {tuple(pictures.shape[2:])}")
        x, maps = self.stem(pictures), []
        for place, block in enumerate(self.blocks):
            x = block(x)
            if place in _TAPS:
                maps.append(x)
        return maps


class _Stem(nn.Module):
    """Convolution, batch norm and (where it is `active`) ReLU6."""

    def __init__(self, taken: int, given: int, kernel: int, stride: int = 1, groups: int = 1, active: bool = True):
        super().__init__()
        self.active = active
        # "same": at stride 2 an even size lacks kernel - 2 cells, and the odd one of them lies on the right and below
        self.pad = ((kernel - 2) // 2, (kernel - 1) // 2) * 2 if stride == 2 else (0, 0, 0, 0)
        padding = 0 if stride == 2 else kernel // 2
        self.conv = nn.Conv2d(taken, given, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(given, eps=1e-3, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(F.pad(x, self.pad) if any(self.pad) else x))
        return F.relu6(x) if self.active else x


class _Inverted(nn.Module):
    """Inverted bottleneck (arXiv 1801.04381): widen, look around channel by channel, narrow."""

    def __init__(self, taken: int, given: int, expand: int, kernel: int, stride: int):
        super().__init__()
        inner = taken * expand
        self.expand = _Stem(taken, inner, 1) if expand > 1 else None
        self.depthwise = _Stem(inner, inner, kernel, stride, groups=inner)
        self.project = _Stem(inner, given, 1, active=False)
        self.shortcut = stride == 1 and taken == given

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x)
        y = self.project(self.depthwise(y))
        return x + y if self.shortcut else y


_LITE0 = (  # expansion, kernel, stride, channels, blocks
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
_TAPS = (2, 4, 10, 15)  # the last block at each stride

# Names of github.com/ml-illustrated/EfficientNet-Lite-PyTorch -> ours (`systems.base.translate` reads such tables)
LITE_NAMES: Mapping[str, str | None] = {
    "_conv_stem.": "stem.conv.",
    "_bn0.": "stem.bn.",
    "_blocks.#._expand_conv.": "blocks.#.expand.conv.",
    "_blocks.#._bn0.": "blocks.#.expand.bn.",
    "_blocks.#._depthwise_conv.": "blocks.#.depthwise.conv.",
    "_blocks.#._bn1.": "blocks.#.depthwise.bn.",
    "_blocks.#._project_conv.": "blocks.#.project.conv.",
    "_blocks.#._bn2.": "blocks.#.project.bn.",
    "_conv_head.": None,  # the classifier's
    "_bn1.": None,
    "_fc.": None,
}

BACKBONES: Mapping[str, Callable[[], nn.Module]] = {
    "resnet18": partial(ResNet, 18),
    "resnet18-half": partial(ResNet, 18, 32),  # half the channels
    "resnet50": partial(ResNet, 50),
    "efficientnet-lite0": EfficientNetLite,
}
