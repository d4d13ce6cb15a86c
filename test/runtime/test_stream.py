import math
from dataclasses import replace

import pytest
import torch
from far import Bus, Far, on_gpu
from systems.rig import drive, frame, turn
from systems.small import CONFIG, build
from torch import nn

from occflow_core.data import pattern
from occflow_core.geometry import rigid
from occflow_core.ops import gpu
from occflow_core.runtime import Model, Stream, load, stream
from occflow_core.types import NANO, Clip, Prediction


class Listener(nn.Module):
    """A system that fills one column of voxels and keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.config, self.clips, self.memories = CONFIG, [], []
        self.weight = nn.Parameter(torch.zeros(1))
        self.broken = False

    def forward(self, clip, memory):
        if self.broken:
            raise RuntimeError("broken")
        self.clips.append(clip)
        self.memories.append(memory)
        return len(self.clips), len(self.clips)

    def decode(self, output):
        labels = torch.full(CONFIG.grid.shape, 17, dtype=torch.uint8)
        labels[3, 4] = 2
        return [Prediction(CONFIG.grid, CONFIG.table, labels, torch.zeros(CONFIG.grid.shape))]


def listen(**kinds) -> tuple[Stream, Listener]:
    system = Listener()
    return Stream(Model(system, "listener", False, "fast", None), **kinds), system


def heard(stream: Stream, system: Listener, frames) -> list[bool]:
    """For each frame: was it told as the beginning of a drive?"""
    for f in frames:
        stream.step(f)
    return [bool(clip.fresh) for clip in system.clips]


def moved(f, **changes):
    """The frame with its cameras' matrices changed."""
    return replace(f, cameras=replace(f.cameras, **changes))


def test_frames_become_clips_that_follow_each_other():
    taker, system = listen()
    frames = drive(3, every=0.5, height=128, width=192)
    assert heard(taker, system, frames) == [True, False, False]
    assert system.memories == [None, 1, 2]
    assert system.clips[2].images.shape == (1, 1, 3, 3, 64, 96)
    assert system.clips[2].since_last.item() == 0.5
    expected = rigid.inverse(frames[2].world_from_car) @ frames[1].world_from_car
    assert torch.allclose(system.clips[2].now_from_last[0].double(), expected, atol=1e-5)


def test_a_stream_is_the_system_fed_with_clips():
    system, frames = build(), drive(4, every=0.5)
    taker, memory = Stream(Model(system, "small", False, "fast", None)), None
    for i, f in enumerate(frames):
        prediction = taker.step(f)
        with torch.no_grad():
            output, memory = system(Clip.of(f, after=frames[i - 1] if i else None), memory)
        (expected,) = system.decode(output)
        assert torch.equal(prediction.labels, expected.labels) and torch.equal(prediction.flow, expected.flow)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("another drive", lambda f: replace(f, drive="other")),
        ("other cameras", lambda f: replace(f, names=("a", "b", "c"))),
        ("time that goes back", lambda f: replace(f, stamp=NANO // 2, stamps=f.stamps * 0 + NANO // 2)),
        ("too long a gap", lambda f: replace(f, stamp=int(3.6 * NANO), stamps=f.stamps * 0 + int(3.6 * NANO))),
        ("another focal length", lambda f: moved(f, pixels_from_camera=f.cameras.pixels_from_camera * 1.03)),
        ("another mounting", lambda f: moved(f, car_from_camera=f.cameras.car_from_camera.flip(0))),
    ],
)
def test_the_past_is_forgotten_with(what, change):
    taker, system = listen()
    first, second = frame(at=1.0), frame(at=1.5, x=2)
    assert heard(taker, system, [first, second, change(second)]) == [True, False, True]
    assert system.memories[2] is None


def test_a_camera_that_sends_the_same_view_in_another_size_goes_on():
    taker, system = listen()
    large = frame(128, 192, at=1.1)
    assert heard(taker, system, [frame(at=1.0), large]) == [True, False]  # the network sees one size, and true cameras


def test_small_gaps_and_the_cars_own_motion_between_stamps_are_no_reason_to_forget():
    taker, system = listen()
    first = frame(at=1.0)
    pose = first.cameras.car_from_camera.clone()
    pose[1, :3, 3] += torch.tensor([1.2, 0, 0])  # 40 ms before the frame, at 30 m/s
    pose[1, :3, :3] = turn(0.03) @ pose[1, :3, :3]
    second = moved(frame(at=1.1, x=3), car_from_camera=pose)
    second.stamps[1] -= NANO // 25
    third = frame(at=3.0, x=9)
    assert heard(taker, system, [first, second, third]) == [True, False, False]
    without_stamps = replace(second, stamps=torch.full((3,), second.stamp))
    taker, system = listen()
    assert heard(taker, system, [first, without_stamps]) == [True, True]


def test_a_camera_that_is_missing_is_no_reason_to_forget():
    taker, system = listen()
    second = frame(at=1.1, used=[True, False, True])
    pose = second.cameras.car_from_camera.clone()
    pose[1] = torch.eye(4, dtype=torch.float64)
    second = moved(second, car_from_camera=pose)
    assert heard(taker, system, [frame(at=1.0), second, frame(at=1.2)]) == [True, False, False]
    assert system.clips[1].used.tolist() == [[[True, False, True]]]


def test_the_longest_gap_is_the_callers_choice_and_forgetting_too():
    taker, system = listen(longest_gap=0.2)
    assert heard(taker, system, [frame(at=0.0), frame(at=0.2), frame(at=0.5)]) == [True, False, True]
    taker.forget()
    assert heard(taker, system, [frame(at=0.6)])[-1]


def test_warming_up_leaves_no_trace():
    taker, system = listen()
    taker.warm_up(["a", "b"], height=90, width=160)
    assert system.clips[0].images.shape[2] == 2
    assert heard(taker, system, [frame(at=1.0), frame(at=1.1)])[1:] == [True, False] and system.memories[1] is None


def test_a_step_that_fails_leaves_the_drive_as_it_was():
    taker, system = listen()
    heard(taker, system, drive(2, every=0.5))
    system.broken = True
    with pytest.raises(RuntimeError, match="broken"):
        taker.step(frame(at=1.0))
    system.broken = False
    taker.step(frame(at=1.0))
    assert system.clips[-1].since_last.item() == 0.5 and system.memories[-1] == 2


def test_what_no_used_camera_of_this_set_sees_is_unobserved(monkeypatch):
    asked = []

    def observed(filled, grid, cameras, used):
        asked.append((filled.sum().item(), grid, cameras.height, used.tolist()))
        return filled

    monkeypatch.setattr(stream, "observed", observed)
    taker, _ = listen()
    prediction = taker.step(frame(128, 192, used=[True, False, True]))
    assert asked == [(8, CONFIG.grid, 64, [True, False, True])]
    assert prediction.unobserved.sum() == math.prod(CONFIG.grid.shape) - 8


def test_without_a_camera_nothing_is_observed():
    taker, _ = listen()
    assert taker.step(frame(used=[False] * 3)).unobserved.all()


def test_the_seconds_of_every_stage_are_told():
    taker, _ = listen()
    assert taker.seconds == {}
    taker.step(frame())
    assert list(taker.seconds) == ["prepare", "network", "voxels", "visibility"]
    assert all(0 <= s < 10 for s in taker.seconds.values())


def test_nano_steps_through_six_cameras_of_full_size():
    model = load("opus-nano")
    taker = Stream(model)
    for f in drive(2, every=0.1, height=900, width=1600, n=6):
        prediction = taker.step(f)
    assert model.name == "opus-nano (untrained)"
    assert prediction.labels.shape == (200, 200, 16) and prediction.flow.shape == (200, 200, 16, 2)
    assert int((prediction.labels != 17).sum()) > 1000
    assert 0.1 < prediction.unobserved.float().mean() < 0.9


def test_nan_in_the_network_is_an_error_and_forgotten_never_free_space():
    model = load("opus-nano")
    stream = Stream(model)
    frames = list(pattern.drive(2, height=90, width=160))
    stream.step(frames[0])
    weight = model.system.queries.weight
    with torch.no_grad():
        kept, weight[0, 0] = weight[0, 0].clone(), float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        stream.step(frames[1])
    assert stream.memory is None and stream.last is None
    with torch.no_grad():
        weight[0, 0] = kept
    stream.step(frames[1])


def test_a_camera_that_is_not_used_may_have_any_numbers():
    stream = Stream(Model(build(replace(CONFIG, look=8)), "opus", True, "fast", None))
    whole = frame(used=[True, False, True])
    wild = whole.cameras.pixels_from_camera.clone()
    wild[1] = torch.nan
    said = stream.step(replace(whole, cameras=replace(whole.cameras, pixels_from_camera=wild)))
    stream.forget()
    assert torch.equal(said.labels, stream.step(whole).labels)


# ---- a network on a GPU, here on one that is not there


@pytest.fixture
def no_kernels(monkeypatch):
    """Definitions run: there is nothing to launch on."""
    monkeypatch.setattr(gpu, "_launches", lambda _: False)


def test_a_step_on_a_gpu_is_sent_uint8_waits_once_before_voxels_are_made_and_says_the_same(monkeypatch, no_kernels):
    frames = [replace(f, points=None) for f in drive(4, every=0.25, height=90, width=150)]
    here = Stream(Model(build(), "small", False, "fast", None))
    there = Stream(Model(on_gpu(build()), "small", False, "fast", None))
    decode, told = there.model.system.decode, []
    monkeypatch.setattr(there.model.system, "decode", lambda output: told.append(dict(bus.waits)) or decode(output))
    for f in frames:
        expected = here.step(f)
        with Bus() as bus:
            said = there.step(f)
        assert told[-1] == {"a number": 1}, "whether all is finite"
        assert (torch.uint8, f.images.numel()) in bus.sent
        small = [size for kind, size in bus.sent if kind != torch.uint8]
        assert sum(small) < 4096, "matrices of the cameras, sizes of the grid"
        assert not isinstance(said.labels, Far) and (said.labels != expected.labels).float().mean() < 0.01
    assert int((said.labels != 17).sum()) > 20


def test_nan_on_a_gpu_is_told_by_the_one_number_that_is_read(no_kernels):
    system = build()
    system.queries.weight.data[0, 0] = torch.nan
    with Bus() as bus, pytest.raises(FloatingPointError, match="not finite"):
        Stream(Model(on_gpu(system), "small", False, "fast", None)).step(frame())
    assert dict(bus.waits) == {"a number": 1}
