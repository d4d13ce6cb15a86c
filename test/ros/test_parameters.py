"""A parameter stands in one place: the YAML and the README only repeat it, and these tests hold them to it."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from occflow_ros.parameters import CameraSettings, Settings

ROOT = Path(__file__).resolve().parents[2]


def in_yaml() -> dict:
    return yaml.safe_load((ROOT / "config" / "occflow.yaml").read_text())["/**"]["ros__parameters"]


def test_the_yaml_holds_every_parameter_with_its_default():
    given = in_yaml()
    cameras = given.pop("camera")
    defaults = {f.name: f.default for f in fields(Settings) if f.name != "camera"}
    assert {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()} == defaults
    assert tuple(cameras) == defaults["cameras"]
    for name, settings in cameras.items():
        assert settings.keys() == {f.name for f in fields(CameraSettings)}
        for f in fields(CameraSettings):
            if f.name != "offset":  # the YAML's offsets are those of one rig, as its comment says
                assert settings[f.name] == (f.default.format(name) if isinstance(f.default, str) else f.default)


def test_the_readme_lists_every_parameter_with_its_default_range_and_text():
    readme = (ROOT / "README.md").read_text()
    for line in table():
        assert line in readme, f"README.md lacks this line of the table of parameters:\n{line}"


def table() -> list[str]:
    """The README's table; `python test/ros/test_parameters.py` prints it."""
    lines = []
    for prefix, settings in (("", Settings), ("camera.NAME.", CameraSettings)):
        for f in fields(settings):
            if f.name == "camera":
                continue
            default = f.default
            if isinstance(default, tuple):
                default = "nuScenes' six"
            elif isinstance(default, bool):
                default = str(default).lower()
            elif isinstance(default, str):
                default = default.replace("{}", "NAME") or '""'
            low, high = f.metadata["low"], f.metadata["high"]
            span = "" if low is None else f"{low:g} … {high:g}"
            lines.append(f"| `{prefix}{f.name}` | `{default}` | {span} | {f.metadata['text'].replace('{}', 'NAME')} |")
    return lines


rclpy = pytest.importorskip("rclpy", reason="needs ROS 2") if __name__ != "__main__" else None


@pytest.fixture
def context(monkeypatch):
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=98)
    yield context
    rclpy.try_shutdown(context=context)


@pytest.fixture
def node(context):
    from occflow_ros.node import OccupancyNode

    node = OccupancyNode(context=context)
    yield node
    node.close()
    node.destroy_node()


@pytest.mark.dds
def test_ranges_and_texts_are_visible_to_ros2_param_describe(node):
    for f in fields(Settings):
        if f.name == "camera":
            continue
        told = node.describe_parameter(f.name)
        assert told.description == f.metadata["text"]
        if f.metadata["low"] is not None:
            (span,) = told.floating_point_range or told.integer_range
            assert (span.from_value, span.to_value) == (f.metadata["low"], f.metadata["high"])


@pytest.mark.dds
def test_configure_can_fail_and_then_succeed_in_the_same_process_and_all_is_given_back(node):
    from rclpy.lifecycle import TransitionCallbackReturn as Result
    from rclpy.parameter import Parameter

    def subscriptions():
        return sorted(s.topic_name for s in node.subscriptions)

    before = subscriptions()
    node.set_parameters([Parameter("model", value="opus-huge")])
    assert node.trigger_configure() == Result.FAILURE
    assert subscriptions() == before
    node.set_parameters([Parameter("model", value="opus-nano"), Parameter("backend", value="fast")])
    assert node.trigger_configure() == Result.FAILURE, "no other backend in the stead of one that cannot be had"
    node.set_parameters([Parameter("backend", value="eager"), Parameter("precision", value="half")])
    assert node.trigger_configure() == Result.FAILURE
    node.set_parameters([Parameter("precision", value="float32")])
    for _ in range(2):
        assert node.trigger_configure() == Result.SUCCESS
        (refused,) = node.set_parameters([Parameter("model", value="opus-tiny")])
        assert not refused.successful and "cleanup" in refused.reason
        configured = subscriptions()
        assert "/cam_front/camera_info" in configured and "/cam_front/image_raw/compressed" not in configured
        for _ in range(2):
            assert node.trigger_activate() == Result.SUCCESS
            assert "/cam_front/image_raw/compressed" in subscriptions()
            assert node.trigger_deactivate() == Result.SUCCESS
            assert subscriptions() == configured
        assert node.trigger_cleanup() == Result.SUCCESS
        assert subscriptions() == before


@pytest.mark.dds
def test_the_way_to_make_sets_is_one_of_the_known_words_and_what_it_costs_is_said(node, monkeypatch):
    from rclpy.lifecycle import TransitionCallbackReturn as Result
    from rclpy.parameter import Parameter

    from occflow_ros.approximate import Approximate

    said = []
    for level in ("info", "warning", "error"):
        monkeypatch.setattr(node.get_logger(), level, lambda text, level=level: said.append((level, text)))
    node.set_parameters([Parameter("model", value="opus-nano"), Parameter("sync", value="exact")])
    assert node.trigger_configure() == Result.FAILURE
    assert said == [("error", "configure failed: sync: 'exact' is not known, expected collector or approximate")]
    node.set_parameters([Parameter("sync", value="approximate"), Parameter("approximate_slop", value=0.02)])
    assert node.trigger_configure() == Result.SUCCESS
    (level,) = [level for level, text in said if "while one camera is silent nothing is published" in text]
    assert level == "info"
    assert node.trigger_activate() == Result.SUCCESS
    gatherer = node._collector
    assert isinstance(gatherer, Approximate) and gatherer.offsets == [0] * 6
    assert gatherer.add(0, 10**9, "a", 0.0) == [] and not gatherer.waiting
    for camera in range(1, 5):
        gatherer.add(camera, 10**9 + 19_000_000, "b", 0.0)
    assert gatherer.add(5, 10**9 + 20_000_000, "c", 0.0) == []  # as wide as the slop
    assert len(gatherer.add(5, 10**9 + 19_999_999, "c", 0.0)) == 1
    assert node.trigger_deactivate() == Result.SUCCESS


@pytest.mark.dds
def test_the_network_is_run_by_the_backend_and_in_the_precision_that_are_asked_for(node, monkeypatch):
    from rclpy.lifecycle import TransitionCallbackReturn as Result
    from rclpy.parameter import Parameter

    from occflow_ros import node as module

    asked = []
    monkeypatch.setattr(module, "built", lambda model, *how: asked.append((model.name, *how)) or model)
    given = {"model": "opus-nano", "backend": "aot", "precision": "bf16"}
    node.set_parameters([Parameter(name, value=word) for name, word in given.items()])
    assert node.trigger_configure() == Result.SUCCESS
    assert asked == [("opus-nano (untrained)", "aot", 6, "bf16")]
    told = node.health.report(0.0)[0].values
    assert (told["backend"], told["precision"]) == ("aot", "bf16")


@pytest.mark.dds
def test_an_activation_that_fails_says_so_leaves_nothing_and_can_be_mended(node, monkeypatch):
    from rclpy.lifecycle import TransitionCallbackReturn as Result

    from occflow_ros import node as module

    assert node.trigger_configure() == Result.SUCCESS
    configured = sorted(s.topic_name for s in node.subscriptions)
    monkeypatch.setattr(module, "Pipeline", lambda *_: 1 / 0)
    assert node.trigger_activate() == Result.FAILURE
    assert sorted(s.topic_name for s in node.subscriptions) == configured
    monkeypatch.undo()
    assert node.trigger_activate() == Result.SUCCESS
    assert node.trigger_deactivate() == Result.SUCCESS


@pytest.mark.dds
def test_weights_come_only_from_folders_that_were_named_at_the_start(context, tmp_path):
    from rclpy.lifecycle import TransitionCallbackReturn as Result
    from rclpy.parameter import Parameter

    from occflow_core.runtime import load, save
    from occflow_ros.node import OccupancyNode

    named, more, other = (tmp_path / name for name in ("named", "more", "other"))
    for folder in (named, more, other):
        folder.mkdir()
        save(load("opus-nano").system, "opus-nano", "fast", folder / "a.safetensors", trained=False)
    (named / "link.safetensors").symlink_to(other / "a.safetensors")
    given = {"model": "opus-nano", "weights": str(named / "a.safetensors"), "folders": str(more)}
    node = OccupancyNode(context=context, parameter_overrides=[Parameter(k, value=v) for k, v in given.items()])
    try:
        (refused,) = node.set_parameters([Parameter("folders", value="/")])
        assert not refused.successful and "read-only" in refused.reason
        outside = (other / "a.safetensors", named / "link.safetensors", named / ".." / "other" / "a.safetensors")
        for weights, expected in [
            (named / "a.safetensors", Result.SUCCESS),
            (more / "a.safetensors", Result.SUCCESS),
            *((path, Result.FAILURE) for path in outside),
        ]:
            node.set_parameters([Parameter("weights", value=str(weights))])
            assert node.trigger_configure() == expected, weights
            if expected == Result.SUCCESS:
                node.trigger_cleanup()
    finally:
        node.destroy_node()


if __name__ == "__main__":
    print("\n".join(table()))
