"""P points."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from occflow_core.geometry import rigid
from occflow_core.pointcloud import Scan, read, together


def message(layout: np.dtype, cloud: np.ndarray, kinds: dict[str, int], big=False):
    fields = [SimpleNamespace(name=n, offset=layout.fields[n][1], datatype=k, count=1) for n, k in kinds.items()]
    return SimpleNamespace(
        fields=fields,
        is_bigendian=big,
        height=1,
        width=len(cloud),
        point_step=layout.itemsize,
        row_step=cloud.nbytes,
        data=cloud.tobytes(),
    )


@pytest.mark.parametrize("big", [False, True])
def test_fields_are_found_by_name_wherever_they_stand_and_echoless_points_drop_out(big):
    order = ">" if big else "<"
    layout = np.dtype([("ring", order + "u2"), ("z", order + "f4"), ("time", order + "f8"), ("x", order + "f4"),
                       ("intensity", "u1"), ("y", order + "f8")])  # fmt: skip
    cloud = np.array([(7, 3.0, 0.1, 1.0, 200, 2.0), (8, np.nan, 0.2, 1.0, 3, 2.0)], layout)
    kinds = {"ring": 4, "z": 7, "time": 8, "x": 7, "intensity": 2, "y": 8}
    assert read(message(layout, cloud, kinds, big)).tolist() == [[1.0, 2.0, 3.0, 200.0, 7.0]]


def test_what_a_cloud_lacks_is_zero_unless_it_is_a_place():
    layout = np.dtype([("x", "<f4"), ("y", "<f4"), ("z", "<f4")])
    cloud = np.array([(1.0, 2.0, 3.0)], layout)
    told = message(layout, cloud, {"x": 7, "y": 7, "z": 7})
    assert read(told).tolist() == [[1.0, 2.0, 3.0, 0.0, 0.0]]
    told.data = told.data[:-1]
    with pytest.raises(ValueError, match="11 bytes, expected 1 points of 12"):
        read(told)
    with pytest.raises(ValueError, match="the fields x, z, expected x, y and z"):
        read(message(layout, cloud, {"x": 7, "z": 7}))


@pytest.mark.parametrize("intensity", [float("nan"), float("inf"), -float("inf")])
def test_a_point_whose_intensity_is_no_number_has_none(intensity):
    layout = np.dtype([("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("intensity", "<f4")])
    cloud = np.array([(1.0, 2.0, 3.0, intensity), (1.0, 2.0, 4.0, 9.0)], layout)
    told = message(layout, cloud, {"x": 7, "y": 7, "z": 7, "intensity": 7})
    assert read(told).tolist() == [[1.0, 2.0, 3.0, 0.0, 0.0], [1.0, 2.0, 4.0, 9.0, 0.0]]


def test_earlier_scans_lie_where_the_car_is_now_and_leave_out_the_car_itself():
    near = torch.tensor([[0.5, -0.9, 1.0, 9.0, 3.0], [1.0, 0.0, -1.0, 8.0, 3.0]])
    ahead = rigid.from_quaternion((0.5**0.5, 0.0, 0.0, 0.5**0.5), (-2.0, 0.0, 1.8))  # turned left, 2 m behind
    points = together([Scan(near, torch.eye(4, dtype=torch.float64), 0.01), Scan(near, ahead, 0.06)])
    expected = [[0.5, -0.9, 1.0, 9.0, 0.01], [1.0, 0.0, -1.0, 8.0, 0.01], [-2.0, 1.0, 0.8, 8.0, 0.06]]
    assert torch.allclose(points, torch.tensor(expected), atol=1e-6)
    assert points.dtype == torch.float32
