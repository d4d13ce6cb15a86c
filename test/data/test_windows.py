"""Windows are those of the published systems, frame by frame, and say so where the recording cannot give them."""

import json

import numpy as np
import pytest
import torch
from data import layout

from occflow_core.data import windows
from occflow_core.data.nuscenes import NuScenes
from occflow_core.types import Clip

SCENE = "scene-0001"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """One scene of 12 keyframes, and the tables of one whose cameras lost pictures here and there."""
    root = layout.write(tmp_path_factory.mktemp("world") / "data", keyframes=12)
    torn = layout.write(root.parent / "torn", keyframes=12, files=False)
    rng = np.random.default_rng(0)
    lost = {layout.token("data", 0, c, int(s)) for c in layout.CAMERAS[:3] for s in rng.integers(1, 66, 6) if s % 6}
    layout.edit(torn, "sample_data", lambda rows: without(rows, lost))
    return root


def without(rows, lost):
    by_token = {row["token"]: row for row in rows}
    for row in rows:
        while row["prev"] in lost:
            row["prev"] = by_token[row["prev"]]["prev"]
        while row["next"] in lost:
            row["next"] = by_token[row["next"]]["next"]
    return [row for row in rows if row["token"] not in lost]


@pytest.fixture(scope="module")
def world(root):
    return NuScenes(root, progress=False)


@pytest.fixture(scope="module")
def torn(root):
    return NuScenes(root.parent / "torn", progress=False)


def names(world, window):
    return [[world.data(row).token for row in moment.rows] for moment in window]


class Original:
    """The published loader, written down from the fact card over the raw JSON tables."""

    def __init__(self, root):
        rows = json.loads((root / "v1.0-mini" / "sample_data.json").read_text())
        self.rows = {row["token"]: row for row in rows}
        channel = {layout.token("calibrated", 0, name): name for name in layout.CAMERAS}
        self.keys = [{} for _ in range(12)]
        for row in rows:
            if row["is_key_frame"] and row["calibrated_sensor_token"] in channel:
                k = [layout.token("sample", 0, i) for i in range(12)].index(row["sample_token"])
                self.keys[k][channel[row["calibrated_sensor_token"]]] = row["token"]

    def past(self, k):
        """The list `prev`: five records back along each camera's chain, then the keyframe before, and so on."""
        records = []
        while k > 0 and len(records) < 150:
            here = dict(self.keys[k])
            for _ in range(5):
                here = {c: self.rows[t]["prev"] for c, t in here.items() if self.rows[t]["prev"]}
                records.append(dict(here) if here else records[-1])
            k -= 1
            records.append(self.keys[k])
        return records

    def window(self, k, choices):
        past = self.past(k)
        chosen = [self.keys[k]] * len(choices)
        if past:
            chosen = []
            for i in choices:
                i = min(i, len(past) - 1)
                chosen.append(past[i] if len(past[i]) == 6 else past[i - 1])
        return [[frame[c] for c in layout.CAMERAS] for frame in [self.keys[k], *chosen]]


@pytest.mark.parametrize("which", ["world", "torn"])
def test_opus_test_windows_are_the_published_ones_at_every_keyframe(request, which):
    """The 7 keyframes before, the oldest repeated, the first keyframe eight times itself."""
    world = request.getfixturevalue(which)
    original = Original(world.dataroot)
    for k, sample in enumerate(world.samples(SCENE)):
        window = windows.opus(world, sample)
        assert names(world, window) == original.window(k, [5, 11, 17, 23, 29, 35, 41])
        assert [m.sample for m in window] == [world.samples(SCENE)[max(0, k - i)] for i in range(8)]


def test_a_window_of_one_frame_is_the_keyframe(world):
    for sample in world.samples(SCENE):
        for rng in (None, np.random.default_rng(0)):
            assert [m.sample for m in windows.opus(world, sample, frames=1, rng=rng)] == [sample]


@pytest.mark.parametrize("which", ["world", "torn"])
def test_opus_training_windows_are_the_published_ones_for_the_same_draw(request, which):
    world = request.getfixturevalue(which)
    original = Original(world.dataroot)
    seen = set()
    for k, sample in enumerate(world.samples(SCENE)):
        for seed in range(6):
            window = windows.opus(world, sample, rng=np.random.default_rng(seed), longest_gap=9.0)
            length = len(original.past(k))
            if length <= 7:
                choices = [*range(length), *[length - 1] * (7 - length)]
            else:
                high = min(length // 7, 8)
                interval = int(np.random.default_rng(seed).integers(min(high, 4), high + 1))
                seen.add(interval)
                choices = [(i + 1) * interval - 1 for i in range(7)]
            assert names(world, window) == original.window(k, choices), (k, seed)
    assert seen == {1, 2, 3, 4, 5, 6, 7, 8}, "short pasts have short intervals, long ones 4 to 8"


def test_the_same_generator_draws_the_same_window(world):
    sample = world.samples(SCENE)[11]
    draws = [[windows.opus(world, sample, rng=rng) for _ in range(9)] for rng in map(np.random.default_rng, (5, 5, 6))]
    assert draws[0] == draws[1] != draws[2]


def test_stcocc_windows_are_three_keyframes_and_the_oldest_repeats(world):
    samples = world.samples(SCENE)
    for k, sample in enumerate(samples):
        expected = [samples[k], samples[max(k - 1, 0)], samples[max(k - 2, 0)]]
        assert [moment.sample for moment in windows.stcocc(world, sample)] == expected


@pytest.mark.parametrize("count", [1, 2, 7, 40, 41])
def test_two_sequences_of_a_scene_are_the_scene(count):
    samples = [str(i) for i in range(count)]
    parts = windows.sequences(samples)
    assert [s for part in parts for s in part] == samples and len(parts) == min(2, count)
    assert len(parts[0]) == (count + 1) // 2


def test_a_window_becomes_a_clip_whose_frames_are_opened_once(world, monkeypatch):
    opened = []
    frame = world.frame
    monkeypatch.setattr(world, "frame", lambda moment, *rest: opened.append(moment) or frame(moment, *rest))
    window = windows.opus(world, world.samples(SCENE)[2])
    frames = windows.load(world, window, lidar=2)
    assert len(opened) == 3 and len(frames) == 8 and frames[0].points is not None and frames[2].points is None
    clip = Clip.of(frames)
    assert clip.images.shape[:3] == (1, 8, 6) and clip.fresh.item()
    assert torch.allclose(clip.age[0], torch.tensor([0, 0.5, 1, 1, 1, 1, 1, 1]))
    assert torch.equal(clip.images[0, 2], clip.images[0, 7])


@pytest.mark.parametrize("window", [windows.opus, windows.stcocc])
def test_a_scene_shorter_than_the_window_is_refused_when_that_is_asked_for(world, window):
    samples = world.samples(SCENE)
    with pytest.raises(ValueError, match=rf"{SCENE}: sample {samples[1]} has 1 keyframes before it.*table sample"):
        window(world, samples[1], full=True)
    assert window(world, samples[7], full=True) == window(world, samples[7])


def test_a_gap_in_time_and_a_jump_of_the_car_are_told(tmp_path):
    for name, harm in (("time", later), ("place", elsewhere)):
        root = layout.write(tmp_path / name, keyframes=6, files=False)
        harm(root)
        world = NuScenes(root, progress=False)
        samples = world.samples(SCENE)
        windows.stcocc(world, samples[2])
        for take in (windows.stcocc, windows.opus):
            with pytest.raises(ValueError, match=rf"{SCENE}: a gap before {samples[3]}.*sample_data and ego_pose"):
                take(world, samples[3])


def later(root):
    """From the third second on, all comes four seconds later."""
    edge = layout.BEGIN + 1_250_000

    def shift(rows):
        for row in rows:
            row["timestamp"] += 4_000_000 * (row["timestamp"] > edge)

    for table in ("sample", "sample_data", "ego_pose"):
        layout.edit(root, table, shift)


def elsewhere(root):
    """From there on, the car is 100 m further."""
    edge = layout.BEGIN + 1_250_000

    def shift(rows):
        for row in rows:
            row["translation"][0] += 100.0 * (row["timestamp"] > edge)

    layout.edit(root, "ego_pose", shift)
