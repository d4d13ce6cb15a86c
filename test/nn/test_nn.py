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


def test_other_depths_are_refused():
    with pytest.raises(ValueError, match="got 34"):
        ResNet(34)


def test_a_pyramid_adds_the_nearest_coarser_cell_and_smooths_every_level():
    torch.manual_seed(0)
    neck = FPN([3, 5, 7], 4).eval()
    for p in neck.parameters():
        nn.init.normal_(p)
    maps = [torch.randn(2, c, *size) for c, size in ((3, (9, 13)), (5, (5, 7)), (7, (3, 4)))]
    lateral = [F.conv2d(m, x.weight, x.bias) for m, x in zip(maps, neck.lateral)]
    for fine in (1, 0):
        h, w = lateral[fine].shape[-2:]
        ch, cw = lateral[fine + 1].shape[-2:]
        rows, columns = torch.arange(h) * ch // h, torch.arange(w) * cw // w
        lateral[fine] = lateral[fine] + lateral[fine + 1][:, :, rows][:, :, :, columns]
    expected = [F.conv2d(m, x.weight, x.bias, padding=1) for m, x in zip(lateral, neck.output)]
    for mine, theirs in zip(neck(maps), expected):
        assert torch.allclose(mine, theirs, atol=1e-5)
