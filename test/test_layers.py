"""The house has floors: code may look down, never up and never sideways."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [  # low to high; rooms on one floor do not see each other
    {"transfer"},
    {"geometry"},
    {"types", "ops"},
    {"voxelflow", "pointcloud"},
    {"nn", "data", "labels", "metrics"},
    {"systems"},
    {"runtime"},
    {"engine", "show"},
    {"occflow_ros", "recipes"},
    {"bench", "make_labels"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
# no trainer, no dataset on the car
NODE_SEES = {"occflow_ros", "runtime", "types", "geometry", "transfer", "voxelflow", "pointcloud"}
# Guests sit at the top only of the files made for them; elsewhere inside the function that needs them
HOSTS = {"occflow_ros": {"rclpy", "rosbags"}, "data": {"cv2"}, "show": {"cv2"}}
GUESTS = {"rclpy", "triton", "numba", "rosbags", "cv2", "tyro", "tqdm", "simplejpeg", "rerun", "tensorboard", "PIL"}


def room_of(dotted: str) -> str | None:
    """occflow_core.nn.losses -> nn, occflow_ros.node -> occflow_ros, torch.nn -> None."""
    dotted = re.sub(r"^training\.recipes\b", "occflow_recipes", dotted)  # where its files lie
    head, *rest = dotted.split(".")
    if head == "occflow_core":
        return rest[0] if rest else None
    return {"occflow_ros": "occflow_ros", "occflow_recipes": "recipes"}.get(head)


def welcome(room: str, path: Path) -> set[str]:
    guests = set(HOSTS.get(room, set()))
    for suffix in ("triton", "numba"):
        if path.stem.endswith(f"_{suffix}"):
            guests.add(suffix)
    return guests


def imports(path: Path, root: Path):
    """(line, absolute dotted name, inside a function?) for every import in the file."""
    package = path.relative_to(root).parts[:-1]

    def walk(node, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((child.lineno, alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                stem = list(package[: len(package) - child.level + 1]) if child.level else []
                stem += [child.module] if child.module else []
                yield from ((child.lineno, ".".join([*stem, alias.name]), inside) for alias in child.names)
            yield from walk(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    yield from walk(ast.parse(path.read_text()), False)


def broken(path: Path, root: Path = ROOT):
    """Every rule that a file breaks, as a sentence."""
    where = path.relative_to(root)
    here = room_of(".".join(where.with_suffix("").parts).removesuffix(".__init__"))
    if here is None:
        if any(room_of(name) for _, name, _ in imports(path, root)):
            yield f"{where}: the package's own __init__ imports rooms; importing one room must not load the others"
        return
    if here not in FLOOR:
        yield f"{where}: the room {here!r} stands on no floor; give it one in test/test_layers.py"
        return
    for line, name, inside in imports(path, root):
        there, spot = room_of(name), f"{where}:{line} imports {name}"
        if there and there not in FLOOR:
            yield f"{spot}: the room {there!r} stands on no floor"
        elif there and there != here and FLOOR[there] >= FLOOR[here]:
            yield f"{spot}: {here} may not look up or sideways at {there}"
        if here == "occflow_ros" and there and there not in NODE_SEES:
            yield f"{spot}: the node sees only {sorted(NODE_SEES)}"
        if here == there == "systems" and path.stem != "__init__" and name.split(".")[2:3] != ["base"]:
            yield f"{spot}: one system may not lean on another; lower the shared part to nn or ops"
        if not inside and name.split(".")[0] in GUESTS - welcome(here, path):
            yield f"{spot}: import this inside the function that needs it"


def files(root: Path) -> list[Path]:
    return sorted(p for top in ("occflow_core", "occflow_ros", "training") for p in (root / top).rglob("*.py"))


def test_every_import_looks_down():
    paths = files(ROOT)
    assert len(paths) > 20, "no files found: the test is looking at the wrong folder"
    wrong = [line for path in paths for line in broken(path)]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("file", "code", "words"),
    [
        ("occflow_core/geometry/a.py", "from ..types import Frame", "may not look up"),
        ("occflow_core/data/a.py", "from occflow_core.labels import voxelise", "sideways"),
        ("occflow_core/attic/a.py", "x = 1", "no floor"),
        ("occflow_core/systems/a.py", "from .opus import Opus", "lean on another"),
        ("occflow_core/nn/a.py", "import rclpy", "inside the function"),
        ("occflow_core/ops/a.py", "import triton", "inside the function"),
        ("occflow_ros/a.py", "from occflow_core.data import bag", "the node sees only"),
        ("occflow_core/engine/a.py", "import occflow_recipes", "may not look up"),
        ("training/recipes/a.py", "from occflow_core.cli import main", "may not look up"),
        ("training/recipes/a.py", "import tqdm", "inside the function"),
        ("occflow_core/__init__.py", "from .runtime import Stream", "must not load the others"),
    ],
)
def test_the_check_notices(tmp_path, file, code, words):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert any(words in line for line in broken(path, tmp_path)), list(broken(path, tmp_path))


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("occflow_core/ops/a_triton.py", "import triton"),
        ("occflow_core/nn/a.py", "def f():\n    import triton"),
        ("occflow_ros/a.py", "import rclpy\nfrom occflow_core.runtime import Stream"),
        ("occflow_core/systems/__init__.py", "from .opus import Opus"),
        ("training/recipes/a.py", "from occflow_core.engine import Run"),
    ],
)
def test_the_check_lets_pass(tmp_path, file, code):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert not list(broken(path, tmp_path))
