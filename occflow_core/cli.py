"""The command line: one function a subcommand. It parses, calls and prints; what it calls lives elsewhere.

`occflow SUB`, `python -m occflow_core SUB` and `ros2 run occflow_core SUB` are the same door.
"""

import inspect
import os
import sys
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin


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
    camera: Annotated[
        tuple[str, ...],
        "--to-dataset: cameras, each NAME=IMAGE_TOPIC; without: every image topic with a camera_info beside it",
    ] = (),
    info: Annotated[
        tuple[str, ...], "--to-dataset: NAME=CAMERA_INFO_TOPIC of cameras that have it somewhere else"
    ] = (),
    lidar: Annotated[str, "--to-dataset: topic of the LiDAR's PointCloud2, auto (the only one) or none"] = "auto",
    base: Annotated[str, "--to-dataset: TF frame of the car, x forward, y left, z up"] = "base_link",
    world: Annotated[
        str | None, "--to-dataset: TF frame it drives in; without: the first of map, odom, world, earth that TF has"
    ] = None,
    rectified: Annotated[bool, "--to-dataset: the pictures are rectified, P holds"] = False,
    quality: Annotated[int, "--to-dataset: of JPEGs that must be made anew, 1 to 100"] = 95,
    keep_going: Annotated[bool, "count what is broken instead of stopping at it"] = False,
) -> None:
    """A nuScenes scene as a rosbag2 with truth and transforms, or a recorded drive as a data set."""
    from .data.drives import bag_to_dataset, write_scene_bag

    if to_dataset:
        made = bag_to_dataset(
            source,
            out,
            scene=scene,
            version=version or "v1.0-mini",
            cameras=_by_name("--camera", camera) if camera else None,
            infos=_by_name("--info", info),
            lidar=None if lidar == "none" else lidar,
            base=base,
            world=world,
            rectified=rectified,
            quality=quality,
            keep_going=keep_going,
        )
    else:
        if (camera, info, lidar, base, world, rectified, quality) != ((), (), "auto", "base_link", None, False, 95):
            raise ValueError(
                "--camera, --info, --lidar, --base, --world, --rectified and --quality say how a recorded drive "
                "becomes a data set: add --to-dataset"
            )
        name = scene or _only_scene(source, version)
        made = write_scene_bag(source, name, out, version=version, keep_going=keep_going)
    print(f"{out}: {made}")


def _by_name(option: str, words: tuple[str, ...]) -> dict[str, str]:
    """NAME=TOPIC words as a table."""
    pairs = [word.partition("=") for word in words]
    for word, (name, _, topic) in zip(words, pairs):
        if not name or not topic or [n for n, *_ in pairs].count(name) > 1:
            raise ValueError(
                f"{option} {word}: expected NAME=TOPIC, each name once, as in CAM_FRONT=/front/image_raw/compressed"
            )
    return {name: topic for name, _, topic in pairs}


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


def export(
    model: Annotated[str, "system and preset, e.g. opus-demo"],
    out: Annotated[Path | None, "folder that does not exist yet"] = None,
    /,
    backend: Annotated[
        Literal["aot", "onnx", "tensorrt"] | None, "AOTInductor packages, ONNX, or TensorRT in packages; without: aot"
    ] = None,
    weights: Annotated[Path | None, "its weights; without: those that ship, else random ones"] = None,
    device: Annotated[str, "aot, tensorrt: where it will run, cpu or cuda"] = "cpu",
    cameras: Annotated[int, "how many"] = 6,
    coverage: Annotated[bool, "write nothing: print which operators TensorRT would run; needs no GPU"] = False,
) -> None:
    """A model's encoder and decoder -> files that run without its Python, compared with it."""
    from .runtime import load

    if coverage == (out is not None):
        raise ValueError("export: name a folder for the files, or ask for --coverage, which writes none")
    if coverage and backend not in (None, "tensorrt"):
        raise ValueError(f"export: --coverage is told of tensorrt, not of {backend}")
    loaded = load(model, weights, device)
    if coverage:
        from .runtime.coverage import coverage as told

        print(told(loaded, cameras))
    else:
        from .runtime.export import export as run

        print(run(loaded, out, backend or "aot", cameras))


def bench(
    what: Annotated[
        Literal["node", "model", "metrics", "stream"],
        "node: what the node costs beside the network; model: a network; metrics: what it costs to score a sample; "
        "stream: models x backends x precisions x devices, beside the least that this machine needs",
    ],
    /,
    sets: Annotated[int | None, "node, model, metrics: camera sets or samples to measure; without: 100"] = None,
    pictures: Annotated[
        Path | None, "node: folder with one JPEG a camera; without: generated pictures of 1600 x 900"
    ] = None,
    model: Annotated[str | None, "model: its name, e.g. opus-v2-nano; without: opus-demo"] = None,
    weights: Annotated[Path | None, "model: its weights; without: those that ship, else random ones"] = None,
    device: Annotated[str | None, "model and metrics: where; without: the CPU"] = None,
    backend: Annotated[
        Literal["eager", "compiled", "aot", "tensorrt"] | None, "model: what runs it; without: eager"
    ] = None,
    precision: Annotated[
        Literal["float32", "bf16", "fp16"] | None, "model: of the network's products; without: float32"
    ] = None,
    steps: Annotated[int | None, "stream: steps to measure of each; without: 30"] = None,
    models: Annotated[tuple[str, ...], "stream: their names; without: opus-demo"] = (),
    backends: Annotated[tuple[str, ...], "stream: of eager, compiled, aot, tensorrt; without: eager"] = (),
    precisions: Annotated[tuple[str, ...], "stream: of float32, bf16, fp16; without: the first two"] = (),
    devices: Annotated[tuple[str, ...], "stream: e.g. cpu cuda; without: the CPU, and a GPU if there is one"] = (),
    out: Annotated[
        Path | None, "also write the figures there as JSON; stream: after each row, and goes on where it was cut off"
    ] = None,
) -> None:
    """Timings on this machine, as a table and as JSON."""
    from .bench import bench_metrics, bench_model, bench_node, table

    takers = {
        "sets": ("node", "model", "metrics"),
        "pictures": ("node",),
        "model": ("model",),
        "weights": ("model",),
        "device": ("model", "metrics"),
        "backend": ("model",),
        "precision": ("model",),
        "steps": ("stream",),
        "models": ("stream",),
        "backends": ("stream",),
        "precisions": ("stream",),
        "devices": ("stream",),
    }
    options = {"sets": sets, "pictures": pictures, "model": model, "weights": weights, "device": device}
    options |= {"backend": backend, "precision": precision, "steps": steps, "models": models, "backends": backends}
    options |= {"precisions": precisions, "devices": devices}
    for option, given in options.items():
        if given not in (None, ()) and what not in takers[option]:
            raise ValueError(f"bench: --{option} is for {' and '.join(takers[option])}, not for {what}")
    if what == "stream":
        _bench_stream(30 if steps is None else steps, models, backends, precisions, devices, out)
        return
    sets = 100 if sets is None else sets
    if sets < 1:
        raise ValueError(f"bench: --sets must be at least 1, got {sets}")
    if what == "node":
        figures = bench_node(sets, pictures)
    elif what == "model":
        how = (device or "cpu", backend or "eager", precision or "float32")
        figures = bench_model(sets, model or "opus-demo", weights, *how)
    else:
        figures = bench_metrics(sets, device or "cpu")
    print(table(figures))
    if out is not None:
        from .bench import write_json

        write_json(out, figures)


def _bench_stream(
    steps: int,
    models: tuple[str, ...],
    backends: tuple[str, ...],
    precisions: tuple[str, ...],
    devices: tuple[str, ...],
    out: Path | None,
) -> None:
    import torch

    from .bench import PRECISIONS, bench_stream, stream_table

    there = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    words = (models or ("opus-demo",), backends or ("eager",), precisions or PRECISIONS, devices or there)
    print(stream_table(bench_stream(steps, *words, out, progress=True)))


def evaluate(
    recipe: Annotated[str, "name of a recipe: which model and data"],
    checkpoint: Annotated[Path | None, "its weights; without: what --against or --make-average asks for alone"] = None,
    /,
    set: Annotated[tuple[str, ...], "field=value of the recipe, e.g. data.root=/data/nuscenes"] = (),
    scene: Annotated[tuple[str, ...], "only these; without: the recipe's validation split"] = (),
    out: Annotated[
        Path | None, "folder; drives that are finished there are not repeated; without: out/evaluate/RECIPE"
    ] = None,
    against: Annotated[Literal["truth"] | None, "truth: fail unless the truth scores 100 % against itself"] = None,
    average: Annotated[Path | None, "map of the average world; without: beside the weights, or made"] = None,
    make_average: Annotated[bool, "only make that map, beside CHECKPOINT or in --out"] = False,
    absent: Annotated[
        Literal["zero", "skip"], "what a class that the truth never has is worth in mIoU: the 2023 challenge, SparseOcc"
    ] = "zero",
    over: Annotated[Literal["right", "all"], "rays of mAVE: right ones (papers); all (packaged scorer)"] = "right",
    sweeps: Annotated[bool, "the model also sees what lies between keyframes"] = False,
    submission: Annotated[bool, "also write the challenge's file (OpenOcc labels)"] = True,
    sign: Annotated[tuple[str, ...], "field=value of that file, e.g. team=Us"] = (),
    device: Annotated[str | None, "where the network runs; without: a GPU if there is one"] = None,
    backend: Annotated[
        Literal["eager", "compiled", "aot", "tensorrt"], "what runs the network, as in the node"
    ] = "eager",
    precision: Annotated[Literal["float32", "bf16", "fp16"], "of the network's products"] = "float32",
    keep_going: Annotated[bool, "count keyframes that cannot be scored instead of stopping"] = False,
) -> None:
    """Scores of weights on a recipe's validation split, beside what costs nothing to predict; also under torchrun."""
    from occflow_recipes import RECIPES

    from .engine import recipe as recipe_of
    from .engine import with_settings
    from .engine.distributed import joined
    from .engine.evaluate import average_path, evaluate_run, table
    from .engine.evaluate import make_average as make

    run, out = with_settings(recipe_of(RECIPES, recipe), set), out or Path("out/evaluate") / recipe
    signed = dict(_field(text) for text in sign)
    if checkpoint is None and against is None and not make_average:
        raise ValueError("evaluate: name the weights, or ask for --against truth or --make-average")
    if (checkpoint is None or make_average) and (backend, precision) != ("eager", "float32"):
        raise ValueError("evaluate: --backend and --precision are for a network that is scored: name its weights")
    if sign and (not submission or run.data.labels != "openocc"):
        raise ValueError("evaluate: --sign is for the challenge's file, which needs OpenOcc labels and --submission")
    with joined(device) as processes:
        if make_average:
            path = out / "average.safetensors" if checkpoint is None else average_path(checkpoint)
            said = f"{path}: the average world of {make(run, path)[1]}"
        else:
            report = evaluate_run(
                run,
                checkpoint,
                out,
                scenes=scene,
                against_truth=against == "truth",
                average=average,
                sweeps=sweeps,
                submit=signed if submission and run.data.labels == "openocc" else None,
                absent=absent,
                over=over,
                device=processes.device,
                backend=backend,
                precision=precision,
                keep_going=keep_going,
            )
            said = f"{table(report)}\n\nin {out}"
        if processes.first:
            print(said)


def _field(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"expected field=value, got {text!r}")
    return name, value


def demo(
    out: Annotated[Path, "folder for pictures, bags and summary.json"] = Path("out/demo"),
    seconds: Annotated[float, "length of the drive"] = 10.0,
    rate: Annotated[float, "speed of the replay"] = 1.0,
) -> None:
    """Drives the real node over ROS 2 through a synthetic street and keeps what it says."""
    from .demo import run

    print(run(out, seconds, rate))


SUBCOMMANDS = {f.__name__: f for f in (world, labels, bag, train, show, convert, evaluate, export, bench, demo)}


def gathered(arguments: list[str], option: str) -> list[str]:
    """`--set a --set b` is `--set a b`: of an option that is given twice, tyro would keep the last."""
    others, values, taking = [], [], False
    for word in arguments:
        taking = word == option or (taking and not word.startswith("-"))
        (values if taking else others).append(word)
    return others + [option] * bool(values) + [word for word in values if word != option]


def _show_sentences(function) -> None:
    """tyro shows a sentence beside a type only as its own `arg`: the annotations get that form."""
    from tyro.conf import arg

    positional = {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_ONLY}
    for name, annotation in function.__annotations__.items():
        if get_origin(annotation) is Annotated and isinstance(annotation.__metadata__[0], str):
            kind, sentence = get_args(annotation)
            shown = name.upper() if name in positional and get_origin(kind) is not Literal else None
            function.__annotations__[name] = Annotated[kind, arg(help=sentence, metavar=shown)]


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, 1 after a mistake that was named in one sentence, 2 for a command line that cannot be."""
    import tyro

    given = sys.argv[1:] if arguments is None else arguments
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the node, before PyTorch is loaded (docs/log.md)
    try:
        for function in SUBCOMMANDS.values():
            _show_sentences(function)
        for option in ("--set", "--camera", "--info", "--models", "--backends", "--precisions", "--devices"):
            given = gathered(given, option)
        tyro.extras.subcommand_cli_from_dict(SUBCOMMANDS, prog="occflow", args=given)
    except (ValueError, OSError, RuntimeError, FloatingPointError) as problem:
        print(f"occflow: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
