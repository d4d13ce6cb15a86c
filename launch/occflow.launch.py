"""ros2 launch occflow_ros occflow.launch.py [bag:=FOLDER] [rate:=1.0] [rviz:=true] [params:=FILE] [use_sim_time:=true]

Nothing is required: without arguments the node listens to the topics of `config/occflow.yaml`. `params` brings a file
of your own (topics, weights, offsets), `bag` replays a recording into the node, with /clock.
"""

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument
from launch.conditions import IfCondition
from launch.substitutions import LaunchConfiguration, PythonExpression
from launch_ros.actions import Node


def generate_launch_description() -> LaunchDescription:
    share = Path(get_package_share_directory("occflow_ros"))
    params, bag, rate = LaunchConfiguration("params"), LaunchConfiguration("bag"), LaunchConfiguration("rate")
    replays = PythonExpression(["'", bag, "' != ''"])
    # a replay brings its own clock; a node on the system's clock would find every stamp years old
    sim_time = PythonExpression(["'", LaunchConfiguration("use_sim_time"), "' == 'true' or '", bag, "' != ''"])
    return LaunchDescription(
        [
            DeclareLaunchArgument(
                "params",
                default_value=str(share / "config" / "occflow.yaml"),
                description="YAML file of the node's parameters",
            ),
            DeclareLaunchArgument("bag", default_value="", description="rosbag2 folder to replay; empty: live cameras"),
            DeclareLaunchArgument("rate", default_value="1.0", description="speed of the replay"),
            DeclareLaunchArgument("rviz", default_value="false", description="true: show the result in RViz"),
            DeclareLaunchArgument(
                "use_sim_time", default_value="false", description="true: time comes from /clock (a bag implies it)"
            ),
            Node(
                package="occflow_ros",
                executable="node",
                name="occflow",
                output="screen",
                parameters=[params, {"use_sim_time": sim_time}],
            ),
            Node(
                package="occflow_ros",
                executable="replay",
                name="replay",
                output="screen",
                arguments=[bag, "--rate", rate],
                condition=IfCondition(replays),
            ),
            Node(
                package="rviz2",
                executable="rviz2",
                name="rviz2",
                arguments=["-d", str(share / "rviz" / "occflow.rviz")],
                parameters=[{"use_sim_time": sim_time}],
                condition=IfCondition(LaunchConfiguration("rviz")),
            ),
        ]
    )
