"""The command line: one function a subcommand. It parses, calls and prints; what it calls lives elsewhere.

`occflow SUB`, `python -m occflow_core SUB` and `ros2 run occflow_core SUB` are the same door.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal


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


def convert(
    model: Annotated[str, "system and preset of the checkpoint, e.g. opus-tiny"],
    authors_file: Annotated[Path, "the authors' published .pth"],
    out: Annotated[Path, "our .safetensors file"],
    /,
) -> None:
    """The authors' published checkpoint -> weights that the node and `load` take."""
    from .runtime.convert import convert as run

    print(run(model, authors_file, out))


def bench(
    what: Annotated[Literal["node"], "node: what the node costs beside the network"],
    /,
    sets: Annotated[int, "camera sets to measure"] = 100,
    pictures: Annotated[Path | None, "folder with one JPEG a camera; without: generated pictures of 1600 x 900"] = None,
    out: Annotated[Path | None, "also write the figures there as JSON"] = None,
) -> None:
    """Timings on this machine, as a table and as JSON."""
    from .bench import bench_node, table

    figures = bench_node(sets, pictures)
    print(table(figures))
    if out is not None:
        from .bench import write_json

        write_json(out, figures)


def demo(
    out: Annotated[Path, "folder for pictures, bags and summary.json"] = Path("out/demo"),
    seconds: Annotated[float, "length of the drive"] = 8.0,
    rate: Annotated[float, "speed of the replay"] = 1.0,
) -> None:
    """Drives the real node over ROS 2 through a recorded bag and keeps what it says."""
    from .demo import run

    print(run(out, seconds, rate))


SUBCOMMANDS = {f.__name__: f for f in (show, convert, bench, demo)}


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, 1 after a mistake that was named in one sentence, 2 for a command line that cannot be."""
    import tyro

    try:
        tyro.extras.subcommand_cli_from_dict(SUBCOMMANDS, prog="occflow", args=arguments)
    except (ValueError, OSError, RuntimeError) as problem:
        print(f"occflow: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
