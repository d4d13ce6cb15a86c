"""Packaging for pip and for colcon (ament_python): one tree, two Python packages, two names in the ament index."""

from glob import glob
from xml.etree import ElementTree

from setuptools import find_packages, setup

NAME = "occflow_ros"
VERSION = ElementTree.parse("package.xml").findtext("version")  # the one place where it stands


def share(package):
    """What makes `package` a package for `ros2 pkg` and `ros2 run`; its executables are scripts/<package>/*."""
    return [
        ("share/ament_index/resource_index/packages", [f"resource/{package}"]),
        (f"share/{package}", ["package.xml"]),
        (f"lib/{package}", sorted(glob(f"scripts/{package}/*"))),
    ]


setup(
    name=NAME,
    version=VERSION,
    description="Surround cameras to 3-D semantic occupancy with flow, live on ROS 2",
    license="Apache-2.0",
    maintainer="OccFlow",
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["occflow_core", "occflow_core.*", "occflow_ros", "occflow_ros.*"]),
        "occflow_recipes",
    ],
    package_dir={"occflow_recipes": "training/recipes"},
    # occflow_core/msg is a link to msg/msg: bags can be written and read where there is no ROS; weights/ ships a model;
    # runtime/*.txt: names of TensorRT's operators
    package_data={"occflow_core": ["msg/*.msg", "weights/*", "runtime/*.txt"]},
    data_files=[
        *share("occflow_ros"),
        *share("occflow_core"),
        *(
            (f"share/occflow_ros/{name}", sorted(glob(f"{name}/*.*")))
            for name in ("launch", "config", "config/sros2", "rviz")
        ),
    ],
    # lower bounds only: the exact versions that are tested stand in requirements/constraints.txt
    install_requires=[
        "torch>=2.4",
        "numpy>=1.24",
        "opencv-python-headless>=4.8",
        "simplejpeg>=1.7",
        "safetensors>=0.4",
        "scipy>=1.8",
        "numba>=0.58",
        "embreex>=2.17",
        "msgspec>=0.18",
        "rosbags>=0.10",
        "tyro>=0.9",
        "tqdm>=4.60",
        "tensorboard>=2.14",
    ],
    entry_points={"console_scripts": ["occflow = occflow_core.cli:main"]},
    zip_safe=False,
)
