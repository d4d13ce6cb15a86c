"""The command line: one function a subcommand. It parses, calls and prints; what it calls lives elsewhere.

`occflow SUB`, `python -m occflow_core SUB` and `ros2 run occflow_core SUB` are the same door.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal


def world(
    out: Annotated[Path, "folder of the data set; an unfinished world there is finished"],
    /,
    scenes: Annotated[int, "how many drives"] = 1,
    seed: Annotated[int, "the same seed gives the same bytes"] = 0,
    keyframes: Annotated[int, "of each scene, two a second"] = 40,
    width: Annotated[int, "pixels of the pictures; the height is 9/16 of it"] = 704,
    rig: Annotated[Path | None, "JSON of another car's cameras; without: nuScenes' six"] = None,
    weather: Annotated[str | None, "the same for all scenes; without: each its own"] = None,
    sweeps: Annotated[bool, "also what lies between keyframes: pictures at 12 Hz, LiDAR at 20 Hz"] = True,
    processes: Annotated[int | None, "scenes at once; without: one a core"] = None,
) -> None:
    """A synthetic world in nuScenes' own layout, with exact labels."""
    from .data.world import write_world

    size = (width * 9 // 16, width)
    made = write_world(
        out,
        scenes,
        seed=seed,
        keyframes=keyframes,
        size=size,
        rig=rig,
        weather=weather,
        sweeps=sweeps,
        processes=processes,
    )
    print(f"{scenes} scenes in {made}")


def labels(
    dataroot: Annotated[Path, "a data set in nuScenes' layout"],
    /,
    out: Annotated[Path | None, "folder for gts/ and openocc_v2/; without: the data set itself"] = None,
    version: Annotated[str | None, "of the tables, where the data set has several, e.g. v1.0-trainval"] = None,
    scene: Annotated[tuple[str, ...], "only these; without: all"] = (),
    shard: Annotated[str, "i/n: the i-th of n parts of the scenes, for many machines"] = "0/1",
    every: Annotated[int, "use every n-th LiDAR sweep between keyframes"] = 2,
    processes: Annotated[int, "scenes at once"] = 1,
    scales: Annotated[bool, "also labels_1_2, labels_1_4 and labels_1_8"] = True,
    overwrite: Annotated[bool, "make labels again that are there"] = False,
    keep_going: Annotated[bool, "count what is broken instead of stopping at it"] = False,
    against_truth: Annotated[bool, "compare `out` with the data set's own labels afterwards, as a table"] = False,
) -> None:
    """Occupancy and flow labels from LiDAR, boxes and poses: Occ3D's and OpenOcc v2's files."""
    from .make_labels import compare, make_labels

    if against_truth and out is None:
        raise ValueError("--against-truth compares with the data set's own labels: give --out another folder")
    chosen = scene or None
    print(make_labels(dataroot, out, version, chosen, shard, every, processes, scales, overwrite, keep_going))
    if against_truth:
        from .labels import agreement

        print(agreement.table(compare(dataroot, out, version, chosen)))


def bag(
    source: Annotated[Path, "a data set in nuScenes' layout; with --to-dataset a rosbag2 folder"],
    out: Annotated[Path, "folder of the bag; with --to-dataset of the data set"],
    /,
    scene: Annotated[str | None, "name of the drive; may be left out where there is only one"] = None,
    to_dataset: Annotated[bool, "the other way: a recorded drive becomes a data set"] = False,
    version: Annotated[str | None, "of the tables, e.g. v1.0-mini"] = None,
    rectified: Annotated[bool, "--to-dataset: the pictures are rectified, P holds"] = False,
    keep_going: Annotated[bool, "count what is broken instead of stopping at it"] = False,
) -> None:
    """A nuScenes scene as a rosbag2 with truth and transforms, or a recorded drive as a data set."""
    from .data.drives import bag_to_dataset, write_scene_bag

    if to_dataset:
        made = bag_to_dataset(
            source, out, scene=scene, version=version or "v1.0-mini", rectified=rectified, keep_going=keep_going
        )
    else:
        name = scene or _only_scene(source, version)
        made = write_scene_bag(source, name, out, version=version, keep_going=keep_going)
    print(f"{out}: {made}")


def _only_scene(dataroot: Path, version: str | None) -> str:
    from .data.nuscenes import NuScenes

    scenes = NuScenes(dataroot, version).scenes
    if len(scenes) != 1:
        raise ValueError(f"{dataroot} has {len(scenes)} scenes, name one with --scene: {', '.join(scenes[:8])} ...")
    return scenes[0]


def show(
    recording: Annotated[Path, "rosbag2 folder with the camera images"],
    predictions: Annotated[Path, "rosbag2 folder with VoxelFlow messages"],
    out: Annotated[Path, "folder for the pictures, one PNG a message"],
    /,
) -> None:
    """Pictures of predictions: cameras, voxels from above and from behind, flow arrows."""
    from .show.pictures import show_bag

    made = show_bag(recording, predictions, out)
    print(f"{len(made)} pictures in {out}")


def train(
    recipe: Annotated[str, "a name of training/recipes, e.g. demo"],
    /,
    out: Annotated[Path | None, "folder of the run, which goes on where it left off; without: out/train/RECIPE"] = None,
    set: Annotated[tuple[str, ...], "field=value of the Run, e.g. steps=50 optimise.rate=3e-4"] = (),
    device: Annotated[str | None, "cpu, cuda, cuda:1; without: a GPU if there is one"] = None,
) -> None:
    """A recipe -> weights; under torchrun on several GPUs and machines."""
    from occflow_recipes import RECIPES

    from .engine import recipe as find
    from .engine import with_settings
    from .engine.train import train as run

    print(run(with_settings(find(RECIPES, recipe), set), out or Path("out/train") / recipe, device))


def convert(
    model: Annotated[str, "system and preset of the checkpoint, e.g. opus-tiny"],
    authors_file: Annotated[Path, "the authors' published .pth"],
    out: Annotated[Path, "our .safetensors file"],
    /,
) -> None:
    """The authors' published checkpoint -> weights that the node and `load` take."""
    from .runtime.convert import convert as run

    run(model, authors_file, out)
    print(f"{out}: {model}")


def bench(
    what: Annotated[
        Literal["node", "metrics"],
        "node: what the node costs beside the network; metrics: what it costs to score a sample",
    ],
    /,
    sets: Annotated[int, "camera sets or samples to measure"] = 100,
    pictures: Annotated[
        Path | None, "node: folder with one JPEG a camera; without: generated pictures of 1600 x 900"
    ] = None,
    device: Annotated[str | None, "metrics: where; without: the CPU"] = None,
    out: Annotated[Path | None, "also write the figures there as JSON"] = None,
) -> None:
    """Timings on this machine, as a table and as JSON."""
    from .bench import bench_metrics, bench_node, table

    if (pictures if what == "metrics" else device) is not None:
        raise ValueError("bench: --pictures is for the node, --device for the metrics")
    figures = bench_node(sets, pictures) if what == "node" else bench_metrics(sets, device or "cpu")
    print(table(figures))
    if out is not None:
        from .bench import write_json

        write_json(out, figures)


def demo(
    out: Annotated[Path, "folder for pictures, bags and summary.json"] = Path("out/demo"),
    seconds: Annotated[float, "length of the drive"] = 10.0,
    rate: Annotated[float, "speed of the replay"] = 1.0,
) -> None:
    """Drives the real node over ROS 2 through a recorded bag and keeps what it says."""
    from .demo import run

    print(run(out, seconds, rate))


SUBCOMMANDS = {f.__name__: f for f in (world, labels, bag, train, show, convert, bench, demo)}


def gathered(arguments: list[str] | None, option: str) -> list[str]:
    """`--set a --set b` is `--set a b`: of an option that is given twice, tyro would keep the last."""
    words = iter(sys.argv[1:] if arguments is None else arguments)
    others, values, taking = [], [], False
    for word in words:
        if word == option:
            taking = True
            continue
        taking = taking and not word.startswith("-")
        (values if taking else others).append(word)
    return [*others, option, *values] if values else others


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, 1 after a mistake that was named in one sentence, 2 for a command line that cannot be."""
    import tyro

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the node, before PyTorch is loaded (docs/log.md)
    try:
        tyro.extras.subcommand_cli_from_dict(SUBCOMMANDS, prog="occflow", args=gathered(arguments, "--set"))
    except (ValueError, OSError, RuntimeError, FloatingPointError) as problem:
        print(f"occflow: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
