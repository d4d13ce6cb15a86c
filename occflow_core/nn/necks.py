"""Feature pyramids. M pictures, C channels, H W cells."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FPN(nn.Module):
    """Maps of a backbone, finest first -> as many maps of `channels` channels at the same sizes (arXiv 1612.03144).

    As mmdet builds it for the published systems: convolutions with bias, no norm, no activation, no extra level.
    """

    def __init__(self, taken: Sequence[int], channels: int):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in taken)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in taken)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        for module in (*self.lateral, *self.output):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        assert len(maps) == len(self.lateral), len(maps)
        sums = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for finer in range(len(sums) - 2, -1, -1):
            coarser = F.interpolate(sums[finer + 1], size=sums[finer].shape[-2:], mode="nearest")
            sums[finer] = sums[finer] + coarser
        return [output(x) for output, x in zip(self.output, sums, strict=True)]
