"""Which moments make a clip: the windows of the published systems, newest first, as `Clip.of` takes them.

    window = windows.opus(world, sample)                    # or with rng=..., as in training
    clip = Clip.of(windows.load(world, window))

A window is chosen from the tables alone; no picture is opened before `load`.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..types import NANO, Frame
from .nuscenes import FASTEST, Moment, NuScenes

BETWEEN = 5  # records that OPUS keeps between two keyframes, whatever number the cameras made there
OPUS_LONGEST = 150  # records of the past that OPUS keeps
OPUS_INTERVALS = (4, 8)  # records from one chosen frame to the next in training
LONGEST_GAP = 1.5  # s from one frame of a window to the next; nuScenes' keyframes are 0.5 s apart


def opus(
    world: NuScenes,
    sample: str,
    frames: int = 8,
    rng: np.random.Generator | None = None,
    full: bool = False,
    longest_gap: float = LONGEST_GAP,
) -> list[Moment]:
    """OPUS's (and SparseBEV's) window of a keyframe: itself and `frames - 1` earlier moments, newest first.

    The past is a list of records: going back from a keyframe its 5 pictures of each camera (12 Hz), then the keyframe
    before, and so on to the scene's first keyframe, 150 at most. Without `rng` (test) every 6th record is taken, which
    is the keyframe before, and so on; where the past is short its oldest record is repeated, and where there is none
    the keyframe itself. With `rng` (training) the records are 4 to 8 apart, one draw a window, or less where the past
    is short; a past of at most `frames - 1` records is taken whole and its oldest repeated. A record that lacks a
    camera gives way to its younger neighbour. Source: github.com/jbwang1997/OPUS, `loaders/pipelines/loading.py`
    (LoadMultiViewImageFromMultiSweeps) and its info files.

    full: refuse, instead of repeating, where the scene has fewer keyframes than a test window needs. ValueError then,
    and where two neighbours of the window are further apart than `longest_gap` s or than a car drives.
    """
    now = world.keyframe(sample)
    keys = world.keyframes(now.scene)
    place = keys.index(now)
    count, past = frames - 1, min((BETWEEN + 1) * place, OPUS_LONGEST)
    if full and place < count:
        raise _short(now, place, count)

    def record(index: int) -> Moment:
        for k in range(index, -1, -1):
            back, step = divmod(k, BETWEEN + 1)
            key = keys[place - back]
            moment = keys[place - back - 1] if step == BETWEEN else world.earlier(key, step + 1)
            if min(moment.rows) >= 0:
                break
        return moment

    if past == 0 or count == 0:
        chosen = [now] * count
    elif rng is None:
        chosen = [record(min((k + 1) * (BETWEEN + 1) - 1, past - 1)) for k in range(count)]
    elif past <= count:
        chosen = [record(min(k, past - 1)) for k in range(count)]
    else:
        high = min(past // count, OPUS_INTERVALS[1])
        interval = int(rng.integers(min(high, OPUS_INTERVALS[0]), high + 1))
        chosen = [record((k + 1) * interval - 1) for k in range(count)]
    return _connected(world, [now, *chosen], longest_gap)


def stcocc(
    world: NuScenes, sample: str, frames: int = 3, full: bool = False, longest_gap: float = LONGEST_GAP
) -> list[Moment]:
    """STCOcc's window: the keyframe and the `frames - 1` keyframes before it (2: fused, and only for stereo).

    Where the scene has fewer, the oldest is repeated. The authors repeat the newest there (BEVDet's
    `prepare_inputs`), which no clip can say, as its frames run from new to old; a system that wants theirs knows the
    repeated frames by their equal ages. full, longest_gap and errors as in `opus`.
    """
    now = world.keyframe(sample)
    keys = world.keyframes(now.scene)
    place = keys.index(now)
    if full and place < frames - 1:
        raise _short(now, place, frames - 1)
    return _connected(world, [keys[max(place - k, 0)] for k in range(frames)], longest_gap)


def sequences(samples: Sequence[str], parts: int = 2) -> list[tuple[str, ...]]:
    """A scene's keyframes in `parts` drives that a training lane streams in order: ceil(n / parts) each, the last less.

    STCOcc and its ancestors train so (SOLOFusion, `_set_sequence_group_flag`): parts = 2.
    """
    if parts < 1:
        raise ValueError(f"sequences: expected at least one part, got {parts}")
    length = -(-len(samples) // parts)
    return [tuple(samples[i : i + length]) for i in range(0, len(samples), max(length, 1))]


def load(world: NuScenes, window: Sequence[Moment], lidar: int = 0, partial: bool = False) -> list[Frame]:
    """The frames of a window, each opened once however often it is repeated. Only the newest gets `lidar` sweeps.

    partial and errors as in `NuScenes.frame`.
    """
    seen: dict[Moment, Frame] = {}
    for moment in window:
        if moment not in seen:
            seen[moment] = world.frame(moment, lidar if moment == window[0] else 0, partial)
    frames = [seen[moment] for moment in window]
    return [frames[0], *(replace(frame, points=None) for frame in frames[1:])]


def _connected(world: NuScenes, window: list[Moment], longest_gap: float) -> list[Moment]:
    for newer, older in zip(window, window[1:]):
        seconds = (newer.stamp - older.stamp) / NANO
        far = float((world.pose(newer) - world.pose(older))[:3, 3].norm())
        if not 0 <= seconds <= longest_gap or far > FASTEST * seconds + 0.5:
            raise ValueError(
                f"{newer.scene}: a gap before {newer.sample or 'the sweep'} at {newer.stamp} ns: the frame before it "
                f"in the window lies {seconds:.3f} s and {far:.1f} m back, expected at most {longest_gap} s and "
                f"{FASTEST} m/s (tables sample_data and ego_pose in {world.folder})"
            )
    return window


def _short(now: Moment, there: int, wanted: int) -> ValueError:
    return ValueError(
        f"{now.scene}: sample {now.sample} has {there} keyframes before it, its window needs {wanted} (table sample)"
    )
