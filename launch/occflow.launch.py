"""ros2 launch occflow_ros occflow.launch.py [bag:=FOLDER] [rate:=1.0] [rviz:=true] [params:=FILE] [use_sim_time:=true]
                                         [respawn:=true]

Nothing is required: without arguments the node listens to the topics of `config/occflow.yaml`. `params` brings a file
of your own (topics, weights, offsets), `bag` replays a recording into the node, with /clock. Ctrl-C ends everything;
a node or a replay that fails ends the launch, with exit code 1; with `respawn` the node is started anew instead.
"""

from pathlib import Path

from ament_index_python.packages import PackageNotFoundError, get_package_prefix, get_package_share_directory
from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch_ros.actions import Node

SHARE = Path(get_package_share_directory("occflow_ros"))
RESPAWN_DELAY = 2.0  # s: a node that cannot start must not fill the log nor the processor
ARGUMENTS = {  # name: (default, meaning)
    "params": (str(SHARE / "config" / "occflow.yaml"), "YAML file of the node's parameters"),
    "bag": ("", "rosbag2 folder to replay; empty: live cameras"),
    "rate": ("1.0", "speed of the replay"),
    "rviz": ("false", "true: show the result in RViz"),
    "respawn": ("false", "true: a node that ends is started anew"),
    "use_sim_time": ("false", "true: time comes from /clock (a bag implies it)"),
}


def generate_launch_description() -> LaunchDescription:
    declared = [
        DeclareLaunchArgument(name, default_value=default, description=meaning)
        for name, (default, meaning) in ARGUMENTS.items()
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=nodes)])


def nodes(context) -> list[Node]:
    """What to start, now that the arguments are known. Checks come first: an error in here after a process began would
    leave that process behind."""
    said = {name: context.launch_configurations[name] for name in ARGUMENTS}
    params, bag = (_existing(name, said[name]) if said[name] else "" for name in ("params", "bag"))
    # a replay brings its own clock; a node on the system's clock would find every stamp years old
    clock = {"use_sim_time": _true("use_sim_time", said["use_sim_time"]) or bool(bag)}
    rviz, respawn = _true("rviz", said["rviz"]), _true("respawn", said["respawn"])
    if rviz:
        _installed("rviz2")
    found = [
        Node(
            package="occflow_ros",
            executable="node",
            name="occflow",
            output="screen",
            parameters=[*([params] if params else []), clock],
            # not both: launch acts on an exit before it respawns
            **({"respawn": True, "respawn_delay": RESPAWN_DELAY} if respawn else {"on_exit": _ended}),
        )
    ]
    if bag:
        # it waits until the node has loaded its network and listens
        found.append(
            Node(
                package="occflow_ros",
                executable="replay",
                name="replay",
                output="screen",
                arguments=[bag, "--rate", said["rate"], "--wait", "90"],
                on_exit=_ended,
            )
        )
    if rviz:
        view = ["-d", str(SHARE / "rviz" / "occflow.rviz")]
        found.append(Node(package="rviz2", executable="rviz2", name="rviz2", arguments=view, parameters=[clock]))
    return found


def _existing(name: str, value: str) -> str:
    path = Path(value).expanduser()  # no shell does it after `:=`
    if not path.exists():
        raise FileNotFoundError(f"{name}:={value}: there is no such file or folder")
    return str(path)


def _true(name: str, value: str) -> bool:
    if value.lower() not in ("true", "1", "false", "0"):
        raise ValueError(f"{name}:={value}: expected true or false")
    return value.lower() in ("true", "1")


def _installed(package: str) -> None:
    try:
        get_package_prefix(package)
    except PackageNotFoundError:
        name = package.replace("_", "-")
        raise RuntimeError(f"{package} is not installed: sudo apt install ros-$ROS_DISTRO-{name}") from None


def _ended(event, context) -> None:
    if event.returncode and not context.is_shutdown:  # who is stopped while it loads may end as it likes
        raise RuntimeError(f"{event.process_name} ended with exit code {event.returncode}")
