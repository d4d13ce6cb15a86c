"""Batches are a function of seed and number: any process, any worker, any beginning gives the same."""

import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine import tiny

from occflow_core.data import augment
from occflow_core.data.nuscenes import NuScenes
from occflow_core.engine.loader import (
    Batches,
    Failure,
    StreamPlan,
    WindowPlan,
    _Cache,
    _Packed,
    batches,
    coloured,
    fitted,
)
from occflow_core.geometry import Grid
from occflow_core.types import OPENOCC, Clip, Occupancy


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> NuScenes:
    return NuScenes(tiny.world(tmp_path_factory.mktemp("world") / "data"), progress=False)


@pytest.fixture(scope="module")
def named(world, tmp_path_factory) -> NuScenes:
    """The same, whose label files have instances, too: one a class, numbered by the class."""
    root = tmp_path_factory.mktemp("named") / "data"
    shutil.copytree(world.dataroot, root)
    for path in root.glob("openocc_v2/*/*/labels.npz"):
        with np.load(path) as file:
            arrays = dict(file)
        np.savez_compressed(path, **arrays, instances=(arrays["semantics"] + 1).astype(np.uint8))
    return NuScenes(root, progress=False)


def dataset(world, lanes=range(2), seed=0, all_lanes=2, config=None, **data) -> Batches:
    run = tiny.run(world.dataroot)
    return Batches(
        world, replace(run.data, **{"cache": 0.1, **data}), config or run.config, run.resize, seed, lanes, all_lanes
    )


def same(one, other) -> bool:
    (clip, truth), (clip2, truth2) = one, other
    tensors = [
        (clip.images, clip2.images),
        (clip.cameras.pixels_from_camera, clip2.cameras.pixels_from_camera),
        (clip.cameras.car_from_camera, clip2.cameras.car_from_camera),
        (clip.now_from_last.nan_to_num(), clip2.now_from_last.nan_to_num()),
        (clip.fresh, clip2.fresh),
        (truth.labels, truth2.labels),
        (truth.flow.nan_to_num(9), truth2.flow.nan_to_num(9)),
    ]
    return all(torch.equal(a, b) for a, b in tensors)


# ---- the plan


SCENES = [tuple(f"{s}-{k}" for k in range(length)) for s, length in enumerate((9, 4, 7))]


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_lane_follows_a_drive_in_order_and_every_epoch_has_every_keyframe_once(parts):
    plan = StreamPlan(SCENES, 3, parts, seed=5)
    turns = [plan.at(number) for number in range(60)]
    for before, now in zip([[None] * 3, *turns], turns):
        for last, turn in zip(before, now):
            scene, k = map(int, turn.sample.split("-"))
            if turn.before is not None:
                assert turn.before == last.sample == f"{scene}-{k - 1}" and turn.draw == last.draw
            else:
                assert last is None or turn.draw != last.draw
    seen = Counter(turn.sample for lanes in turns for turn in lanes)
    # 180 turns are 9 epochs of 20 keyframes, but for drives that are not through yet
    assert len(seen) == 20 and max(seen.values()) - min(seen.values()) <= 3
    for epoch in range(3):
        handed = StreamPlan(SCENES, 1, parts, seed=5)
        one_lane = [handed.at(number)[0].sample for number in range(60)]
        assert sorted(one_lane[20 * epoch : 20 * epoch + 20]) == sorted(s for scene in SCENES for s in scene)


def test_drives_begin_at_other_places_in_other_epochs():
    plan = StreamPlan(SCENES, 1, 1, seed=0)
    begins = {plan.at(number)[0].sample for number in range(200) if plan.at(number)[0].before is None}
    assert len(begins) > 10


def test_any_place_of_a_plan_can_be_asked_first():
    ahead = StreamPlan(SCENES, 4, 2, seed=1)
    assert ahead.at(77) == [StreamPlan(SCENES, 4, 2, seed=1).at(n) for n in range(78)][77]
    assert ahead.at(3) == StreamPlan(SCENES, 4, 2, seed=1).at(3)
    assert ahead.at(3) != StreamPlan(SCENES, 4, 2, seed=2).at(3)


def test_windows_take_every_keyframe_once_an_epoch_in_new_orders():
    plan = WindowPlan(SCENES, 4, seed=0)
    turns = [turn for number in range(10) for turn in plan.at(number)]
    epochs = [[t.sample for t in turns[:20]], [t.sample for t in turns[20:]]]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(s for scene in SCENES for s in scene)
    assert epochs[0] != epochs[1] and all(t.before is None for t in turns)
    assert len({t.draw for t in turns}) == 40


# ---- batches


def test_a_batch_is_the_same_whoever_makes_it_and_whenever(world):
    kinds = {"flips": True, "turn": 30.0}
    whole = dataset(world, **kinds)
    again = dataset(world, **kinds, cache=0.0)
    numbers = [7, 3, 0, 7]
    assert all(same(whole[n], again[n]) for n in numbers)
    for lane in range(2):
        one = dataset(world, range(lane, lane + 1), **kinds)
        clip, truth = one[7]
        assert torch.equal(clip.images[0], whole[7][0].images[lane])
        assert torch.equal(truth.labels[0], whole[7][1].labels[lane])
    assert not same(whole[7], dataset(world, seed=1, **kinds)[7])


def test_workers_change_nothing(world):
    data = dataset(world, flips=True)
    alone = list(batches(data, 0, 2, 6))
    assert len(alone) == 4
    assert all(same(a, b) for a, b in zip(alone, batches(data, 2, 2, 6), strict=True))


def test_without_draws_a_batch_is_what_the_car_would_see_and_the_label_as_it_lies_there(world):
    from occflow_core.runtime.prepare import prepare

    data = dataset(world, view=False)
    for number in range(3):
        clip, truth = data[number]
        for lane, turn in enumerate(data.plan.at(number)):
            frame = prepare(world.frame(world.keyframe(turn.sample)), 16, 32, "fast")
            after = None if turn.before is None else prepare(world.frame(world.keyframe(turn.before)), 16, 32, "fast")
            expected = Clip.of(frame, after)
            assert torch.equal(clip.images[lane], expected.images[0])
            assert torch.equal(clip.cameras.pixels_from_camera[lane], expected.cameras.pixels_from_camera[0])
            assert torch.equal(clip.now_from_last[lane].nan_to_num(), expected.now_from_last[0].nan_to_num())
            label = world.occupancy(turn.sample, "openocc")
            assert torch.equal(truth.labels[lane], label.labels[95:105, 95:105, 0:4])
            assert torch.equal(truth.flow[lane].nan_to_num(9), label.flow[95:105, 95:105, 0:4].nan_to_num(9))


@dataclass(frozen=True)
class Seeing(tiny.Config):
    sweeps: int = 3


@pytest.mark.parametrize("window", ["stream", "window"])
def test_scans_come_to_a_system_that_asks_for_them_and_to_no_other(world, window):
    data = dataset(world, config=Seeing(), window=window, flips=True, turn=30.0)
    clip, _ = data[1]
    still, _ = dataset(world, config=Seeing(), window=window, view=False)[1]
    for lane, turn in enumerate(data.plan.at(1)):
        cloud = world.cloud(world.keyframe(turn.sample), 3)
        assert len(cloud) == 9 and torch.equal(still.points[lane], cloud)
        moved = clip.points[lane]  # by one matrix for all of them
        assert torch.equal(moved[:, 2:], cloud[:, 2:]) and not torch.equal(moved, cloud)
        between = [torch.pdist(points[:, :3]) for points in (moved, cloud)]
        assert torch.allclose(*between, atol=1e-3)
    assert dataset(world, window=window)[1][0].points is None


@dataclass(frozen=True)
class Panoptic(tiny.Config):
    panoptic: bool = True


@pytest.mark.parametrize("window", ["stream", "window"])
def test_instances_come_to_a_system_that_asks_for_them_moved_with_the_labels_and_to_no_other(named, window):
    draws = {"flips": True, "turn": 90.0, "window": window}
    data, stored = dataset(named, config=Panoptic(), **draws), dataset(named, config=Panoptic(), cache=0.0, **draws)
    for number in range(3):
        _, truth = data[number]
        assert truth.instances.shape == truth.labels.shape == (2, 10, 10, 4)
        things = torch.isin(truth.labels, torch.tensor(OPENOCC.moving_ids))
        assert things.any() and torch.equal(truth.instances[things], truth.labels[things].int() + 1)
        assert not truth.instances[~things].any()
        assert torch.equal(data[number][1].instances, truth.instances), "from the cache"
        assert torch.equal(stored[number][1].instances, truth.instances), "without it"
    assert dataset(named, **draws)[0][1].instances is None


def test_the_draws_of_a_drive_hold_until_it_ends(world):
    data = dataset(world, flips=True, turn=40.0)
    mounts = {}
    for number in range(12):
        clip, _ = data[number]
        for lane, turn in enumerate(data.plan.at(number)):
            focal = clip.cameras.pixels_from_camera[lane, 0, :, :2, :2]
            mounts.setdefault(turn.draw, []).append(focal)
    assert any(len(held) > 2 for held in mounts.values())
    assert all(torch.equal(held[0], other) for held in mounts.values() for other in held)
    assert len({tuple(held[0].flatten().tolist()) for held in mounts.values()}) > 3


def test_a_moved_world_is_moved_by_the_same_matrix_from_step_to_step(world):
    """A place of the clip before, told in its moved frame, is found again by the moved now_from_last."""
    still, moved = dataset(world, view=False), dataset(world, flips=True, turn=40.0, view=False)
    checked = 0
    for number in range(8):
        (plain, _), (clip, _) = still[number], moved[number]
        for lane, turn in enumerate(moved.plan.at(number)):
            rng = np.random.default_rng(turn.draw)
            x, y = bool(rng.integers(2)), bool(rng.integers(2))
            new = augment.turn(float(rng.uniform(-40.0, 40.0))) @ augment.flip(x, y)
            if turn.before is not None:
                expected = new @ plain.now_from_last[lane].double() @ new.mT
                assert torch.allclose(clip.now_from_last[lane].double(), expected, atol=1e-5)
                checked += 1
    assert checked > 4


def test_a_window_brings_all_its_times_and_is_fresh(world):
    data = dataset(world, window="window")
    clip, truth = data[3]
    assert clip.images.shape == (2, 3, 6, 3, 16, 32) and clip.fresh.all() and (clip.age[:, 0] == 0).all()
    assert truth.labels.shape == (2, 10, 10, 4)


def test_a_gap_in_a_scene_begins_a_drive(world, tmp_path):
    from data import layout

    root = tmp_path / "torn"
    shutil.copytree(world.dataroot, root)
    late = {layout.token("sample", 0, k) for k in range(4, 7)}

    def shift(rows):
        for row in rows:
            row["timestamp"] += 10_000_000 * ((row["token"] in late) or (row.get("sample_token") in late))

    for table in ("sample", "sample_data"):
        layout.edit(root, table, shift)
    torn = dataset(NuScenes(root, progress=False), range(1), all_lanes=1, parts=1)
    assert tuple(layout.token("sample", 0, k) for k in range(4)) in torn.plan.scenes
    assert tuple(layout.token("sample", 0, k) for k in range(4, 7)) in torn.plan.scenes


def test_colours_are_those_of_the_lane_wherever_it_is(world):
    clip, _ = dataset(world)[4]
    both = coloured(clip, 0, 4, range(2)).images
    assert both.dtype == torch.float32 and not torch.equal(both, clip.images.float())
    half = replace(
        clip,
        **{n: getattr(clip, n)[1:] for n in ("images", "cameras", "used", "now_from_then", "age", "fresh")},
        now_from_last=clip.now_from_last[1:],
        since_last=clip.since_last[1:],
    )
    assert torch.equal(coloured(half, 0, 4, range(1, 2)).images[0], both[1])
    assert not torch.equal(coloured(clip, 0, 5, range(2)).images, both)


# ---- what does not fit


def test_a_label_packed_and_unpacked_is_the_label():
    rng = np.random.default_rng(0)
    grid = Grid((0, 0, 0), (1, 1, 1), (5, 7, 3))
    labels = torch.from_numpy(rng.integers(0, OPENOCC.free + 1, grid.shape).astype(np.uint8))
    flow = torch.from_numpy(rng.normal(size=(*grid.shape, 2)).astype(np.float32))
    flow[rng.random(grid.shape) < 0.5] = 0
    flow[rng.random(grid.shape) < 0.3] = torch.nan
    ids = torch.from_numpy(rng.integers(0, 3, grid.shape).astype(np.int32) * 100_000)
    for seen in (torch.ones(grid.shape, dtype=torch.bool), torch.from_numpy(rng.random(grid.shape) < 0.5)):
        for motion, instances in ((None, None), (flow, None), (flow, ids), (None, ids)):
            truth = Occupancy(grid, OPENOCC, labels, motion, seen, instances)
            again = _Packed(truth).unpacked()
            assert (again.flow is None, again.instances is None) == (motion is None, instances is None)
            assert instances is None or (again.instances.dtype, again.instances.tolist()) == (torch.int32, ids.tolist())
            assert torch.equal(again.labels, labels) and torch.equal(again.seen, seen)
            assert motion is None or torch.equal(again.flow.nan_to_num(9), flow.nan_to_num(9))


def test_the_cache_keeps_to_its_budget_and_holds_what_it_has():
    asked, cache = [], _Cache(10)

    def get(key):
        return cache.get(key, lambda: asked.append(key) or key, lambda value: 4)

    assert [get(key) for key in "abcabc"] == list("abcabc")
    assert asked == list("abcc")  # the third does not fit, ever


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (Grid((-2.1, -2, -1), (0.4,) * 3, (10, 10, 4)), "no part of the labels'"),
        (Grid((-2, -2, -1), (0.8,) * 3, (5, 5, 4)), "no part of the labels'"),
        (Grid((-40, -40, -1), (0.4,) * 3, (201, 10, 4)), "no part of the labels'"),
    ],
)
def test_a_grid_that_the_labels_do_not_have_is_refused_at_once(world, grid, words):
    with pytest.raises(ValueError, match=words):
        dataset(world, config=replace(tiny.Config(), grid=grid))


def test_another_table_of_classes_is_refused_at_once(world):
    with pytest.raises(ValueError, match="labels are of openocc-v2, the config says classes=occ3d-nuscenes"):
        dataset(world, config=replace(tiny.Config(), classes="occ3d-nuscenes"))
    assert fitted(world.occupancy(world.samples("scene-0001")[0], "openocc"), tiny.Config()).grid == tiny.GRID


def test_a_broken_picture_is_one_sentence_from_any_worker(world, tmp_path):
    root = tmp_path / "broken"
    shutil.copytree(world.dataroot, root)
    for path in Path(root / "samples" / "CAM_BACK").glob("*.jpg"):
        path.write_bytes(b"no picture")
    data = dataset(NuScenes(root, progress=False))
    assert isinstance(data[0], Failure)
    for workers in (0, 1):
        with pytest.raises(ValueError, match="batch 0: .*CAM_BACK") as told:
            list(batches(data, workers, 0, 3))
        assert "\n" not in str(told.value)


def test_a_worker_s_own_mistake_is_shown(world):
    run = tiny.run(world.dataroot)
    data = tiny.Wrong(world, run.data, run.config, run.resize, 0, range(2), 2)
    with pytest.raises(KeyError, match="no such key"):
        list(batches(data, 1, 0, 5))


DYING = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
from engine import tiny
from occflow_core.data.nuscenes import NuScenes
from occflow_core.engine.loader import batches
root = Path({root!r})
run = tiny.run(root)
data = tiny.Killed(NuScenes(root, progress=False), run.data, run.config, run.resize, 0, range(2), 2)
list(batches(data, 1, 0, 5))
"""


def test_a_worker_that_dies_is_an_error_and_no_hang(world):
    # in a process of its own: torch says it from a signal's handler, which may strike anywhere
    code = DYING.format(path=sys.path, root=str(world.dataroot))
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    # in the midst of Python's last words, too: then they say the error's repr instead of its text
    said = re.search(r"RuntimeError(: |\(').*(killed|exited unexpectedly)", ended.stderr)
    assert ended.returncode == 1 and said, ended.stderr
