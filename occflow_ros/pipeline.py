"""One set of images in, one prediction out: decode, look up transforms, make the Frame, step the Stream. No rclpy."""

import math
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from occflow_core.geometry import rigid
from occflow_core.pointcloud import Scan, together
from occflow_core.runtime import Stream
from occflow_core.runtime.prepare import Rectifier, Resizer
from occflow_core.transfer import fetchable
from occflow_core.types import NANO, Frame, Prediction

from .assemble import Calibration, ImageSet, Scans, frame_of
from .frames import TransformBuffer, TransformError
from .health import LIDAR, Health

# What a camera's mounting may change by between two sets and be the same: less than a calibration is good for, and
# more than a stabilised mount moves from set to set
SHIFTED, TURNED = 0.01, 0.2  # m, degrees
REFOCUSED = 0.01  # of the picture's size, and of a lens's coefficients: what an autofocus moves is less


@dataclass(frozen=True)
class Served:
    """What came of one set."""

    images: ImageSet  # as really used: cameras that were refused on the way are holes
    prediction: Prediction


class Pipeline:
    """The worker's job. Not thread-safe: one worker calls `serve`, in the order of the sets."""

    def __init__(
        self,
        names: Sequence[str],  # of the cameras
        topics: Sequence[str],  # their images', for what is said
        transforms: TransformBuffer,
        stream: Stream,
        health: Health,
        fixed_frame: str,
        base_frame: str,
        tf_wait: float,  # s that a set may wait for its transforms
        min_cameras: int,
        say: Callable[[str, str], None],  # (what it is about, a sentence); throttles by the first
        scans: Scans | None = None,  # where the model needs LiDAR: without a scan no set is answered
    ):
        self.names, self.topics, self.say = tuple(names), tuple(topics), say
        self.transforms, self.stream, self.health = transforms, stream, health
        self.fixed_frame, self.base_frame, self.tf_wait = fixed_frame, base_frame, tf_wait
        self.min_cameras, self.scans = min_cameras, scans
        self._mounts: list[torch.Tensor | None] = [None] * len(self.names)  # the latest known, base_from_camera
        self._rig: list[Calibration | None] = [None] * len(self.names)  # the latest, of those missing too
        self._ways: OrderedDict[tuple, Resizer | Rectifier | ValueError] = OrderedDict()  # by calibration, latest last
        self._decoders = ThreadPoolExecutor(min(len(self.names), os.cpu_count() or 1), "decode")

    def close(self) -> None:
        self._decoders.shutdown()

    def serve(self, images: ImageSet) -> Served | None:
        """The prediction for a set of Shots, or None when it was refused; why was said and counted."""
        begin = time.perf_counter()
        images, pictures = self._decode(images)
        if images is None:
            return None
        decoded = time.perf_counter()
        self.health.took("decode", decoded - begin)
        images, frame = self._frame(images, pictures)
        if frame is None:
            return None
        self.health.took("assemble", time.perf_counter() - decoded)
        prediction = self.stream.step(frame)
        for stage, seconds in self.stream.seconds.items():
            self.health.took(stage, seconds)
        return Served(images, prediction)

    def _decode(self, images: ImageSet) -> tuple[ImageSet | None, torch.Tensor | None]:
        """Pictures (N, H, W, 3) uint8 RGB of the set, its Shots with calibrations that are true for them; a broken one
        becomes a hole.

        Where the network is on a GPU, pictures that go to network size go there whole, and lie there afterwards.
        """
        for camera, shot in enumerate(images.pictures):
            if shot is None:
                continue
            before, self._rig[camera] = self._rig[camera], shot.calibration
            if before is not None and _sees_other(before, shot.calibration):
                self.health.count("intrinsics changed")
                self.stream.forget()  # what is remembered of it lies where it does not look
        size, device = self._common_size(), self.stream.model.device
        ways: list[Resizer | Rectifier | None] = [None] * len(self.names)
        if size is not None:
            pictures = fetchable((len(self.names), *size, 3), device)
        else:
            images, ways = self._to_network(images)
            pictures = torch.empty((len(self.names), *self._network_size(), 3), dtype=torch.uint8, device=device)
        whole = [
            None if way is None else fetchable((shot.picture.height, shot.picture.width, 3), device)
            for shot, way in zip(images.pictures, ways, strict=True)
        ]

        def decode(camera: int) -> Exception | None:
            shot, way = images.pictures[camera], ways[camera]
            if shot is None:
                return None
            try:
                shot.picture.decode_into((pictures if way is None else whole)[camera].numpy())
                if way is not None and device.type == "cpu":
                    way.into(pictures[camera], whole[camera])
                return None
            except Exception as error:  # whatever it is, it costs one camera and not the set
                return error

        for camera, error in enumerate(self._decoders.map(decode, range(len(self.names)))):
            if error is not None:
                known = self._rig[camera]
                expected = f"a whole picture of {known.width} x {known.height}"
                sentence = f"{self.topics[camera]}: refused: {error}, expected {expected}"
                images = self._hole(images, camera, "broken image", sentence)
            if images.pictures[camera] is None:
                pictures[camera] = 0
            elif ways[camera] is not None and device.type != "cpu":
                # not in `decode`: what a GPU fails at is no fault of the picture
                ways[camera].into(pictures[camera], whole[camera])
        return self._enough(images), pictures

    def _common_size(self) -> tuple[int, int] | None:
        """(height, width) where all cameras of the rig are pinholes of one size: their pictures go to the Stream as
        they are, which resizes them together. Else None: each goes to network size on its own way.

        All that were ever heard count, so that a camera which is missing for a while changes nothing.
        """
        known = [calibration for calibration in self._rig if calibration is not None]
        sizes = {(calibration.height, calibration.width) for calibration in known}
        return sizes.pop() if len(sizes) == 1 and all(calibration.lens is None for calibration in known) else None

    def _network_size(self) -> tuple[int, int]:
        config = self.stream.model.system.config
        return config.height, config.width

    def _to_network(self, images: ImageSet) -> tuple[ImageSet, list[Resizer | Rectifier | None]]:
        """How each camera's picture becomes the network's, and its Shots with calibrations that are true for that. A
        camera whose lens leaves no such picture becomes a hole."""
        shots, ways = list(images.pictures), [None] * len(self.names)
        for camera, shot in enumerate(images.pictures):
            if shot is None:
                continue
            way = self._way(shot.calibration)
            if isinstance(way, ValueError):
                shots[camera] = None
                images = self._hole(images, camera, "unusable lens", f"{self.topics[camera]}: refused: {way}")
                continue
            fitted = Calibration(way.pixels_from_camera, *self._network_size(), shot.calibration.optical_frame)
            shots[camera], ways[camera] = replace(shot, calibration=fitted), way
        return replace(images, pictures=tuple(shots)), ways

    def _way(self, calibration: Calibration) -> Resizer | Rectifier | ValueError:
        """From a camera's picture to the network's, or why there is none. Made once a calibration, since a lens takes a
        fifth of a second; two a camera are kept, for publishers that contradict each other on one topic."""
        key = calibration.key
        if key not in self._ways:
            k, sizes = calibration.pixels_from_camera, ((calibration.height, calibration.width), self._network_size())
            try:
                if calibration.lens is None:
                    self._ways[key] = Resizer(k, *sizes, self.stream.model.resize)
                else:
                    self._ways[key] = Rectifier(calibration.lens, k, calibration.pinhole, *sizes)
            except ValueError as problem:
                self._ways[key] = problem
            while len(self._ways) > 2 * len(self.names):
                self._ways.popitem(last=False)
        self._ways.move_to_end(key)
        return self._ways[key]

    def _frame(self, images: ImageSet, pictures: torch.Tensor) -> tuple[ImageSet | None, Frame | None]:
        """The Frame of decoded pictures; a camera whose transforms are unknown becomes a hole."""
        until = time.monotonic() + self.tf_wait

        def look_up(target: str, source: str, stamp: int) -> torch.Tensor:
            return self.transforms.wait(target, source, stamp, max(0.0, until - time.monotonic()))

        mounts: list[torch.Tensor | None] = [None] * len(self.names)
        poses: list[torch.Tensor | None] = [None] * len(self.names)
        # newest first: once TF has reached the newest image, none of the others has to wait
        for camera in sorted(range(len(self.names)), key=lambda i: -(images.stamps[i] or 0)):
            stamp = images.stamps[camera]
            if stamp is None:
                continue
            try:
                mounts[camera] = look_up(self.base_frame, images.pictures[camera].calibration.optical_frame, stamp)
                poses[camera] = look_up(self.fixed_frame, self.base_frame, stamp)
            except TransformError as error:
                pictures[camera] = 0
                images = self._hole(images, camera, "no transform", f"{self.topics[camera]}: refused: {error}")
        if self._enough(images) is None:
            return None, None
        self._compare(images, mounts)
        world_from_car, points = poses[images.stamps.index(images.stamp)], None
        if self.scans is not None:
            points = self._points(images.stamp, world_from_car, look_up, until)
            if points is None:
                return None, None
        return images, frame_of(images, self.names, pictures, mounts, poses, world_from_car, points)

    def _compare(self, images: ImageSet, mounts: Sequence[torch.Tensor | None]) -> None:
        """Forgets the past where a camera was mounted anew: what was remembered lies where it is not.

        A mount that moves a little from set to set is one that moves: each set's own place is used for what it saw.
        """
        for camera, (before, now) in enumerate(zip(self._mounts, mounts, strict=True)):
            if images.pictures[camera] is None:
                continue
            self._mounts[camera] = now
            shifted, turned = (0.0, 0.0) if before is None else rigid.difference(before, now)
            if shifted > SHIFTED or turned > math.radians(TURNED):
                frame = images.pictures[camera].calibration.optical_frame
                moved = f"by {shifted:.3f} m and {math.degrees(turned):.2f} degrees"
                sentence = f"{self.base_frame} <- {frame} changed {moved}: memory is forgotten"
                self.health.count("extrinsics changed")
                self.say(f"{frame} moved", sentence)
                self.stream.forget()

    def _points(
        self,
        stamp: int,
        world_from_car: torch.Tensor,
        look_up: Callable[[str, str, int], torch.Tensor],
        until: float,  # s, steady: how long scans may be waited for
    ) -> torch.Tensor | None:
        """The LiDAR's points for a set, (P, 5) as Frame has them; None where no scan of it can be used."""
        begin, car_from_world, scans = time.perf_counter(), rigid.inverse(world_from_car), []
        clouds = self.scans.take(stamp, max(0.0, until - time.monotonic()))
        for cloud in clouds:
            try:
                base_from_lidar = look_up(self.base_frame, cloud.frame, cloud.stamp)
                world_from_base = look_up(self.fixed_frame, self.base_frame, cloud.stamp)
            except TransformError as error:
                sentence = f"{self.scans.topic}: refused: {error}"
                self.health.dropped(LIDAR, "no transform", sentence)
                self.say(f"{LIDAR} no transform", sentence)
                continue
            car_from_lidar = car_from_world @ world_from_base @ base_from_lidar
            scans.append(Scan(torch.from_numpy(cloud.points), car_from_lidar, (stamp - cloud.stamp) / NANO))
        if not scans or scans[0].age > self.scans.gap:
            newest = self.scans.newest()
            if clouds:
                what = "no scan's transform is known"
            elif newest is None:
                what = "no scan came yet"
            else:
                what = f"the newest scan is {(stamp - newest) / NANO:.2f} s old, expected at most {self.scans.gap} s"
            self._lost("no LiDAR scan", f"{self.scans.topic}: a set was refused: {what}, and the model needs LiDAR")
            return None
        self.health.took("scans", time.perf_counter() - begin)
        return together(scans)

    def _hole(self, images: ImageSet, camera: int, reason: str, sentence: str) -> ImageSet:
        self.health.dropped(self.names[camera], reason, sentence)
        self.say(f"{self.names[camera]} {reason}", sentence)
        return images.without(camera)

    def _lost(self, reason: str, sentence: str) -> None:
        self.health.dropped("sets", reason, sentence)
        self.say(reason, sentence)

    def _enough(self, images: ImageSet) -> ImageSet | None:
        here = sum(shot is not None for shot in images.pictures)
        if here >= max(1, self.min_cameras):
            return images
        least = max(1, self.min_cameras)
        self._lost("too few usable cameras", f"a set was refused: {here} usable cameras, expected at least {least}")
        return None


def _sees_other(before: Calibration, now: Calibration) -> bool:
    """Do two calibrations of one camera look at different things, whatever the size of their pictures?"""
    if (before.lens is None) != (now.lens is None):
        return True
    if now.lens is not None:
        bends = np.array(before.lens.coefficients), np.array(now.lens.coefficients)
        if before.lens.model != now.lens.model or bends[0].shape != bends[1].shape:
            return True
        if np.abs(bends[0] - bends[1]).max() > REFOCUSED:
            return True
    shares = [c.pixels_from_camera[:2] / [[c.width], [c.height]] for c in (before, now)]
    return bool(np.abs(shares[0] - shares[1]).max() > REFOCUSED)
