"""A world on disk: scenes by processes, each written beside and renamed, tables merged at the end."""

import json
import os
import shutil
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from pathlib import Path

import numpy as np

from . import rig as rigs
from . import tables
from .render import WEATHERS
from .scene import Plan, dump, finish, make

SIZE = (396, 704)  # H, W of the pictures
_HIDDEN = ".world"  # settings, rows of finished scenes, scenes in the making


def write_world(
    out: Path | str,
    scenes: int = 1,
    *,
    seed: int = 0,
    keyframes: int = 40,
    size: tuple[int, int] = SIZE,
    rig: Path | str | None = None,
    weather: str | None = None,
    sweeps: bool = True,
    processes: int | None = None,
    progress: bool = True,
) -> Path:
    """Scenes 0 .. scenes - 1 of a world as a nuScenes data set `v1.0-world` in the folder `out`, which is returned.

    keyframes: of each scene, 2 a second; size: (H, W) of the pictures; rig: a JSON of `rig.read`, None = nuScenes'
    car; weather: one of WEATHERS for all scenes, None = every scene has its own; sweeps: 12 Hz pictures and 20 Hz
    LiDAR between keyframes; processes: None = one a core.

    A finished scene is not made again, so a killed or longer run goes on where the last one ended; equal arguments
    give equal bytes whatever the number of processes. Beside nuScenes' own: `gts/` and `openocc_v2/` with labels, and
    `splits.json` beside the tables (world_train, and world_val: the last sixth).

    ValueError: no scenes, fewer than two keyframes, an unknown weather, a bad rig, or a folder that holds a world of
    other arguments. OSError: a folder that cannot be written.
    """
    out = Path(out)
    if scenes < 1 or keyframes < 2:
        raise ValueError(f"a world needs at least 1 scene of 2 keyframes, got {scenes} of {keyframes}")
    if weather is not None and weather not in WEATHERS:
        raise ValueError(f"weather {weather!r} is not known; there are: {', '.join(WEATHERS)}")
    if min(size) < 16:
        raise ValueError(f"pictures of {size[1]} x {size[0]} pixels are too small: 16 x 16 at least")
    table = (rigs.nuscenes() if rig is None else rigs.read(rig)).resized(*size)
    hidden = out / _HIDDEN
    try:
        hidden.mkdir(parents=True, exist_ok=True)
        (hidden / "probe").write_text("")
        (hidden / "probe").unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"cannot write a world to {out}: {error.strerror or error}") from error
    settings = {
        "seed": seed,
        "keyframes": keyframes,
        "size": list(size),
        "weather": weather,
        "sweeps": sweeps,
        "rig": None if rig is None else json.loads(Path(rig).read_text()),
        "layout": 1,
    }
    _claim(hidden / "settings.json", settings, out)
    plans = [Plan(seed, k, keyframes, table, weather or _weather(seed, k), sweeps) for k in range(scenes)]
    todo = [plan for plan in plans if not (hidden / f"{plan.name}.json").exists()]
    _run(todo, out, processes or os.cpu_count() or 1, progress)
    _map(out)
    fragments = (json.loads((hidden / f"{plan.name}.json").read_text()) for plan in plans)
    tables.write(out / tables.VERSION, fragments, table)
    return out


def demo_scene(out: Path | str, *, progress: bool = True) -> Path:
    """A small ready scene: 21 keyframes in 10 s of a clear day, pictures of 352 x 198 at 12 Hz, LiDAR at 20 Hz."""
    return write_world(out, 1, seed=DEMO_SEED, keyframes=21, size=(198, 352), weather="clear", progress=progress)


DEMO_SEED = 3


def _weather(seed: int, number: int) -> str:
    """A scene's own: clear and overcast most often."""
    rng = np.random.default_rng([seed, number, 3])
    return str(rng.choice(WEATHERS, p=[0.36, 0.22, 0.10, 0.14, 0.12, 0.06]))


def _claim(path: Path, settings: dict, out: Path) -> None:
    if path.exists():
        there = json.loads(path.read_text())
        wrong = [k for k in settings if there.get(k) != settings[k]]
        if wrong:
            said = ", ".join(f"{k} {there.get(k)!r} instead of {settings[k]!r}" for k in wrong if k != "rig")
            raise ValueError(f"{out} holds a world of other arguments ({said or 'another rig'}); choose another folder")
        return
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(settings))
    beside.rename(path)


def _run(plans: list[Plan], out: Path, processes: int, progress: bool) -> None:
    """Make scenes; where there are more processes than scenes, several make stretches of one."""
    if not plans:
        return
    shares = max(1, min(processes // len(plans), plans[0].keyframes // 2))
    bar = None
    if progress:
        from tqdm import tqdm

        bar = tqdm(total=sum(p.keyframes for p in plans), unit="keyframe", desc="world")
    for plan in plans:
        shutil.rmtree(_making(plan, out), ignore_errors=True)
    try:
        if min(processes, len(plans) * shares) <= 1:
            for plan in plans:
                _settle(plan, out, [make(plan, _making(plan, out), step=bar.update if bar else lambda: None)])
            return
        import multiprocessing

        # spawned, not forked: Embree's threads and torch's do not survive a fork
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(processes, len(plans) * shares), mp_context=context) as pool:
            jobs = {
                k: [pool.submit(make, plan, _making(plan, out), (i, shares)) for i in range(shares)]
                for k, plan in enumerate(plans)
            }
            finished = 0
            try:
                while jobs:
                    wait([job for parts in jobs.values() for job in parts], timeout=0.5, return_when=FIRST_EXCEPTION)
                    for k, parts in list(jobs.items()):
                        plan = plans[k]
                        if all(job.done() for job in parts):
                            _settle(plan, out, [job.result() for job in parts])
                            finished += plan.keyframes
                            del jobs[k]
                        elif any(job.done() and job.exception() for job in parts):
                            next(job for job in parts if job.done() and job.exception()).result()
                    if bar:
                        under_way = sum(
                            1 for k in jobs for _ in _making(plans[k], out).glob("openocc_v2/*/*/labels.npz")
                        )
                        bar.update(finished + under_way - bar.n)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        if bar:
            bar.close()


def _making(plan: Plan, out: Path) -> Path:
    return out / _HIDDEN / f"{plan.name}.making"


def _settle(plan: Plan, out: Path, parts) -> None:
    """Move a scene's files in place, and only then write down its rows: rows mean finished."""
    making = _making(plan, out)
    for file in sorted(p for p in making.rglob("*") if p.is_file()):
        place = out / file.relative_to(making)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)
    shutil.rmtree(making)
    dump(finish(plan, parts), out / _HIDDEN / f"{plan.name}.json")


def _map(out: Path) -> None:
    """A blank map: nuScenes' own reader wants the file that the table names."""
    import cv2

    path = out / "maps" / "world.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        done, file = cv2.imencode(".png", np.zeros((64, 64), np.uint8))
        assert done
        beside = path.with_suffix(".part")
        beside.write_bytes(file.tobytes())
        beside.rename(path)
