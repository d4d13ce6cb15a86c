import pytest
import torch
from torch import nn
from torch.nn import functional as F

from occflow_core.nn import FPN, ResNet


@pytest.mark.parametrize(
    ("depth", "tensors", "numbers", "channels"),
    [(18, 120, 11_176_512, [64, 128, 256, 512]), (50, 318, 23_508_032, [256, 512, 1024, 2048])],
)
def test_a_resnet_holds_the_tensors_of_torchvisions_without_its_classifier(depth, tensors, numbers, channels):
    with torch.device("meta"):
        net = ResNet(depth)
    names = net.state_dict()
    assert len(names) == tensors
    assert sum(p.numel() for p in net.parameters()) == numbers
    assert net.channels == channels
    assert {"conv1.weight", "bn1.running_var", "layer1.0.conv1.weight", "layer2.0.downsample.0.weight"} <= names.keys()
    assert ("layer1.0.downsample.0.weight" in names) == (depth == 50)
    assert all(m.eps == 1e-5 for m in net.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("depth", [18, 50])
def test_the_four_stages_come_at_strides_4_8_16_32_and_scale_with_the_width(depth):
    net = ResNet(depth, width=8).eval()
    maps = net(torch.randn(2, 3, 64, 96))
    assert [tuple(m.shape[-2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert [m.shape[1] for m in maps] == net.channels == [8 * g * (4 if depth == 50 else 1) for g in (1, 2, 4, 8)]


def test_a_bottleneck_strides_in_its_middle_convolution():
    block = ResNet(50, width=8).layer2[0]
    assert (block.conv1.stride, block.conv2.stride, block.downsample[0].stride) == ((1, 1), (2, 2), (2, 2))


def same(mine, theirs, leaves):
    """Values and, through one random cotangent, gradients."""
    assert torch.allclose(mine, theirs, atol=1e-5)
    cotangent = torch.randn_like(mine)
    for a, b in zip(*(torch.autograd.grad(y, leaves, cotangent, retain_graph=True) for y in (mine, theirs))):
        assert b.abs().max() > 0 and (a - b).abs().max() <= 1e-5 * b.abs().max().clamp_min(1.0)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("depth", [18, 50])
def test_blocks_of_a_resnet_are_convolutions_and_norms_beside_a_shortcut(depth, place):
    torch.manual_seed(0)
    block = ResNet(depth, width=4).layer2[place].train()
    for p in block.parameters():
        if p.ndim == 1:
            nn.init.normal_(p)
    x = torch.randn(3, block.conv1.in_channels, 6, 8, requires_grad=True)

    def step(x, k, stride=1):
        conv, norm = getattr(block, f"conv{k}"), getattr(block, f"bn{k}")
        return normed(F.conv2d(x, conv.weight, stride=stride, padding=conv.weight.shape[-1] // 2), norm)

    def normed(x, norm):
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt() * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)

    stride, shortcut = (1, x) if place else (2, None)
    if shortcut is None:
        conv, norm = block.downsample
        shortcut = normed(torch.einsum("oi,bihw->bohw", conv.weight[..., 0, 0], x[..., ::2, ::2]), norm)
    if depth == 18:
        y = step(step(x, 1, stride).clamp_min(0), 2)
    else:
        y = step(step(step(x, 1).clamp_min(0), 2, stride).clamp_min(0), 3)
    same(block(x), (y + shortcut).clamp_min(0), [x, *block.parameters()])


def test_other_depths_are_refused():
    with pytest.raises(ValueError, match="got 34"):
        ResNet(34)


def test_a_pyramid_adds_the_nearest_coarser_cell_and_smooths_every_level():
    torch.manual_seed(0)
    neck = FPN([3, 5, 7], 4).eval()
    for p in neck.parameters():
        nn.init.normal_(p)
    maps = [torch.randn(2, c, *size, requires_grad=True) for c, size in ((3, (9, 13)), (5, (5, 7)), (7, (3, 4)))]
    lateral = [F.conv2d(m, x.weight, x.bias) for m, x in zip(maps, neck.lateral)]
    for fine in (1, 0):
        h, w = lateral[fine].shape[-2:]
        ch, cw = lateral[fine + 1].shape[-2:]
        rows, columns = torch.arange(h) * ch // h, torch.arange(w) * cw // w
        lateral[fine] = lateral[fine] + lateral[fine + 1][:, :, rows][:, :, :, columns]
    expected = [F.conv2d(m, x.weight, x.bias, padding=1) for m, x in zip(lateral, neck.output)]
    assert [mine.shape for mine in neck(maps)] == [theirs.shape for theirs in expected]
    mine, theirs = (torch.cat([x.flatten() for x in y]) for y in (neck(maps), expected))
    same(mine, theirs, [*maps, *neck.parameters()])
