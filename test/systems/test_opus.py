import math
from dataclasses import fields, replace

import pytest
import torch
from systems.rig import drive, frame
from systems.small import CONFIG, PUBLISHED, build
from torch import nn
from torch.nn import functional as F

from occflow_core.geometry import OPENOCCUPANCY_GRID
from occflow_core.nn import instants
from occflow_core.nn.queries import Attention, Mixing, distances
from occflow_core.systems import opus
from occflow_core.systems.base import seeded
from occflow_core.types import OPENOCC, Clip, Prediction

CLOSE = 3e-5  # m, m/s, logits: float32 rounds differently in batches of other sizes
BOTH = pytest.mark.parametrize("config", [CONFIG, PUBLISHED], ids=["ours", "as published"])


def clip_of(frames, i, window=1):
    """The clip of frames[i] (oldest first) with as many earlier ones as `window` asks for, following frames[i - 1]."""
    taken = [frames[max(0, i - k)] for k in range(window)]
    return Clip.of(taken, after=frames[i - 1] if i else None)


@torch.no_grad()
def run(system, frames, memory=None):
    """Steps one frame after another; the outputs and the last memory."""
    outputs = []
    for i in range(len(frames)):
        output, memory = system(clip_of(frames, i), memory)
        outputs.append(output)
    return outputs, memory


def apart(a: opus.Output, b: opus.Output) -> float:
    """The largest difference of two outputs, anywhere."""
    pairs = [*zip(a.points, b.points), *zip(a.logits, b.logits)]
    if a.flow is not None or b.flow is not None:
        pairs += zip(a.flow, b.flow)
    return max(float((x - y).abs().max()) for x, y in pairs)


def lane(output: opus.Output, b: int) -> opus.Output:
    flow = None if output.flow is None else tuple(x[b : b + 1] for x in output.flow)
    return opus.Output(tuple(x[b : b + 1] for x in output.points), tuple(x[b : b + 1] for x in output.logits), flow)


def same(a: Prediction, b: Prediction) -> bool:
    return all(
        x is y or not isinstance(x, torch.Tensor) or torch.equal(x, y)
        for x, y in ((getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    )


# ---- memory


@BOTH
def test_a_stream_at_two_hertz_equals_the_window(config):
    system, frames = build(config), drive(10, every=0.5)
    streamed, memory = run(system, frames)
    for i in (7, 9):
        with torch.no_grad():
            window, _ = system(Clip.of([frames[i - k] for k in range(8)]), None)
        assert apart(streamed[i], window) < CLOSE
    assert apart(streamed[9], streamed[8]) > 1e-2  # and it does look at the pictures


@BOTH
def test_at_the_start_the_oldest_frame_is_repeated_and_the_first_stands_alone(config):
    system, frames = build(config), drive(3, every=0.5)
    streamed, _ = run(system, frames)
    for i, repeated in ((0, [0] * 8), (1, [1] + [0] * 7), (2, [2, 1] + [0] * 6)):
        with torch.no_grad():
            window, _ = system(Clip.of([frames[k] for k in repeated]), None)
        assert apart(streamed[i], window) < CLOSE


def test_a_window_fills_the_memory_for_the_stream_that_follows():
    system, frames = build(), drive(10, every=0.5)
    streamed, _ = run(system, frames)
    with torch.no_grad():
        _, memory = system(Clip.of([frames[8 - k] for k in range(8)]), None)
        after, _ = system(clip_of(frames, 9), memory)
    assert apart(streamed[9], after) < CLOSE


def test_a_clip_of_three_times_is_completed_from_memory():
    system, frames = build(), drive(9, every=0.5)
    streamed, _ = run(system, frames)
    _, memory = run(system, frames[:8])
    with torch.no_grad():
        output, _ = system(clip_of(frames, 8, window=3), memory)
    assert apart(streamed[8], output) < CLOSE


def remembered(stamps, count):
    """The ages of the window's entries at every step of a lane whose clips come at these times (s)."""
    frames = [frame(at=at, n=1, height=8, width=8) for at in stamps]
    rows, memory = torch.zeros(1, 1, 1, 1, 4), None
    for i in range(len(frames)):
        windows, memory = instants.remember(clip_of(frames, i), rows, memory, count)
        yield [e.age for e in windows[0]], [e.age for e in memory.lanes[0]]


@pytest.mark.parametrize("hertz", [10, 12])
@pytest.mark.parametrize("jitter", [0.0, 0.006])
@pytest.mark.parametrize("count, most", [(2, 3), (8, 15), (16, 31)])
def test_at_a_live_rate_the_window_keeps_half_seconds_and_the_memory_no_more_than_it_needs(hertz, jitter, count, most):
    generator = torch.Generator().manual_seed(0)
    shakes = jitter * (2 * torch.rand(10 * hertz, generator=generator) - 1)
    steps = list(remembered([i / hertz + float(shake) for i, shake in enumerate(shakes)], count))
    for _, kept in steps:
        assert len(kept) <= most
        assert all(older - newer >= 0.25 - 0.016 for newer, older in zip(kept, kept[1:]))
    for window, _ in steps[count * hertz // 2 :]:
        assert len(window) == count and window[0] == 0
        assert all(abs(age - 0.5 * k) <= 0.17 for k, age in enumerate(window)), window
    assert len(steps[-1][1]) == most


def test_the_memory_is_a_value_that_no_step_changes_and_no_picture_is_copied_into():
    system, frames = build(), drive(3, every=0.5)
    _, memory = run(system, frames[:2])
    before = [(e.age, e.now_from_then.clone(), e.rows.clone()) for e in memory.lanes[0]]
    _, after = system(clip_of(frames, 2), memory)
    assert all(
        e.age == age and torch.equal(e.now_from_then, pose) and torch.equal(e.rows, rows)
        for e, (age, pose, rows) in zip(memory.lanes[0], before)
    )
    assert [e.rows.data_ptr() for e in after.lanes[0][1:]] == [e.rows.data_ptr() for e in memory.lanes[0]]
    assert not any(e.rows.requires_grad for e in after.lanes[0])


@BOTH
def test_a_new_drive_forgets_and_its_unknown_past_never_leaks(config):
    system = build(config)
    _, memory = run(system, drive(4, every=0.5))
    first = Clip.of(frame(seed=50))
    assert torch.isnan(first.now_from_last).all()
    with torch.no_grad():
        alone, kept = system(first, None)
        after, kept_after = system(first, memory)
    assert apart(alone, after) == 0
    assert len(kept.lanes[0]) == len(kept_after.lanes[0]) == 1
    assert all(torch.isfinite(x).all() for x in (*after.points, *after.logits))


@BOTH
def test_a_batch_of_two_is_two_batches_of_one_also_when_one_lane_is_fresh(config):
    system, long, other = build(config), drive(4, every=0.5), drive(4, every=0.3, start=20)
    with torch.no_grad():
        _, memory_a = run(system, long[:3])
        _, memory_b = run(system, other[:3])
        together = instants.Memory(memory_a.lanes + memory_b.lanes)
        going_on, starting = clip_of(long, 3), Clip.of(other[3])
        alone = [system(going_on, memory_a), system(starting, None)]
        both, memory = system(Clip.batch([going_on, starting]), together)
    for b, (output, kept) in enumerate(alone):
        assert apart(lane(both, b), output) < CLOSE
        assert [e.age for e in memory.lanes[b]] == [e.age for e in kept.lanes[0]]
        assert same(system.decode(both)[b], system.decode(lane(both, b))[0])
    assert [len(entries) for entries in memory.lanes] == [4, 1]


def test_what_does_not_belong_together_is_refused():
    system, frames = build(), drive(2, every=0.5)
    _, memory = run(system, frames[:1])
    with pytest.raises(ValueError, match="1 lanes for a clip of 2"):
        system(Clip.batch([clip_of(frames, 1)] * 2), memory)
    with pytest.raises(ValueError, match="without a fresh start"):
        system(replace(Clip.of(frame(n=2)), fresh=torch.tensor([False])), memory)
    with pytest.raises(ValueError, match=r"\(3, 64, 96\), got \(1, 1, 3, 3, 64, 128\)"):
        system(Clip.of(frame(width=128)), None)


# ---- cameras


@pytest.mark.parametrize("n", [1, 2, 5, 6, 8])
def test_any_number_of_cameras_works_on_a_grid_that_is_no_cube(n):
    system = build()
    outputs, _ = run(system, drive(2, every=0.5, n=n))
    (prediction,) = system.decode(outputs[-1])
    assert prediction.labels.shape == (24, 20, 8)
    assert (prediction.labels != prediction.classes.free).any()


@BOTH
@pytest.mark.parametrize("dropped", [0, 2])
def test_the_pixels_of_a_dropped_camera_do_not_matter_now_or_later(config, dropped):
    system = build(config)
    used = [i != dropped for i in range(3)]
    frames = drive(3, every=0.5, used=used)
    noisy = []
    for f in frames:
        images = f.images.clone()
        images[dropped] = torch.randint(0, 256, images[dropped].shape, dtype=torch.uint8)
        noisy.append(replace(f, images=images))
    quiet, loud = run(system, frames)[0], run(system, noisy)[0]
    assert all(apart(a, b) == 0 for a, b in zip(quiet, loud))
    assert apart(quiet[-1], run(system, drive(3, every=0.5))[0][-1]) > 1e-3  # but being there does


def test_nor_do_they_reach_the_batch_statistics_of_training():
    quiet, outputs = frame(used=[True, False, True]), []
    images = quiet.images.clone()
    images[1] = 255 - images[1]
    for f in (quiet, replace(quiet, images=images)):
        system = build().train()
        torch.manual_seed(0)  # the same dropout
        outputs.append(system(Clip.of(f), None)[0])
    assert apart(*outputs) == 0


@BOTH
def test_without_any_camera_the_output_is_finite(config):
    system = build(config)
    (output,), _ = run(system, [frame(used=[False] * 3)])
    assert all(torch.isfinite(x).all() for x in (*output.points, *output.logits))


# ---- the network


@BOTH
def test_every_weight_gets_a_finite_gradient(config):
    system = build(config)
    output, _ = system(Clip.of(drive(8, every=0.5)[::-1]), None)
    total = sum((x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in (*output.points, *output.logits))
    if output.flow is not None:
        total = total + sum((x**2).sum() for x in output.flow)
    if config.as_published:
        total = total + (system.queries.weight**2).sum()  # where queries begin learns from its own loss only
    total.backward()
    for name, p in system.named_parameters():
        if name == "queries.weight" and not config.as_published:
            continue  # a column stays where it stands
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        # one point has no spread, so as published its offsets cannot matter; nor can a bias before a centring norm
        silent = config.as_published and name.startswith(("layers.0.sampling.offset", "layers.1.sampling.offset"))
        assert silent or p.grad.abs().max() > 0, name


def test_mixing_is_two_products_and_two_norms():
    torch.manual_seed(0)
    mixing = Mixing(channels=12, groups=3, taken=5, given=2)
    sampled, query = torch.randn(2, 4, 3, 5, 4), torch.randn(2, 4, 12)
    expected = torch.empty(2, 4, 12)
    for b in range(2):
        for q in range(4):
            parts = []
            for g, numbers in enumerate(mixing.matrices(query[b, q]).view(3, -1)):
                channel, point = numbers[:16].view(4, 4), numbers[16:].view(2, 5)
                x = sampled[b, q, g] @ channel
                x = torch.relu((x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt())
                x = point @ x
                parts.append(torch.relu((x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()).flatten())
            expected[b, q] = query[b, q] + mixing.out(torch.cat(parts))
    assert torch.allclose(mixing(sampled, query), expected, atol=1e-5)


def test_attention_is_torchs_with_a_mask_of_distance_times_the_rows_own_reach():
    torch.manual_seed(0)
    mine = Attention(16, heads=4, dropout=0.1).eval()
    theirs = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    for p in mine.parameters():
        nn.init.normal_(p, std=0.3)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = mine.taken.weight.data, mine.taken.bias.data
    theirs.out_proj.load_state_dict(mine.out.state_dict())
    query, centre = torch.randn(2, 7, 16), 5 * torch.randn(2, 7, 3)
    mask = torch.empty(2, 4, 7, 7)
    for b in range(2):
        for h in range(4):
            for i in range(7):
                for j in range(7):
                    mask[b, h, i, j] = -(centre[b, i] - centre[b, j]).norm() * mine.reach(query)[b, i, h]
    expected = query + theirs(query, query, query, attn_mask=mask.flatten(0, 1), need_weights=False)[0]
    assert torch.allclose(mine(query, centre), expected, atol=1e-5)


def test_distances_far_from_the_origin_are_exact():
    centre = torch.tensor([[[40.0, 40.0, 5.0], [40.001, 40.0, 5.0]]])
    assert distances(centre)[0, 0, 1] == pytest.approx(0.001, abs=5e-6)


def test_points_move_from_the_mean_of_what_their_query_carries():
    config = replace(CONFIG, refines=(4, 4))
    system = build(config)
    for layer in system.layers:
        nn.init.zeros_(layer.move[-1].weight)
        layer.move[-1].bias.data = torch.tensor([2.0, 0, 0, 0, 4.0, 0, 0, 0, 0, -2.0, 0, 0])
    (output,), _ = run(system, [frame()])
    begin = config.grid.metres(system.queries.weight)
    moved = torch.tensor([[1.0, 0, 0], [0, 2.0, 0], [0, 0, 0], [-1.0, 0, 0]])
    assert torch.allclose(output.points[0][0], begin[:, None] + moved, atol=1e-5)
    assert torch.allclose(output.points[1][0], begin[:, None] + moved + moved.mean(0), atol=1e-5)


# ---- points -> voxels


def decode_slowly(points, logits, flow, config):
    """`opus_head.get_occ` in dense poolings and loops over points; voxels with too many points keep the first ten."""
    grid, k = config.grid, logits.shape[-1]
    scores, centre = logits.sigmoid(), points.mean(1)
    found: dict[tuple[int, int, int], list] = {}
    for q in range(points.shape[0]):
        for p in range(points.shape[1]):
            if not (points[q, p] - centre[q]).norm() < 3.0 or not (scores[q, p] > config.threshold).any():
                continue
            at = torch.floor((points[q, p] - torch.tensor(grid.low)) / torch.tensor(grid.voxel)).tolist()
            if all(0 <= v < n for v, n in zip(at, grid.shape)):
                found.setdefault(tuple(int(v) for v in at), []).append((scores[q, p], flow[q, p]))
    dense, speed = torch.zeros(k, *grid.shape), torch.zeros(2, *grid.shape)
    for (x, y, z), kept in found.items():
        dense[:, x, y, z] = sum(s for s, _ in kept[:10]) / len(kept[:10])
        speed[:, x, y, z] = sum(f for _, f in kept[:10]) / len(kept[:10])
    sure = (dense > config.threshold).any(0)
    wide = F.max_pool3d(dense[None], 3, stride=1, padding=1)
    closed = -F.max_pool3d(-wide, 3, stride=1, padding=1)[0]
    closed[:, sure] = dense[:, sure]
    filled = (closed > config.threshold).any(0)
    labels = torch.where(filled, closed.argmax(0), k).to(torch.uint8)
    score = closed.amax(0) * filled
    for x, y, z in (filled & ~sure).nonzero().tolist():
        near = tuple(slice(max(0, v - 1), v + 2) for v in (x, y, z))
        speed[:, x, y, z] = speed[(slice(None), *near)][:, sure[near]].mean(1)
    return labels, score, (speed * filled).permute(1, 2, 3, 0), int((filled & ~sure).sum())


def crowd(config, seed, lanes=1, queries=150, points=16):
    """Points in clumps, some crowded into one voxel, some outside, some far from their query, some not finite."""
    torch.manual_seed(seed)
    low, size = torch.tensor(config.grid.low), torch.tensor(config.grid.size)
    where = (torch.rand(lanes, queries, 1, 3) * 1.2 - 0.1) * size + low
    where = where + 0.9 * torch.randn(lanes, queries, points, 3)
    where[:, :5] = where[:, :5, :1] + 0.05 * torch.randn(lanes, 5, points, 3)
    where[:, 5:8, 3] = torch.tensor([float("nan"), float("inf"), 1e30])[None, :, None]
    k = len(config.table.names)
    logits = torch.randn(lanes, queries, points, k) - 3
    logits += 4.5 * F.one_hot(torch.randint(0, 3, (lanes, queries, 1)), k)
    logits[:, 8, 2] = float("nan")
    return where, logits, 5 * torch.randn(lanes, queries, points, 2)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_decoding_equals_dense_poolings_and_loops(seed):
    config = replace(CONFIG, classes=OPENOCC.table) if seed == 2 else CONFIG
    system = opus.Opus(config)
    points, logits, flow = crowd(config, seed, lanes=2)
    predictions = system.decode(opus.Output((points,), (logits,), (flow,)))
    for b, prediction in enumerate(predictions):
        labels, score, speed, added = decode_slowly(points[b], logits[b], flow[b], config)
        assert added > 30
        assert torch.equal(prediction.labels, labels)
        assert torch.allclose(prediction.score, score, atol=1e-6)
        assert torch.allclose(prediction.flow, speed, atol=1e-5)
        assert prediction.classes == config.table


def test_ten_points_of_a_voxel_count_the_first_in_the_order_of_the_queries():
    points = torch.full((3, 8, 3), 1.5)  # m, well above the ground: a closing reaches through the grid's faces
    logits = torch.full((3, 8, 17), -9.0)
    logits[0, :, 2] = 9.0  # the first eight and two of the next
    logits[1, :2, 2] = 9.0
    logits[1, 2:, 5] = 9.0
    logits[2, :, 5] = 9.0
    (prediction,) = opus.Opus(CONFIG).decode(opus.Output((points[None],), (logits[None],), None))
    index, label, score, flow = prediction.sparse()
    assert index.tolist() == [[13, 11, 3]] and label.tolist() == [2] and flow is None
    assert score.item() == pytest.approx(1 / (1 + math.exp(-9)), abs=1e-6)


def test_nothing_sure_is_nothing_there():
    points, logits = torch.rand(1, 5, 4, 3), torch.full((1, 5, 4, 17), -1.0)
    (prediction,) = opus.Opus(CONFIG).decode(opus.Output((points,), (logits,), (torch.ones(1, 5, 4, 2),)))
    assert (prediction.labels == prediction.classes.free).all()
    assert prediction.score.abs().max() == 0 and prediction.flow.abs().max() == 0


# ---- configs and weights


def test_an_untrained_nano_says_something_and_the_same_for_the_same_seed():
    nets = [seeded(opus.Opus(opus.PRESETS["nano"]), seed).eval() for seed in (0, 0, 1)]
    clip = Clip.of(frame(128, 352, n=6))
    with torch.inference_mode():
        said = [net.decode(net(clip, None)[0])[0] for net in nets]
    assert same(said[0], said[1]) and not same(said[0], said[2])
    assert 1000 < int((said[0].labels != said[0].classes.free).sum()) < 150_000  # something, but not everything
    assert said[0].flow is not None


def test_seeding_leaves_the_callers_random_numbers_alone():
    system = build()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    seeded(system, 0)
    assert torch.equal(torch.rand(2), expected)


def test_configs_that_cannot_be_built_are_refused():
    with pytest.raises(ValueError, match="classes must be one of"):
        replace(CONFIG, classes="mine")
    with pytest.raises(ValueError, match="do not divide 18 channels"):
        replace(CONFIG, channels=18)
    with pytest.raises(ValueError, match="look is a number of channels, or 0 for none; got -1"):
        replace(CONFIG, look=-1)
    with pytest.raises(ValueError, match="look knows 60 m around the car, the grid's corner is at 72 m"):
        replace(CONFIG, look=8, grid=OPENOCCUPANCY_GRID)
    with pytest.raises(ValueError, match="must be positive"):
        replace(CONFIG, refines=())


def test_moving_saving_and_loading_gives_the_same_output():
    system = build()
    again = opus.Opus(system.config).eval()
    again.load_state_dict({name: tensor.clone() for name, tensor in system.state_dict().items()})
    frames = [frame()]
    assert apart(run(system, frames)[0][0], run(again, frames)[0][0]) == 0
