"""ROS messages <-> arrays. Nothing is decided here, and nothing is decoded before it was checked.

Message classes are imported inside the functions that fill them, so that the checks and decoders run without ROS.
Byte fields are filled with `array.array`: rclpy walks any other sequence element by element.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from occflow_core import pointcloud, voxelflow
from occflow_core.geometry import rigid
from occflow_core.geometry.lenses import Lens
from occflow_core.types import NANO, Prediction

from .assemble import Calibration, Cloud

try:  # a distribution brings it, PyPI does not
    from sensor_msgs_py import point_cloud2
except ImportError:
    point_cloud2 = None

# encoding of sensor_msgs (`image_encodings.hpp`) -> (bytes a pixel, how its channels become RGB: their order, or the
# conversion of OpenCV that does it)
RAW_ENCODINGS = {
    "rgb8": (3, (0, 1, 2)),
    "bgr8": (3, (2, 1, 0)),
    "rgba8": (4, (0, 1, 2)),
    "bgra8": (4, (2, 1, 0)),
    "mono8": (1, (0, 0, 0)),
    # ROS names the first two pixels of the first two rows; OpenCV those of the second row from the second column on
    "bayer_rggb8": (1, "COLOR_BayerBG2RGB"),
    "bayer_bggr8": (1, "COLOR_BayerRG2RGB"),
    "bayer_gbrg8": (1, "COLOR_BayerGR2RGB"),
    "bayer_grbg8": (1, "COLOR_BayerGB2RGB"),
    # two pixels share their colour; each has two names
    "yuv422": (2, "COLOR_YUV2RGB_UYVY"),
    "uyvy": (2, "COLOR_YUV2RGB_UYVY"),
    "yuv422_yuy2": (2, "COLOR_YUV2RGB_YUY2"),
    "yuyv": (2, "COLOR_YUV2RGB_YUY2"),
}
LARGEST = 16384  # pixels along one side: beyond it a header is broken, not a camera better
# Bounds that hold before anything is allocated: a few bytes that lie must not cost gigabytes.
MOST_PIXELS = 50_000_000  # of a picture: the largest cameras on cars have 17 million; decoded these are 150 MB
MOST_BYTES = 64 << 20  # of a compressed picture: six bytes a pixel of those, more than a PNG of noise has
LONGEST_ROW = 4 * LARGEST  # bytes a row with its padding: a message of one row could ask for 4 GB of it
MOST_POINTS = 4_000_000  # of a scan: LiDARs of 128 beams send a quarter of a million
LONGEST_FOCUS = 1e7  # pixels, of the numbers in K and P: a telescope's
MOST_COEFFICIENTS = 14  # of distortion: the tilted rational model of OpenCV has them all


class Refused(ValueError):
    """A message that cannot be used: a few fixed words to count it by, and a text that says what came and what was
    expected."""

    def __init__(self, reason: str, sentence: str):
        super().__init__(sentence)
        self.reason = reason


@dataclass(frozen=True)
class Picture:
    """One image as it came: checked, not decoded."""

    data: np.ndarray  # (bytes,) uint8, a view of the message's memory
    encoding: str  # of RAW_ENCODINGS, "jpeg" or "png"
    height: int  # pixels
    width: int  # pixels
    step: int  # bytes a row; 0 where compressed

    def decode_into(self, out: np.ndarray) -> None:
        """Writes RGB into `out` (H, W, 3) uint8. Refused when the bytes are not a whole picture of that size."""
        if self.encoding == "jpeg":
            _decode_jpeg(self.data, out)
        elif self.encoding == "png":
            _decode_png(self.data, out)
        else:
            depth, how = RAW_ENCODINGS[self.encoding]
            rows = self.data[: self.step * self.height].reshape(self.height, self.step)
            pixels = rows[:, : self.width * depth].reshape(self.height, self.width, depth)
            if isinstance(how, str):
                _convert_raw(pixels, how, out)
            else:
                np.take(pixels, how, axis=2, out=out)


def nanoseconds(stamp) -> int:
    """builtin_interfaces/Time -> int ns."""
    return stamp.sec * NANO + stamp.nanosec


def time_message(stamp: int):
    from builtin_interfaces.msg import Time

    return Time(sec=stamp // NANO, nanosec=stamp % NANO)


def raw_picture(message) -> Picture:
    """sensor_msgs/Image -> Picture. Refused naming encoding, size or step when they do not fit each other."""
    encoding = message.encoding.lower()
    if encoding not in RAW_ENCODINGS:
        raise Refused("unknown encoding", f"encoding {message.encoding!r}, expected one of {', '.join(RAW_ENCODINGS)}")
    depth, how = RAW_ENCODINGS[encoding]
    height, width, step = message.height, message.width, message.step
    _possible("impossible size", "a picture", height, width)
    least, even = (4, 2) if encoding.startswith("bayer") else (1, 1)
    if height % even or height < least or (isinstance(how, str) and width % 2) or width < least:
        wanted = "an even width" if even == 1 else f"an even width and height of at least {least}"
        raise Refused("impossible size", f"{encoding} of {width} x {height} pixels, expected {wanted}")
    if not width * depth <= step <= LONGEST_ROW:
        sentence = f"step {step} bytes, but {width} pixels of {encoding} need {width * depth}"
        raise Refused("wrong step", f"{sentence}, at most {LONGEST_ROW} with padding")
    data = np.frombuffer(message.data, np.uint8)
    if data.size > step * height:
        raise Refused("too many bytes", f"{data.size} bytes, but {height} rows of {step} bytes are {step * height}")
    if data.size < step * (height - 1) + width * depth:
        raise Refused("too few bytes", f"{data.size} bytes, but {height} rows of {step} bytes need {step * height}")
    if data.size < step * height:  # the last row may come without its padding
        data = np.concatenate([data, np.zeros(step * height - data.size, np.uint8)])
    return Picture(data, encoding, height, width, step)


def compressed_picture(message) -> Picture:
    """sensor_msgs/CompressedImage -> Picture. The bytes decide, not `format`: drivers write many things there."""
    data = np.frombuffer(message.data, np.uint8)
    if data.size > MOST_BYTES:
        raise Refused("too many bytes", f"a compressed picture of {data.size} bytes, expected at most {MOST_BYTES}")
    head = data[:8].tobytes()
    if head[:2] == b"\xff\xd8":
        import simplejpeg

        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError as error:
            raise Refused("broken image", f"a broken JPEG of {data.size} bytes ({error})") from None
        encoding = "jpeg"
    elif head == b"\x89PNG\r\n\x1a\n" and data.size > 24:
        width, height = (int.from_bytes(data[i : i + 4].tobytes(), "big") for i in (16, 20))
        encoding = "png"
    else:
        raise Refused("unknown format", f"{data.size} bytes of format {message.format!r}, expected JPEG or PNG")
    _possible("impossible size", "a picture", height, width)
    return Picture(data, encoding, height, width, 0)


def _possible(reason: str, what: str, height: int, width: int) -> None:
    """Refused where no camera has so many pixels, or none at all."""
    if not (0 < height <= LARGEST and 0 < width <= LARGEST and height * width <= MOST_PIXELS):
        most = f"at most {LARGEST} a side and {MOST_PIXELS} in all"
        raise Refused(reason, f"{what} of {width} x {height} pixels, expected {most}")


def cloud(message) -> Cloud:
    """sensor_msgs/PointCloud2 -> Cloud. Refused where nobody could say what its points are, where and when."""
    frame, stamp = message.header.frame_id.lstrip("/"), nanoseconds(message.header.stamp)
    if not frame:
        raise Refused("no frame", "a cloud without frame_id: no transform can tell where it lies")
    if stamp <= 0:
        raise Refused("no stamp", "a cloud without a stamp, expected that of its scan")
    if message.height * message.width > MOST_POINTS:
        size = f"{message.height} x {message.width} points"
        raise Refused("impossible size", f"a cloud of {size}, expected at most {MOST_POINTS} in all")
    try:
        points = pointcloud.read(message, cloud_fields)
    except ValueError as error:
        raise Refused("unusable cloud", str(error)) from None
    if not len(points):
        raise Refused("empty cloud", f"a cloud of {message.height} x {message.width} points, none of them finite")
    return Cloud(points, frame, stamp)


def cloud_fields(message, names: Sequence[str]) -> np.ndarray:
    """Named fields of a checked PointCloud2 -> (P,) structured: by sensor_msgs_py where it is and does it, else by us.

    Not by it: big endian (it turns the bytes of the message itself round, and whoever reads next gets nonsense), and
    what it refuses: fields of count 0 or of unknown type, be they named or not, two of one name, foreign classes.
    """
    if point_cloud2 is not None and not message.is_bigendian:
        try:
            return point_cloud2.read_points(message, list(names))
        except (AssertionError, KeyError, TypeError, ValueError):
            pass
    return pointcloud.fields(message, names)


def _convert_raw(pixels: np.ndarray, conversion: str, out: np.ndarray) -> None:
    import cv2

    if out.shape[:2] != pixels.shape[:2]:
        raise ValueError(f"a picture of {pixels.shape[1]} x {pixels.shape[0]} pixels into one of {out.shape[:2][::-1]}")
    cv2.cvtColor(pixels, getattr(cv2, conversion), dst=out)


def _decode_jpeg(data: np.ndarray, out: np.ndarray) -> None:
    import simplejpeg

    try:  # strict: OpenCV fills the lost part of a truncated JPEG with grey and says nothing
        simplejpeg.decode_jpeg(data, "RGB", buffer=out)
    except ValueError as error:
        raise Refused("broken image", f"a broken JPEG of {data.size} bytes ({error})") from None


def _decode_png(data: np.ndarray, out: np.ndarray) -> None:
    import cv2

    picture = cv2.imdecode(data, cv2.IMREAD_COLOR)
    if picture is None or picture.shape != out.shape:
        raise Refused("broken image", f"a broken PNG of {data.size} bytes")
    cv2.cvtColor(picture, cv2.COLOR_BGR2RGB, dst=out)


def calibration(message, rectified: bool) -> Calibration:
    """sensor_msgs/CameraInfo -> Calibration. Refused, never guessed, when it does not say how its camera sees.

    rectified: the images are already rectified, so P holds and D is history. Else K and D hold, and where D is not zero
    P says which pinhole picture is wanted, or K where P says nothing. D of zeros is no lens, whatever the model, as
    image_geometry reads it.
    """
    _possible("unusable CameraInfo", "CameraInfo", message.height, message.width)
    if len(message.d) > MOST_COEFFICIENTS:
        sentence = f"CameraInfo with {len(message.d)} coefficients of distortion, expected at most {MOST_COEFFICIENTS}"
        raise Refused("unusable CameraInfo", sentence)
    region = (message.roi.x_offset, message.roi.y_offset, message.roi.width, message.roi.height)
    whole = region in ((0, 0, 0, 0), (0, 0, message.width, message.height))
    if message.binning_x > 1 or message.binning_y > 1 or not whole:
        raise Refused("unusable CameraInfo", "CameraInfo with binning or a region of interest, expected neither")
    if not message.header.frame_id.lstrip("/"):
        raise Refused("unusable CameraInfo", "CameraInfo without a frame_id, expected the camera's optical frame")
    k = _intrinsics("P", _projection(message)) if rectified else _intrinsics("K", np.reshape(message.k, (3, 3)))
    size, frame = (message.height, message.width), message.header.frame_id.lstrip("/")
    if rectified or not any(message.d):  # NaN is not nothing
        return Calibration(k, *size, frame)
    try:
        lens = Lens(message.distortion_model, tuple(float(c) for c in message.d))
    except ValueError as error:
        way = "or rectified images and the camera's `rectified` set to true"
        raise Refused("unusable CameraInfo", f"CameraInfo with {error}, {way}") from None
    wanted = _intrinsics("P", _projection(message)) if message.p[0] != 0 else k
    return Calibration(k, *size, frame, lens, wanted)


def _projection(message) -> np.ndarray:
    """(3, 3) of a CameraInfo's P. Refused where it and R are not those of a camera that stands alone."""
    p, r = np.reshape(message.p, (3, 4)), np.reshape(message.r, (3, 3))
    if not np.allclose(r, np.eye(3), rtol=0, atol=1e-6) or not np.allclose(p[:, 3], 0):
        raise Refused(
            "unusable CameraInfo",
            "CameraInfo whose R turns or whose P shifts the camera (a stereo pair), expected R = 1 and P[:, 3] = 0",
        )
    return p[:, :3]


def _intrinsics(name: str, matrix: np.ndarray) -> np.ndarray:
    """(3, 3) float64 of a CameraInfo's K or P. Refused where it is not that of a camera."""
    k = np.array(matrix, np.float64)
    finite = (np.abs(k) < LONGEST_FOCUS).all()  # NaN is not less
    if not finite or k[0, 0] <= 0 or k[1, 1] <= 0 or k[1, 0] != 0 or not np.allclose(k[2], (0, 0, 1)):
        raise Refused(
            "unusable CameraInfo",
            f"CameraInfo with {name} = {k.round(3).tolist()}, expected finite, positive focal lengths",
        )
    return k


def told(message) -> tuple:
    """All that `calibration` reads of a CameraInfo, quickly: equal where nothing has changed."""
    arrays = (np.asarray(values, np.float64).tobytes() for values in (message.k, message.d, message.p, message.r))
    region, size = message.roi, (message.height, message.width)
    roi = (region.x_offset, region.y_offset, region.width, region.height)
    binning, frame = (message.binning_x, message.binning_y), message.header.frame_id
    return *arrays, *size, *roi, *binning, message.distortion_model, frame


def transform(message) -> tuple[str, str, int, torch.Tensor]:
    """geometry_msgs/TransformStamped -> parent, child, stamp ns, parent_from_child (4, 4) float64."""
    q, t = message.transform.rotation, message.transform.translation
    try:
        parent_from_child = rigid.from_quaternion((q.w, q.x, q.y, q.z), (t.x, t.y, t.z))
    except ValueError as error:
        raise Refused(
            "broken transform", f"transform {message.header.frame_id} <- {message.child_frame_id}: {error}"
        ) from None
    return message.header.frame_id, message.child_frame_id, nanoseconds(message.header.stamp), parent_from_child


def voxel_flow(
    prediction: Prediction,
    stamp: int,  # ns
    frame_id: str,
    cameras: Sequence[str],
    stamps: Sequence[int | None],  # ns, each camera's own; None: not used
    model_name: str,
    moving_speed: float,  # m/s
):
    """Prediction -> occflow_msgs/VoxelFlow."""
    from occflow_msgs.msg import VoxelFlow

    fields = voxelflow.pack(
        prediction,
        cameras,
        [s is not None for s in stamps],
        [None if s is None else (stamp - s) // 1000 for s in stamps],
        model_name,
        moving_speed,
    )
    message = VoxelFlow()
    message.header.stamp, message.header.frame_id = time_message(stamp), frame_id
    message.origin.position.x, message.origin.position.y, message.origin.position.z = prediction.grid.low
    message.origin.orientation.w = 1.0
    for name, value in fields.items():
        fixed = name in ("voxel_size", "grid_size")
        setattr(message, name, _array(value) if isinstance(value, np.ndarray) and not fixed else value)
    return message


POINT = np.dtype(
    [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("rgb", "<u4"), ("vx", "<f4"), ("vy", "<f4"), ("confidence", "<f4")]
    + [("class_id", "u1"), ("pad", "u1", 3)]
)  # 32 bytes a point; `rgb` holds 0x00RRGGBB and is announced as FLOAT32, as PCL and RViz expect


def points(prediction: Prediction, header):
    """Filled voxels -> sensor_msgs/PointCloud2 at their centres: x y z, rgb, vx vy, confidence, class_id."""
    from sensor_msgs.msg import PointField

    index, label, score, flow = (None if t is None else t.cpu().numpy() for t in prediction.sparse())
    cloud = np.zeros(len(index), POINT)
    centres = (index + 0.5) * np.asarray(prediction.grid.voxel) + np.asarray(prediction.grid.low)
    for axis, name in enumerate("xyz"):
        cloud[name] = centres[:, axis]
    red, green, blue = np.asarray(prediction.classes.colours, np.uint32)[label].T
    cloud["rgb"] = red << 16 | green << 8 | blue
    cloud["class_id"], cloud["confidence"] = label, score
    if flow is not None:
        cloud["vx"], cloud["vy"] = flow[:, 0], flow[:, 1]
    kinds = {"<f4": PointField.FLOAT32, "<u4": PointField.FLOAT32, "|u1": PointField.UINT8}
    fields = [
        PointField(name=name, offset=POINT.fields[name][1], datatype=kinds[POINT.fields[name][0].str], count=1)
        for name in POINT.names
        if name != "pad"
    ]
    return cloud_message(header, fields, cloud)


def cloud_message(header, fields: list, cloud: np.ndarray):
    """(P,) structured, all finite -> sensor_msgs/PointCloud2: by sensor_msgs_py where it is and does it, else by us.

    Not by it: an empty cloud; and that of Humble knows no padding.
    """
    from sensor_msgs.msg import PointCloud2

    if point_cloud2 is not None:
        try:
            told = cloud.view(point_cloud2.dtype_from_fields(fields, cloud.itemsize))
            message = point_cloud2.create_cloud(header, fields, told, cloud.itemsize)
            message.is_dense = True  # it does not know
            return message
        except (AssertionError, TypeError, ValueError):
            pass
    message = PointCloud2(header=header, height=1, width=len(cloud), is_bigendian=False, is_dense=True, fields=fields)
    message.point_step, message.row_step = cloud.itemsize, cloud.itemsize * len(cloud)
    message.data = _array(cloud.view(np.uint8))
    return message


def markers(prediction: Prediction, header, moving_speed: float):
    """Moving voxels as one list of cubes, their flow as one list of lines -> visualization_msgs/MarkerArray.

    The moving ones only: RViz does not bear 20,000 cubes (ros2/rviz issue 631), nor thousands of ARROW markers. So an
    arrow is three lines, as long as the way of one second, on the highest moving voxel of each column.
    """
    from geometry_msgs.msg import Point
    from std_msgs.msg import ColorRGBA
    from visualization_msgs.msg import Marker, MarkerArray

    cubes = Marker(header=header, ns="moving voxels", id=0, type=Marker.CUBE_LIST, action=Marker.ADD)
    arrows = Marker(header=header, ns="flow", id=1, type=Marker.LINE_LIST, action=Marker.ADD)
    for marker in (cubes, arrows):  # a node that died must not leave its last cars standing
        marker.lifetime.sec = 1
    cubes.scale.x, cubes.scale.y, cubes.scale.z = (0.95 * edge for edge in prediction.grid.voxel)
    arrows.scale.x = 0.08
    arrows.color = ColorRGBA(r=1.0, g=0.9, b=0.1, a=1.0)
    cubes.pose.orientation.w = arrows.pose.orientation.w = 1.0
    index, label, _, flow = (None if t is None else t.cpu().numpy() for t in prediction.sparse())
    if flow is not None:
        moving = voxelflow.moves(label, flow, prediction.classes, moving_speed)
        index, label, flow = index[moving], label[moving], flow[moving]
        centres = (index + 0.5) * np.asarray(prediction.grid.voxel) + np.asarray(prediction.grid.low)
        palette = [ColorRGBA(r=r / 255, g=g / 255, b=b / 255, a=0.9) for r, g, b in prediction.classes.colours]
        cubes.points = [Point(x=x, y=y, z=z) for x, y, z in centres.tolist()]
        cubes.colors = [palette[i] for i in label]
        top = np.append((np.diff(index[:, :2], axis=0) != 0).any(1), True)[: len(index)]  # z runs fastest in `sparse`
        arrows.points = [Point(x=x, y=y, z=z) for x, y, z in _arrows(centres[top], flow[top]).reshape(-1, 3).tolist()]
    if not cubes.points:  # RViz complains about empty lists; what was shown before must go
        cubes.action = arrows.action = Marker.DELETE
    return MarkerArray(markers=[cubes, arrows])


def _arrows(start: np.ndarray, velocity: np.ndarray) -> np.ndarray:
    """Starts (A, 3) m and velocities (A, 2) m/s -> ends of three lines each, (A, 3, 2, 3): shaft and two barbs."""
    way = np.pad(velocity, ((0, 0), (0, 1)))
    tip = start + way
    length = np.linalg.norm(way, axis=1, keepdims=True)
    ahead = way / length * np.minimum(0.3 * length, 0.5)  # a barb of at most half a metre
    aside = np.stack([-ahead[:, 1], ahead[:, 0], ahead[:, 2]], 1) / 2
    return np.stack([start, tip, tip - ahead + aside, tip, tip - ahead - aside, tip], 1).reshape(-1, 3, 2, 3)


def diagnostics(stamp: int, hardware: str, report):
    """health.Status entries -> diagnostic_msgs/DiagnosticArray."""
    from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

    message = DiagnosticArray()
    message.header.stamp = time_message(stamp)
    message.status = [
        DiagnosticStatus(
            level=bytes([status.level]),
            name=f"occflow: {status.name}",
            message=status.message,
            hardware_id=hardware,
            values=[KeyValue(key=key, value=str(value)) for key, value in status.values.items()],
        )
        for status in report
    ]
    return message


def time_kind():
    """The class of the messages that tell times: that of Autoware's debug topics where its package is installed, else
    std_msgs/Float64."""
    try:
        from autoware_internal_debug_msgs.msg import Float64Stamped as Kind
    except ImportError:
        from std_msgs.msg import Float64 as Kind
    return Kind


def milliseconds(kind, seconds: float, stamp: int):
    """s -> a message of `time_kind` with ms; `stamp` (ns) is that of the set where the kind has one."""
    message = kind(data=seconds * 1e3)
    if hasattr(message, "stamp"):
        message.stamp = time_message(stamp)
    return message


def _array(values: np.ndarray) -> array:
    """numpy -> array.array of the same type: the one sequence that rclpy takes without looking at each element."""
    codes = {"uint8": "B", "uint32": "I", "int32": "i", "float32": "f"}
    result = array(codes[values.dtype.name])
    result.frombytes(np.ascontiguousarray(values).tobytes())
    return result
