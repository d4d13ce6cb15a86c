"""Launch file, RViz view, and what `ros2 bag` reads of our bags.

`launch`, `launch_ros`, RViz and `ros2 bag` are not on PyPI: the file runs under stand-ins, and under ROS's own `launch`
where that is installed; view and bags are held to names that stand in the sources of Jazzy.
"""

import importlib.util
import os
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml

from occflow_core.data import pattern
from occflow_core.data.bag import write_bag

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "launch" / "occflow.launch.py"
VIEW = ROOT / "rviz" / "occflow.rviz"
CONFIG = ROOT / "config" / "occflow.yaml"
POLICY = ROOT / "config" / "sros2" / "policy.xml"
ARGUMENTS = ["params", "bag", "rate", "rviz", "respawn", "use_sim_time"]


# ----------------------------------------------------------------------------------------------- ROS's launch, stood in


class Stub:
    """An action of launch: remembers what it was made with."""

    def __init__(self, *positional, **named):
        self.positional = positional
        self.__dict__.update(named)


class PackageNotFoundError(KeyError):
    pass


def stand_ins(installed: set[str]) -> dict[str, ModuleType]:
    def prefix(package: str) -> str:
        if package not in installed:
            raise PackageNotFoundError(package)
        return str(ROOT)

    content = {
        "ament_index_python.packages": {
            "PackageNotFoundError": PackageNotFoundError,
            "get_package_prefix": prefix,
            "get_package_share_directory": prefix,  # config/ and rviz/ lie in this checkout as they lie in share/
        },
        "launch": {"LaunchDescription": type("LaunchDescription", (Stub,), {})},
        "launch.actions": {name: type(name, (Stub,), {}) for name in ("DeclareLaunchArgument", "OpaqueFunction")},
        "launch_ros.actions": {"Node": type("Node", (Stub,), {})},
    }
    modules = {name: ModuleType(name) for full in content for name in (full.partition(".")[0], full)}
    for name, members in content.items():
        modules[name].__dict__.update(members)
    return modules


class Launched:
    """The launch file under the stand-ins: its declared arguments, and what it starts for chosen values of them."""

    def __init__(self, monkeypatch, installed: set[str]):
        for name, module in stand_ins(installed).items():
            monkeypatch.setitem(sys.modules, name, module)
        (entities,) = runpy.run_path(str(FILE))["generate_launch_description"]().positional
        kinds = [type(entity).__name__ for entity in entities]
        assert kinds == ["DeclareLaunchArgument"] * (len(kinds) - 1) + ["OpaqueFunction"]
        self.arguments = {a.positional[0]: a for a in entities[:-1]}
        self.function = entities[-1].function

    def __call__(self, **chosen: str) -> dict[str, Stub]:
        values = {name: argument.default_value for name, argument in self.arguments.items()} | chosen
        started = self.function(SimpleNamespace(launch_configurations=values))
        return {node.executable: node for node in started}


@pytest.fixture
def launched(monkeypatch) -> Launched:
    return Launched(monkeypatch, {"occflow_ros", "rviz2"})


@pytest.fixture
def bag(tmp_path) -> str:
    """A folder; what a bag holds is the replay's matter. Its name is one that breaks careless quoting."""
    path = tmp_path / """driver's "first" bag"""
    path.mkdir()
    return str(path)


def test_the_arguments_are_those_of_the_readme_and_none_is_required(launched):
    assert list(launched.arguments) == ARGUMENTS
    _, _, table = (ROOT / "README.md").read_text().partition("| argument | default |")
    table = table.partition("\n\n")[0]
    assert set(re.findall(r"`([a-z_]+)`", table)) - {"true", "false"} == set(ARGUMENTS)
    for name, argument in launched.arguments.items():
        assert isinstance(argument.default_value, str) and argument.description
        (default,) = re.findall(rf"^\| `{name}` \| (.*?) \|", table, re.M)
        if default != "none":
            assert argument.default_value.endswith(default.strip("`"))
    assert launched.arguments["params"].default_value == str(CONFIG)
    assert all(f"{name}:=" in FILE.read_text().partition('"""\n')[0] for name in ARGUMENTS)


def test_without_arguments_only_the_node_starts_on_the_cars_clock(launched):
    started = launched()
    assert list(started) == ["node"]
    node = started["node"]
    assert (node.package, node.name) == ("occflow_ros", "occflow")
    assert node.parameters == [str(CONFIG), {"use_sim_time": False}]


@pytest.mark.parametrize(("said", "simulated"), [("true", True), ("True", True), ("1", True), ("false", False)])
def test_simulated_time_is_asked_for_or_comes_with_a_bag(launched, bag, said, simulated):
    assert launched(use_sim_time=said)["node"].parameters[-1] == {"use_sim_time": simulated}
    assert launched(use_sim_time=said, bag=bag)["node"].parameters[-1] == {"use_sim_time": True}
    assert "replay" not in launched(use_sim_time=said)


def test_a_bag_starts_a_replay_that_waits_for_the_node(launched, bag):
    started = launched(bag=bag, rate="0.5")
    assert list(started) == ["node", "replay"]
    replay = started["replay"]
    assert (replay.package, replay.name) == ("occflow_ros", "replay")
    assert replay.arguments[:3] == [bag, "--rate", "0.5"]
    assert replay.arguments[3] == "--wait" and float(replay.arguments[4]) >= 60  # loading takes long on small machines


def test_the_replay_understands_its_arguments(launched, bag):
    options = pytest.importorskip("occflow_ros.replay", reason="needs ROS 2")._options
    said = options(launched(bag=bag, rate="2")["replay"].arguments)
    assert (str(said.bag), said.rate, said.wait) == (bag, 2.0, 90.0)


def test_parameters_of_ones_own_go_to_the_node_also_from_the_home_directory(launched, tmp_path, monkeypatch):
    (tmp_path / "my_car.yaml").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path))
    for params in (str(tmp_path / "my_car.yaml"), "~/my_car.yaml"):  # no shell expands ~ after `:=`
        assert launched(params=params)["node"].parameters[0] == str(tmp_path / "my_car.yaml")


def test_rviz_starts_when_asked_with_our_view_and_the_same_clock(launched, bag):
    assert "rviz2" not in launched() and "rviz2" not in launched(bag=bag)
    rviz = launched(rviz="true", bag=bag)["rviz2"]
    assert (rviz.package, rviz.arguments) == ("rviz2", ["-d", str(VIEW)])
    assert rviz.parameters == [{"use_sim_time": True}]
    assert VIEW.is_file()


@pytest.mark.parametrize("name", ["bag", "params"])
def test_a_file_that_is_not_there_is_named_before_anything_starts(launched, name):
    with pytest.raises(FileNotFoundError, match=rf"^{name}:=/no/such/thing: "):
        launched(**{name: "/no/such/thing"})


@pytest.mark.parametrize("name", ["rviz", "respawn", "use_sim_time"])
def test_a_yes_or_no_that_is_neither_is_named(launched, name):
    with pytest.raises(ValueError, match=rf"^{name}:=perhaps: expected true or false$"):
        launched(**{name: "perhaps"})


def test_a_missing_rviz_is_said_before_the_node_starts(monkeypatch):
    launched = Launched(monkeypatch, {"occflow_ros"})
    assert list(launched()) == ["node"]
    with pytest.raises(RuntimeError, match=r"^rviz2 is not installed: sudo apt install ros-\$ROS_DISTRO-rviz2$"):
        launched(rviz="true")


def test_a_node_or_replay_that_fails_ends_the_launch_and_one_that_ends_well_does_not(launched, bag):
    running, ending = SimpleNamespace(is_shutdown=False), SimpleNamespace(is_shutdown=True)
    for name, process in launched(bag=bag).items():
        process.on_exit(SimpleNamespace(returncode=0, process_name=name), running)
        process.on_exit(SimpleNamespace(returncode=-2, process_name=name), ending)
        with pytest.raises(RuntimeError, match=f"^{name} ended with exit code 2$"):
            process.on_exit(SimpleNamespace(returncode=2, process_name=name), running)


def test_a_node_that_ends_is_started_anew_where_asked_and_only_the_node(launched, bag):
    assert not hasattr(launched()["node"], "respawn")
    started = launched(respawn="true", bag=bag)
    assert started["node"].respawn is True and started["node"].respawn_delay >= 1.0
    assert not hasattr(started["node"], "on_exit")  # it would end the launch before the node comes back
    assert not hasattr(started["replay"], "respawn") and started["replay"].on_exit


def test_everything_that_the_launch_file_names_is_installed(launched, bag, monkeypatch):
    pytest.importorskip("setuptools")
    import setuptools

    told = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **named: told.update(named))
    runpy.run_path("setup.py")
    installed = {f"{folder}/{Path(file).name}": ROOT / file for folder, files in told["data_files"] for file in files}
    for file in (FILE, VIEW, CONFIG, POLICY):
        assert installed[f"share/occflow_ros/{file.relative_to(ROOT)}"] == file and file.is_file()
    ours = [node for node in launched(bag=bag, rviz="true").values() if node.package == "occflow_ros"]
    assert [node.executable for node in ours] == ["node", "replay"]
    for node in ours:
        assert os.access(installed[f"lib/occflow_ros/{node.executable}"], os.X_OK)


def test_a_bags_metadata_has_every_key_that_jazzys_player_reads(tmp_path):
    """A key that is missing, or null where text or a number is read, ends `ros2 bag play` (rosbag2's yaml.hpp)."""
    frames = pattern.drive(2, height=18, width=32)
    write_bag(tmp_path / "bag", frames, pattern.rig(18, 32), progress=False)
    (info,) = yaml.safe_load((tmp_path / "bag" / "metadata.yaml").read_text()).values()
    text = {"storage_identifier", "compression_format", "compression_mode", "ros_distro"}
    numbers = {"version", "message_count"}
    nested = {"duration", "starting_time", "topics_with_message_count", "relative_file_paths", "files", "custom_data"}
    assert set(info) == text | numbers | nested
    assert all(isinstance(info[key], str) for key in text) and all(isinstance(info[key], int) for key in numbers)
    assert set(info["duration"]) == {"nanoseconds"} and set(info["starting_time"]) == {"nanoseconds_since_epoch"}
    (file,) = info["files"]
    assert file == {key: info[key] for key in ("duration", "starting_time", "message_count")} | {"path": "bag.mcap"}
    for topic in info["topics_with_message_count"]:
        assert set(topic) == {"topic_metadata", "message_count"}
        assert set(topic["topic_metadata"]) == {
            "name",
            "type",
            "serialization_format",
            "offered_qos_profiles",
            "type_description_hash",
        }
        (qos,) = yaml.safe_load(topic["topic_metadata"]["offered_qos_profiles"])
        assert set(qos) == {
            "history",
            "depth",
            "reliability",
            "durability",
            "deadline",
            "lifespan",
            "liveliness",
            "liveliness_lease_duration",
            "avoid_ros_namespace_conventions",
        }
        assert all(set(qos[key]) == {"sec", "nsec"} for key in ("deadline", "lifespan", "liveliness_lease_duration"))


def ros_launch() -> bool:
    """Whether ROS's own launch is here: PyPI has another program of that name, and we have a folder."""
    if not importlib.util.find_spec("launch_ros"):
        return False
    import launch

    return hasattr(launch, "LaunchDescription")


@pytest.mark.skipif(not ros_launch(), reason="needs ROS's launch and launch_ros")
def test_under_ros_own_launch(bag):
    from launch import LaunchContext

    try:
        description = runpy.run_path(str(FILE))["generate_launch_description"]()
    except LookupError as missing:  # the package is not installed here
        pytest.skip(str(missing))
    assert [argument.name for argument in description.get_launch_arguments()] == ARGUMENTS
    context = LaunchContext()
    context.launch_configurations["bag"] = bag
    for argument in description.entities[:-1]:
        argument.visit(context)
    started = description.entities[-1].execute(context)
    assert [(node.node_package, node.node_executable) for node in started] == [
        ("occflow_ros", "node"),
        ("occflow_ros", "replay"),
    ]


# ----------------------------------------------------------------------------------------------------------------- RViz

DISPLAYS = {  # rviz_default_plugins of Jazzy; the properties that we set, as its sources name them
    "Grid": {"Alpha", "Cell Size", "Color", "Plane", "Plane Cell Count", "Reference Frame"},
    "TF": {"Marker Scale", "Show Names"},
    "PointCloud2": {
        "Alpha",
        "Style",
        "Size (m)",
        "Size (Pixels)",
        "Color Transformer",
        "Position Transformer",
        "Decay Time",
        "Selectable",
        "Use Fixed Frame",
        "Topic",
    },
    "MarkerArray": {"Namespaces", "Topic"},
    "Image": {"Max Value", "Median window", "Min Value", "Normalize Range", "Topic"},
}
QOS = {"Value", "Depth", "Durability Policy", "History Policy", "Reliability Policy"}
PANELS = {"rviz_common/Displays", "rviz_common/Views", "rviz_common/Time"}
TOOLS = {f"rviz_default_plugins/{name}" for name in ("Interact", "MoveCamera", "Select", "FocusCamera", "Measure")}


@pytest.fixture(scope="module")
def view() -> dict:
    return yaml.safe_load(VIEW.read_text())


def test_the_view_names_what_rviz_has(view):
    manager = view["Visualization Manager"]
    assert {panel["Class"] for panel in view["Panels"]} <= PANELS
    assert {tool["Class"] for tool in manager["Tools"]} <= TOOLS
    assert manager["Views"]["Current"]["Class"] == "rviz_default_plugins/Orbit"
    assert manager["Transformation"]["Current"]["Class"] == "rviz_default_plugins/TF"
    for display in manager["Displays"]:
        package, _, name = display["Class"].partition("/")
        assert package == "rviz_default_plugins"
        assert set(display) - {"Class", "Name", "Enabled", "Value"} <= DISPLAYS[name], name
        assert display["Value"] == display["Enabled"]  # RViz writes both and reads Value last


def test_the_view_stands_on_the_car(view):
    manager = view["Visualization Manager"]
    parameters = yaml.safe_load(CONFIG.read_text())["/**"]["ros__parameters"]
    assert manager["Global Options"]["Fixed Frame"] == parameters["base_frame"] == "base_link"
    assert manager["Views"]["Current"]["Target Frame"] == "base_link"


def test_the_view_shows_topics_that_are_there(view):
    cameras = yaml.safe_load(CONFIG.read_text())["/**"]["ros__parameters"]["camera"]
    there = {
        "PointCloud2": {"/occflow/points"},
        "MarkerArray": {"/occflow/markers"},
        "Image": {camera["image_topic"] for camera in cameras.values()},
    }
    shown = [d for d in view["Visualization Manager"]["Displays"] if "Topic" in d]
    assert {d["Class"].partition("/")[2] for d in shown} == set(there)
    for display in shown:
        kind, topic = display["Class"].partition("/")[2], display["Topic"]
        assert topic["Value"] in there[kind]
        assert set(topic) - {"Filter size"} == QOS
        if kind == "Image":  # a topic that ends so is subscribed as CompressedImage; live cameras may be best effort
            assert topic["Value"].endswith("/compressed") and topic["Reliability Policy"] == "Best Effort"


def test_markers_are_switched_on_by_the_namespaces_the_node_gives_them(view):
    source = (ROOT / "occflow_ros" / "convert.py").read_text()
    (flow,) = [d for d in view["Visualization Manager"]["Displays"] if d["Class"].endswith("/MarkerArray")]
    assert set(re.findall(r'\bns="([^"]+)"', source)) == set(flow["Namespaces"])
