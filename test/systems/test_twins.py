"""The blocks of the published decoders against twins in a few plain lines: values and, through one random cotangent,
gradients of every parameter and input: blocks in float32, whole layers, in which rounding grows, in float64.

The densifier's twin stands in `test_opus_v2.py`, those of the LiDAR blocks in `test/nn/test_lidar.py`, of the pyramid
in `test/nn/test_nn.py`.
"""

from dataclasses import replace

import pytest
import torch
from systems import parity, small, small_v2
from systems.rig import ring

from occflow_core.geometry import Grid
from occflow_core.nn import decoder
from occflow_core.nn.instants import View
from occflow_core.nn.points import NAME_WEIGHTS, Target, names_loss, points_loss
from occflow_core.nn.queries import Attention, Mixing
from occflow_core.ops import sample
from occflow_core.systems import opus_fusion, opus_v2

PICTURE, SIZES = (64, 96), ((16, 24), (8, 12), (4, 6), (2, 3))
B, T, N, Q = 2, 3, 4, 6  # lanes, times (not as many as groups), cameras, queries


def same(mine, theirs, leaves) -> None:
    """1e-5 of the largest number, and of one; in float64 1e-10."""
    close = 1e-5 if mine.dtype == torch.float32 else 1e-10

    def near(a, b):
        return (a - b).abs().max() <= close * b.abs().max().clamp_min(1.0)

    assert near(mine, theirs)
    cotangent = torch.randn_like(mine)
    mine, theirs = (torch.autograd.grad(y, leaves, cotangent, retain_graph=True) for y in (mine, theirs))
    for a, b in zip(mine, theirs, strict=True):
        assert b.abs().max() > 0 and near(a, b)


def lively(module):
    """Every parameter says something."""
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5 if p.ndim == 1 else (2 / p.shape[-1]) ** 0.5)
    return module


def look(levels=SIZES, dtype=torch.float32) -> tuple[torch.Tensor, View]:
    """Rows (B, T, N, R, C), a leaf, and the view into them."""
    cells = sum(height * width for height, width in levels)
    rows = torch.randn(B, T, N, cells, 16, dtype=dtype, requires_grad=True)
    matrix = ring(N, *PICTURE).pixels_from_car().to(dtype).expand(B, T, N, 3, 4).clone()
    matrix[..., 3] += torch.randn(B, T, N, 3)
    used = torch.ones(B, T, N, dtype=torch.bool)
    used[1, 2, 1] = False
    return rows, View([list(lane) for lane in rows], levels, PICTURE, matrix, used)


# ---- twins


def linear(part, x):
    return torch.einsum("...i,oi->...o", x, part.weight) + part.bias


def standard(x, axes):
    return (x - x.mean(axes, keepdim=True)) / (x.var(axes, correction=0, keepdim=True) + 1e-5).sqrt()


def norm(part, x):
    return standard(x, -1) * part.weight + part.bias


def said_twice(branch, x):
    """Linear, norm, ReLU; linear, norm, ReLU; and what comes after."""
    for i in (0, 3):
        x = norm(branch[i + 1], linear(branch[i], x)).clamp_min(0)
    return linear(branch[6], x) if len(branch) > 6 else x


def moves(branch, x):
    return linear(branch[4], linear(branch[2], linear(branch[0], x).clamp_min(0)).clamp_min(0))


def fed(feed, x):
    return linear(feed[3], linear(feed[0], x).clamp_min(0))


def mixed(mixing, sampled, query):
    b, q, g, p, c = sampled.shape
    numbers = linear(mixing.matrices, query).view(b, q, g, -1)
    by_channel, by_point = numbers[..., : c * c].view(b, q, g, c, c), numbers[..., c * c :].view(b, q, g, -1, p)
    x = standard(torch.einsum("bqgpi,bqgio->bqgpo", sampled, by_channel), (-2, -1)).clamp_min(0)
    x = standard(torch.einsum("bqgop,bqgpc->bqgoc", by_point, x), (-2, -1)).clamp_min(0)
    return query + linear(mixing.out, x.reshape(b, q, -1))


def talked(attention, query, centre):
    heads = attention.heads
    asked, offered, told = (x.unflatten(-1, (heads, -1)) for x in linear(attention.taken, query).chunk(3, dim=-1))
    alike = torch.einsum("bihc,bjhc->bhij", asked, offered) / asked.shape[-1] ** 0.5
    away = (centre[:, :, None] - centre[:, None]).norm(dim=-1).detach()
    reach = linear(attention.reach, query)  # (B, Q, heads): of the query that listens
    share = (alike - torch.einsum("bij,bih->bhij", away, reach)).softmax(-1)
    return query + linear(attention.out, torch.einsum("bhij,bjhc->bihc", share, told).flatten(2))


def looked(sampling, query, points, view, rows):
    c, alone = sampling.config, points.shape[2] == 1
    centre = points.mean(2, keepdim=True)
    spread = ((points - centre) ** 2).sum(2, keepdim=True).div(max(points.shape[2] - 1, 1)).sqrt()
    offset = linear(sampling.offset, query).unflatten(-1, (-1, 3))
    if isinstance(sampling, opus_v2.Sampling):
        places = centre + sampling.prototype.weight * (1.0 if alone else spread) + offset
    else:
        places = centre + offset * (0.0 if alone else spread)
    weights = linear(sampling.levels, query).view(B, Q, c.groups, c.samples, c.levels).exp()
    places, weights = places.view(B, Q, c.groups, c.samples, 3), weights / weights.sum(-1, keepdim=True)
    return parity.sampled(rows, view.sizes, view.picture, view.pixels_from_now, view.used, places, weights)


def layered(layer, query, unit, view, rows):
    """The published layer -> queries, points as fractions of the box, and what is told of them."""
    low, size = unit.new_tensor(layer.config.grid.low), unit.new_tensor(layer.config.grid.size)
    points = unit * size + low
    query = query + said_twice(layer.position, unit.flatten(2))
    query = norm(layer.norm1, mixed(layer.mixing, looked(layer.sampling, query, points, view, rows), query))
    query = norm(layer.norm2, talked(layer.attention, query, points.mean(2)))
    query = norm(layer.norm3, query + fed(layer.feed, query))
    moved = points.mean(2, keepdim=True) + 0.5 * moves(layer.move, query).view(B, Q, -1, 3)
    told = said_twice(layer.tell if isinstance(layer, opus_v2.Layer) else layer.name, query)
    return query, (moved - low) / size, told.view(B, Q, layer.after, -1)


# ---- beside them


def test_mixing():
    torch.manual_seed(0)
    mixing = lively(Mixing(channels=16, groups=4, taken=6, given=5))
    sampled, query = torch.randn(B, Q, 4, 6, 4, requires_grad=True), torch.randn(B, Q, 16, requires_grad=True)
    same(mixing(sampled, query), mixed(mixing, sampled, query), [sampled, query, *mixing.parameters()])


def test_attention_among_queries():
    torch.manual_seed(0)
    attention = lively(Attention(16, heads=4, dropout=0.1)).eval()
    query, centre = torch.randn(B, Q, 16, requires_grad=True), 2 * torch.randn(B, Q, 3)
    same(attention(query, centre), talked(attention, query, centre), [query, *attention.parameters()])


@pytest.mark.parametrize("levels", [SIZES, SIZES[:1]])
def test_sampling_of_pictures(levels):
    torch.manual_seed(0)
    rows, view = look(levels)
    places = ((torch.rand(B, 40, 4, 2, 3) - 0.5) * torch.tensor([20.0, 20.0, 6.0])).requires_grad_()
    weights = torch.rand(B, 40, 4, 2, len(levels), requires_grad=True)
    given = (view.sizes, view.picture, view.pixels_from_now, view.used, places, weights)
    same(sample(view.rows, *given, True), parity.sampled(rows, *given), [rows, places, weights])


def test_sampling_of_the_map():
    """Bilinear: what is nearer than a cell along both axes has its share."""
    torch.manual_seed(0)
    grid = Grid((-12.0, -10.0, -1.0), (1.0, 1.0, 0.8), (24, 20, 8))
    above = torch.randn(B, 16, 20, 24, requires_grad=True)
    places = ((torch.rand(B, Q, 4, 2, 3) - 0.5) * torch.tensor([26.0, 22.0, 8.0])).requires_grad_()

    class Nothing:
        def sample(self, points, weights, as_published):
            return points.new_zeros(B, Q, 4, 0, 4)

    unit = (places[..., :2] - torch.tensor(grid.low[:2])) / torch.tensor(grid.size[:2])
    share_x = (1 - (unit[..., :1] * 23 - torch.arange(24)).abs()).clamp_min(0)
    share_y = (1 - (unit[..., 1:] * 19 - torch.arange(20)).abs()).clamp_min(0)
    theirs = torch.einsum("bqgsx,bqgsy,bgcyx->bqgsc", share_x, share_y, above.unflatten(1, (4, 4)))
    mine = opus_fusion._View(Nothing(), above, grid).sample(places, None, True)
    same(mine, theirs, [above, places])


def layer_of(home, points):
    """(Of OPUS and Fusion, or of OPUS-V2) with so many points before, three after."""
    config = replace((small if home is decoder else small_v2).PUBLISHED, frames=T, dropout=0.0)
    looked = (config.samples * T,) if home is decoder else ()
    return lively(home.Layer(config, points, 3, *looked))


def matter(layer, leaves):
    """One point has no spread as published, so that its offsets cannot matter; OPUS-V2's are in metres."""
    alone = layer.position[0].in_features == 3 and isinstance(layer, decoder.Layer)
    silent = {id(p) for p in layer.sampling.offset.parameters()} if alone else set()
    return [leaf for leaf in leaves if id(leaf) not in silent]


BOTH = pytest.mark.parametrize("home", [decoder, opus_v2], ids=["opus", "opus-v2"])


@BOTH
def test_position_feed_forward_block_moves_and_names(home):
    torch.manual_seed(0)
    layer, unit = layer_of(home, 4), torch.rand(B, Q, 12, requires_grad=True)
    told = layer.name if home is decoder else layer.tell
    query = torch.randn(B, Q, 16, requires_grad=True)
    for branch, twin, x in (
        *((layer.position, said_twice, unit), (told, said_twice, query)),
        *((layer.feed, fed, query), (layer.move, moves, query), (layer.norm1, norm, query)),
    ):
        same(branch(x), twin(branch, x), [x, *branch.parameters()])


@BOTH
@pytest.mark.parametrize("points", [1, 4])
def test_where_a_query_looks(home, points):
    torch.manual_seed(0)
    layer, (rows, view) = layer_of(home, points), look()
    query = torch.randn(B, Q, 16, requires_grad=True)
    where = (3 * torch.randn(B, Q, points, 3)).requires_grad_()
    mine, theirs = layer.sampling(query, where, view), looked(layer.sampling, query, where, view, rows)
    same(mine, theirs, matter(layer, [rows, query, where, *layer.sampling.parameters()]))


@BOTH
@pytest.mark.parametrize("points", [1, 4])
def test_a_whole_layer(home, points):
    torch.manual_seed(0)
    layer, (rows, view) = layer_of(home, points).double(), look(dtype=torch.float64)
    query = torch.randn(B, Q, 16, dtype=torch.float64, requires_grad=True)
    unit = torch.rand(B, Q, points, 3, dtype=torch.float64, requires_grad=True)
    queries, moved = layer(query, unit, view)
    mine = (queries, moved, layer.named(queries)[0] if home is decoder else layer.told(queries))
    mine, theirs = (torch.cat([x.flatten() for x in y]) for y in (mine, layered(layer, query, unit, view, rows)))
    same(mine, theirs, matter(layer, [rows, query, unit, *layer.parameters()]))


# ---- losses


def curve(d):
    return torch.where(d.abs() < 0.2, d**2 / 0.4, d.abs() - 0.1).sum(-1)


def named(logits, label):
    """Sigmoid focal loss, alpha 0.25 and gamma 2, of every class."""
    right = label[:, None] == torch.arange(logits.shape[1])
    p = logits.sigmoid()
    return torch.where(right, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log())


def test_losses_of_points_and_names():
    torch.manual_seed(0)
    truth, grid = small_v2.truth(), small_v2.PARITY.grid
    targets = [Target.of(truth, lane) for lane in range(B)]
    points = (torch.rand(B, 300, 3) * 1.1 * torch.tensor(grid.size) + torch.tensor(grid.low)).requires_grad_()
    logits = torch.randn(B, 300, 17, requires_grad=True)
    weights = torch.tensor([NAME_WEIGHTS[name] for name in truth.classes.names])
    missed = strayed = names = voxels = 0
    for mine, said, labels, seen in zip(points, logits, truth.labels, truth.seen):
        index = (labels != 17).nonzero()
        label, seen = labels[labels != 17].long(), seen[labels != 17]
        centre = (index + 0.5) * torch.tensor(grid.voxel) + torch.tensor(grid.low)
        apart = torch.cdist(centre.double(), mine.double()).detach()
        away, off = centre - mine[apart.argmin(1)], mine - centre[apart.argmin(0)]
        weight = torch.where(seen & (away.norm(dim=-1) > 0.2), 5.0, 1.0)
        weight = torch.where(seen & torch.isin(label, torch.tensor([0, 2, 5, 8])), 10.0, weight)
        missed, strayed = missed + (weight * curve(away)).sum(), strayed + curve(off).sum()
        dear = 1 + centre[apart.argmin(0)][:, :2].norm(dim=-1) / (grid.size[0] ** 2 + grid.size[1] ** 2) ** 0.5
        names = names + (dear[:, None] * weights * named(said, label[apart.argmin(0)])).sum()
        voxels += len(index)
    mine, met = points_loss(points, targets, True)
    same(mine, 0.5 * (missed / voxels + strayed / 600), [points])
    same(names_loss(logits, points.detach(), targets, met, True), 2.0 * names / 600, [logits])


def test_the_loss_of_named_voxels():
    torch.manual_seed(0)
    truth = small_v2.truth()
    sites = (torch.rand(truth.labels.shape) < 0.3).nonzero()
    logits = torch.randn(len(sites), 17, requires_grad=True)
    label = truth.labels[sites.unbind(1)].long()
    weights = torch.tensor([NAME_WEIGHTS[name] for name in truth.classes.names])
    mine = opus_v2._names_loss(opus_v2.Voxels(sites, logits, None), truth, True)
    same(mine, 2.0 * (weights * named(logits, label)).sum() / (label != 17).sum(), [logits])
