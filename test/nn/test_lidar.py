"""The LiDAR blocks against twins of plain dense convolutions."""

import torch
from torch import nn
from torch.nn import functional as F

from occflow_core.nn import Second, SecondFPN, SparseEncoder

SHAPE = (41, 48, 32)  # z, y, x


def voxels(count=300, lanes=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(lanes * SHAPE[0] * SHAPE[1] * SHAPE[2], generator=generator)[:count].sort().values
    sites = torch.stack(torch.unravel_index(ids, (lanes, *SHAPE)), dim=1)
    return sites, torch.randn(count, 5, generator=generator)


def lively(module):
    """Norms that do something."""
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.2)
            part.running_mean.normal_(std=0.1)
            part.running_var.uniform_(0.1, 0.2)  # few taps meet a site: with 1 all would fade away
    return module.eval()


def same(mine, theirs, leaves, close):
    """Values and, through one random cotangent, gradients."""
    assert torch.allclose(mine, theirs, rtol=close, atol=close), (mine - theirs).abs().max()
    cotangent = torch.randn_like(mine)
    for a, b in zip(*(torch.autograd.grad(y, leaves, cotangent, retain_graph=True) for y in (mine, theirs))):
        assert b.abs().max() > 0 and (a - b).abs().max() <= close * b.abs().max().clamp_min(1.0)


def dense_encoder(net, sites, features, lanes):
    """The encoder on full volumes with a mask of what is active."""
    volume = features.new_zeros(lanes, features.shape[1], *SHAPE)
    mask = features.new_zeros(lanes, 1, *SHAPE)
    where = sites.unbind(1)
    volume[where[0], :, where[1], where[2], where[3]] = features
    mask[where[0], :, where[1], where[2], where[3]] = 1

    def normed(norm, x):
        shape = (1, -1, 1, 1, 1)
        scale = norm.weight / (norm.running_var + 1e-3).sqrt()
        return (x - norm.running_mean.view(shape)) * scale.view(shape) + norm.bias.view(shape)

    def conv(weight, x, stride=1, padding=1):
        return F.conv3d(x, weight.permute(0, 4, 1, 2, 3), stride=stride, padding=padding)

    def regular(pair, x, mask, stride, padding):
        kernel = mask.new_ones(1, 1, *pair[0].weight.shape[1:4])
        mask = (F.conv3d(mask, kernel, stride=stride, padding=padding) > 0.5).to(x)
        return F.relu(normed(pair[1], conv(pair[0].weight, x, stride, padding))) * mask, mask

    volume = F.relu(normed(net.conv_input[1], conv(net.conv_input[0].weight, volume))) * mask
    for k, padding in enumerate([(1, 1, 1), (1, 1, 1), (0, 1, 1), None]):
        stage = net.encoder_layers[f"encoder_layer{k + 1}"]
        for block in stage[:2]:
            y = F.relu(normed(block.bn1, conv(block.conv1.weight, volume))) * mask
            volume = F.relu(normed(block.bn2, conv(block.conv2.weight, y)) + volume) * mask
        if padding:
            volume, mask = regular(stage[2], volume, mask, 2, padding)
    volume, _ = regular(net.conv_out, volume, mask, (2, 1, 1), 0)
    b, c, z, y, x = volume.shape
    return volume.reshape(b, c * z, y, x)


def test_the_sparse_encoder_is_the_dense_one_with_a_mask():
    net = lively(SparseEncoder(5, 4)).double()
    sites, features = voxels()
    features = features.double().requires_grad_()
    mine = net(sites, features, 2, SHAPE)
    assert mine.shape == (2, 4 * 16, 6, 4)
    theirs = dense_encoder(net, sites, features, 2)
    assert theirs.abs().max() > 0.1
    same(mine, theirs, [features, *net.parameters()], 1e-9)


def test_at_published_size_the_blocks_hold_the_published_tensors():
    with torch.device("meta"):
        encoder, second, neck = SparseEncoder(5, 16), Second(256, 128), SecondFPN(128)
    shapes = {
        prefix + name: tuple(tensor.shape)
        for prefix, net in (("middle.", encoder), ("backbone.", second), ("neck.", neck))
        for name, tensor in net.state_dict().items()
    }
    assert shapes["middle.conv_input.0.weight"] == (16, 3, 3, 3, 5)
    assert shapes["middle.encoder_layers.encoder_layer1.2.0.weight"] == (32, 3, 3, 3, 16)
    assert shapes["middle.encoder_layers.encoder_layer4.1.conv2.weight"] == (128, 3, 3, 3, 128)
    assert shapes["middle.encoder_layers.encoder_layer4.1.bn2.running_var"] == (128,)
    assert shapes["middle.conv_out.0.weight"] == (128, 3, 1, 1, 128)
    assert shapes["backbone.blocks.0.0.weight"] == (128, 256, 3, 3)
    assert shapes["backbone.blocks.1.15.weight"] == (256, 256, 3, 3)
    assert shapes["backbone.blocks.1.16.num_batches_tracked"] == ()
    assert shapes["neck.deblocks.0.0.weight"] == (256, 128, 1, 1)
    assert shapes["neck.deblocks.1.0.weight"] == (256, 256, 2, 2)
    numbers = sum(p.numel() for net in (encoder, second, neck) for p in net.parameters())
    assert numbers == 8_451_024 - (512 * 256 * 9 + 256)  # the published number counts one more convolution
    assert {m.eps for m in encoder.modules() if isinstance(m, nn.BatchNorm1d)} == {1e-3}


def test_second_looks_at_two_sizes_and_its_neck_brings_them_together():
    second, neck = lively(Second(8, 4, depth=1)), lively(SecondFPN(4))
    x = torch.randn(2, 8, 10, 12, requires_grad=True)
    maps = second(x)
    assert [tuple(m.shape) for m in maps] == [(2, 4, 10, 12), (2, 8, 5, 6)]

    def step(conv, norm, x):
        return F.relu(norm(conv(x)))

    fine = step(second.blocks[0][3], second.blocks[0][4], step(second.blocks[0][0], second.blocks[0][1], x))
    coarse = F.conv2d(fine, second.blocks[1][0].weight, stride=2, padding=1)
    coarse = F.relu(second.blocks[1][1](coarse))
    coarse = step(second.blocks[1][3], second.blocks[1][4], coarse)
    first = F.relu(neck.deblocks[0][1](torch.einsum("oi,bihw->bohw", neck.deblocks[0][0].weight[:, :, 0, 0], fine)))
    spread = torch.einsum("iokl,bihw->bohkwl", neck.deblocks[1][0].weight, coarse).reshape(2, 8, 10, 12)
    whole = torch.cat([first, F.relu(neck.deblocks[1][1](spread))], dim=1)
    assert whole.shape == (2, 16, 10, 12)
    same(neck(maps), whole, [x, *second.parameters(), *neck.parameters()], 1e-5)


def test_gradients_reach_every_weight():
    net = SparseEncoder(5, 4)
    sites, features = voxels()
    net(sites, features, 2, SHAPE).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in net.parameters())
