"""Frames in, predictions out: the one job of this package."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from time import perf_counter

import torch
from torch import Tensor

from ..geometry import Cameras, rigid
from ..ops import observed
from ..types import NANO, Clip, Frame, Prediction
from .load import Model
from .prepare import prepare

# What a rig may change by from frame to frame and still be the same. `car_from_camera` holds the car's own motion
# between a camera's stamp and the frame's, so the older a picture is, the farther its camera may seem to have moved.
FOCAL = 0.01  # share of the focal length; also of the picture, for the principal point
SHIFT, SPEED = 0.5, 50.0  # m, m/s
TURN, TURN_RATE = 0.1, 1.0  # rad, rad/s
LIDAR, FENCE = 1.84, 40.0  # m: how high it stands and how far a wall is, in a made-up scan


class Stream:
    """One drive at a time, newest frame last. What it learned from a drive it forgets at the next."""

    def __init__(self, model: Model, longest_gap: float = 2.0):
        """longest_gap: s between two frames of one drive; after more, what was remembered is of no use."""
        self.model, self.longest_gap = model, longest_gap
        # of each stage of the last step: prepare, network, voxels, visibility. A GPU is waited for after the network,
        # so what it does to prepare counts there
        self.seconds: dict[str, float] = {}
        self.forget()

    def forget(self) -> None:
        """Begin a drive with the next frame, whatever it says."""
        self.memory, self.last = None, None

    def warm_up(self, names: Sequence[str], height: int = 900, width: int = 1600) -> None:
        """One step on black pictures, forgotten at once: kernels are compiled and memory is taken before it counts."""
        n = len(names)
        looks = torch.eye(3, dtype=torch.float64)
        looks[0, 0] = looks[1, 1] = looks[0, 2] = width / 2
        looks[1, 2] = height / 2
        mount = rigid.from_quaternion((0.5, -0.5, 0.5, -0.5), (0.0, 0.0, 1.5))
        cameras = Cameras(looks.expand(n, 3, 3), mount.expand(n, 4, 4), height, width)
        black = torch.zeros(n, height, width, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        used, stamps = torch.ones(n, dtype=torch.bool), torch.zeros(n, dtype=torch.int64)
        here = torch.eye(4, dtype=torch.float64)
        points = made_up_points(self.model.system.config) if self.model.system.config.sweeps else None
        self.step(Frame(black, cameras, used, stamps, 0, here, "warm-up", tuple(names), points))
        self.forget()

    @torch.inference_mode()
    def step(self, frame: Frame) -> Prediction:
        """Frames at camera size in the order of their stamps -> the prediction at the frame's stamp, on the CPU."""
        clock = [perf_counter()]
        system, device = self.model.system, self.model.device
        frame = prepare(frame, system.config.height, system.config.width, self.model.resize, device)
        clock.append(perf_counter())

        if self.last is not None and not follows(self.last, frame, self.longest_gap):
            self.forget()
        output, memory = system(Clip.of(frame, after=self.last).to(device), self.memory)
        if not _finite(output):  # NaN scores nothing: it would read as free space, and stay in the memory
            self.forget()
            raise FloatingPointError("the network's output is not finite (NaN or infinite); its memory was forgotten")
        self.memory, self.last = memory, frame  # together: a step that fails leaves the drive as it was
        clock.append(perf_counter())  # a GPU has done all of it: `_finite` had to wait

        prediction = system.decode(output)[0].to("cpu")
        clock.append(perf_counter())

        filled = prediction.labels != prediction.classes.free
        seen = observed(filled, prediction.grid, frame.cameras, frame.used)
        prediction = replace(prediction, unobserved=~seen)
        clock.append(perf_counter())
        stages = ("prepare", "network", "voxels", "visibility")
        self.seconds = {stage: end - start for stage, start, end in zip(stages, clock, clock[1:], strict=False)}
        return prediction


def made_up_points(config) -> Tensor:
    """What a LiDAR like nuScenes' (32 beams, 1,084 azimuths, 1.84 m up) meets on flat ground amid a wall 40 m away, in
    the scans that the config wants, each at the same places."""
    up = torch.linspace(-30.67, 10.67, 32).deg2rad()[:, None]
    around = 2 * torch.pi * torch.arange(1084) / 1084
    away = torch.where(up < 0, LIDAR / (-up.tan()).clamp_min(1e-6), FENCE).clamp_max(FENCE).expand(-1, 1084)
    height = LIDAR + away * up.tan()
    scan = torch.stack([away * around.cos(), away * around.sin(), height, torch.full_like(away, 20.0)], dim=-1)
    scan = scan.flatten(0, 1)
    age = 0.05 * torch.arange(config.sweeps).repeat_interleave(len(scan))
    return torch.cat([scan.repeat(config.sweeps, 1), age[:, None]], dim=1)


def _finite(output) -> bool:
    """Are all tensors of a system's output finite? A GPU is asked once."""
    told = [torch.isfinite(tensor).all() for tensor in _told(output)]
    return bool(torch.stack(told).all()) if told else True


def _told(output) -> Iterator[Tensor]:
    """The tensors in dataclasses and sequences, without those of cameras: they came in with the frame, those that are
    not used with any numbers."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _told(part)
    elif is_dataclass(output) and not isinstance(output, Cameras):
        for f in fields(output):
            yield from _told(getattr(output, f.name))


def follows(last: Frame, frame: Frame, longest_gap: float) -> bool:
    """Is `frame` of the same drive and the same rig as `last`, not earlier, and not more than `longest_gap` s later?"""
    gap = (frame.stamp - last.stamp) / NANO
    same = (frame.drive, frame.names) == (last.drive, last.names) and frame.images.shape == last.images.shape
    return same and 0 <= gap <= longest_gap and _same_rig(last, frame)


def _same_rig(last: Frame, frame: Frame) -> bool:
    both = last.used & frame.used
    if not both.any():
        return True
    k_last, k = last.cameras.pixels_from_camera[both], frame.cameras.pixels_from_camera[both]
    focal = torch.stack([k[:, 0, 0], k[:, 1, 1]]) / torch.stack([k_last[:, 0, 0], k_last[:, 1, 1]]) - 1
    middle = (k[:, :2, 2] - k_last[:, :2, 2]) / k.new_tensor([frame.cameras.width, frame.cameras.height])
    if max(float(focal.abs().max()), float(middle.abs().max())) > FOCAL:
        return False
    age = _age(last, both) + _age(frame, both)  # s
    then_from_now = rigid.inverse(last.cameras.car_from_camera[both]) @ frame.cameras.car_from_camera[both]
    moved = then_from_now[:, :3, 3].norm(dim=-1)
    trace = then_from_now[:, :3, :3].diagonal(dim1=-2, dim2=-1).sum(-1)
    turned = ((trace - 1) / 2).clamp(-1, 1).arccos()
    return bool(((moved <= SHIFT + SPEED * age) & (turned <= TURN + TURN_RATE * age)).all())


def _age(frame: Frame, cameras: Tensor) -> Tensor:
    return (frame.stamp - frame.stamps[cameras]).abs().double() / NANO
