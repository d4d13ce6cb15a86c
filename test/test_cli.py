"""The command line: what it makes, and one sentence with a code where it cannot."""

import json
import subprocess
import sys

import pytest

from occflow_core.data import pattern
from occflow_core.data.bag import read_bag, write_bag
from occflow_core.data.nuscenes import NuScenes


def occflow(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "occflow_core", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("show", "nowhere", "nowhere", "out"), "nowhere"),
        (("convert", "opus-nanoo", "a.pth", "b.safetensors"), "nearest is 'opus-nano'"),
        (("convert", "opus-tiny", "nowhere.pth", "b.safetensors"), "nowhere.pth"),
        (("export", "opus-domo", "out"), "opus-demo"),
        (("export", "opus-fusion-nano", "out"), "runs eager alone"),
        (("export", "opus-nano", "out", "--weights", "nowhere.safetensors"), "nowhere.safetensors"),
        (("export", "opus-nano", "out", "--backend", "tensorrt"), "needs an NVIDIA GPU"),
        (("export", "opus-nano"), "ask for --coverage"),
        (("export", "opus-nano", "out", "--coverage"), "--coverage, which writes none"),
        (("export", "opus-nano", "--coverage", "--backend", "onnx"), "--coverage is told of tensorrt, not of onnx"),
        (("bench", "node", "--pictures", "nowhere"), "nowhere"),
        (("bench", "metrics", "--pictures", "nowhere"), "--pictures is for node, not for metrics"),
        (("bench", "node", "--model", "opus-demo"), "--model is for model, not for node"),
        (("bench", "metrics", "--backend", "aot"), "--backend is for model, not for metrics"),
        (("bench", "model", "--model", "opus-nano", "--backend", "tensorrt"), "needs an NVIDIA GPU"),
        (("bench", "stream", "--precision", "bf16"), "--precision is for model, not for stream"),
        (("bench", "model", "--sets", "0"), "--sets must be at least 1"),
        (("bench", "model", "--weights", "nowhere.safetensors"), "nowhere.safetensors"),
        (("bench", "model", "--model", "opus-domo"), "opus-demo"),
        (("evaluate", "domo", "a.safetensors"), "nearest is 'demo'"),
        (("evaluate", "demo"), "--against truth or --make-average"),
        (("evaluate", "demo", "--against", "truth", "--precision", "bf16"), "name its weights"),
        (("evaluate", "demo", "a.safetensors", "--make-average", "--backend", "aot"), "name its weights"),
        (("evaluate", "demo", "a.safetensors", "--sign", "team"), "expected field=value, got 'team'"),
        (("evaluate", "demo", "--against", "truth", "--set", "data.root=nowhere", "data.world=none"), "nowhere"),
        (("demo", "--seconds", "0"), "no second keyframe"),
        (("bag", "nowhere", "out", "--base", "chassis"), "add --to-dataset"),
        (("bag", "nowhere", "out", "--to-dataset", "--camera", "/front/image_raw"), "expected NAME=TOPIC"),
        (("bag", "nowhere", "out", "--to-dataset", "--info", "A=/a", "A=/b"), "each name once"),
    ],
    ids=lambda v: v[0] if isinstance(v, tuple) else "",
)
def test_a_mistake_ends_with_one_sentence_and_code_1(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    ended = occflow(*arguments)
    assert ended.returncode == 1, ended
    assert ended.stderr.startswith("occflow: ") and words in ended.stderr and "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []  # nothing half-written, nothing at all


def test_an_unknown_word_is_code_2_and_help_is_code_0():
    assert occflow("dance").returncode == 2
    told = occflow("bag", "--help")
    assert told.returncode == 0 and "TF frame of the car" in told.stdout, "each option's sentence"


@pytest.mark.dds
def test_bench_node_prints_a_table_and_writes_the_same_figures_as_json(tmp_path):
    pytest.importorskip("rclpy", reason="needs ROS 2")
    ended = occflow("bench", "node", "--sets", "5", "--out", tmp_path / "node.json")
    assert ended.returncode == 0, ended.stderr
    figures = json.loads((tmp_path / "node.json").read_text())
    assert set(figures["ms"]) == {"receive", "collect", "decode", "assemble", "convert", "publish", "all"}
    for stage, ms in figures["ms"].items():
        assert 0 < ms["p50"] <= ms["p95"] <= ms["p99"]
        assert f"| {stage} | {ms['p50']} |" in ended.stdout


@pytest.mark.dds
@pytest.mark.slow
@pytest.mark.timeout(480)
def test_a_short_demo_leaves_pictures_bags_and_a_summary_that_counts_right(tmp_path):
    pytest.importorskip("rclpy", reason="needs ROS 2")
    from occflow_core.demo import run

    said = run(tmp_path / "demo", seconds=1.5, rate=0.3)
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    out = summary["messages out"]
    assert summary["frames in"] == 4
    assert sum(summary["sets"][k] for k in ("complete", "partial")) == 4
    assert out == 4 and summary["sets"]["skipped"] == 0  # the replay waits, however slow the machine is
    assert summary["model"] == "opus-demo" and summary["trained"] and "untrained" not in said
    scores = summary["scores"]["scores"]
    assert summary["scores"]["answered"] == "4 of 4" and summary["scores"]["samples missing"] == 0
    assert 0 < scores["average world"]["RayIoU"] < scores["model"]["RayIoU"] < scores["truth against truth"]["RayIoU"]
    assert scores["truth against truth"]["RayIoU"] == 1
    for row in ("opus-demo", "average world", "truth, one voxel aside", "truth against truth"):
        assert f"| {row} | " in said
    assert {"decode", "assemble", "network", "convert", "publish", "latency"} <= set(summary["latency ms"])
    assert summary["node exit code"] == 0
    assert len(list((tmp_path / "demo" / "pictures").glob("*.png"))) == out
    assert len(list(read_bag(tmp_path / "demo" / "predictions"))) == out
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    shown = occflow("show", tmp_path / "demo" / "recording", tmp_path / "demo" / "predictions", tmp_path / "again")
    assert shown.returncode == 0 and len(list((tmp_path / "again").glob("*.png"))) == out


def test_bag_makes_a_data_set_of_the_cameras_and_frames_that_are_named(tmp_path):
    write_bag(tmp_path / "bag", pattern.drive(8, height=90, width=160, rate=6), pattern.rig(90, 160), progress=False)
    chosen = ("--camera", "AHEAD=/cam_front/image_raw/compressed")
    chosen += ("--camera", "REAR=/cam_back/image_raw/compressed")
    frames = ("--base", "base_link", "--world", "map", "--lidar", "none", "--info", "REAR=/cam_back/camera_info")
    ended = occflow("bag", tmp_path / "bag", tmp_path / "data", "--to-dataset", *chosen, *frames)
    assert ended.returncode == 0 and "16 pictures" in ended.stdout, ended
    assert NuScenes(tmp_path / "data", progress=False).cameras == ("AHEAD", "REAR")
    ended = occflow("bag", tmp_path / "bag", tmp_path / "other", "--to-dataset", *chosen, "--world", "odom")
    assert ended.returncode == 1 and "TF does not join base_link to odom" in ended.stderr
    ended = occflow("bag", tmp_path / "bag", tmp_path / "other", "--to-dataset", *chosen, "--lidar", "/points")
    assert ended.returncode == 1 and "no PointCloud2 on /points" in ended.stderr


def test_show_names_a_recording_without_the_cameras(tmp_path):
    write_bag(tmp_path / "bag", pattern.drive(1, height=90, width=160), pattern.rig(90, 160), progress=False)
    ended = occflow("show", tmp_path / "bag", tmp_path / "bag", tmp_path / "out")
    assert ended.returncode == 1 and "occflow_msgs/msg/VoxelFlow" in ended.stderr


def test_bench_metrics_prints_a_table_with_memory_and_writes_the_same_figures_as_json(tmp_path):
    ended = occflow("bench", "metrics", "--sets", "2", "--out", tmp_path / "metrics.json")
    assert ended.returncode == 0, ended.stderr
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert set(figures["ms"]) == {"mIoU", "RayIoU", "mAVE", "all"} and figures["memory MB"] > 0
    for stage, ms in figures["ms"].items():
        assert ms["p50"] > 0 and f"| {stage} | {ms['p50']} |" in ended.stdout


def test_bench_model_tells_what_a_network_costs(tmp_path):
    ended = occflow("bench", "model", "--model", "opus-demo", "--sets", "2", "--out", tmp_path / "model.json")
    assert ended.returncode == 0, ended.stderr
    figures = json.loads((tmp_path / "model.json").read_text())
    assert set(figures["ms"]) == {"prepare", "network", "voxels", "visibility", "all"} and figures["parameters"] > 1e6
    for stage, ms in figures["ms"].items():
        assert ms["p50"] > 0 and f"| {stage} | {ms['p50']} |" in ended.stdout
    assert "opus-demo, " in ended.stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_evaluate_scores_weights_beside_baselines_and_makes_the_map_that_ships_with_them(tmp_path):
    from engine import drives

    data, out = drives.write(tmp_path / "data"), tmp_path / "out"
    weights = drives.weights(tmp_path / "some.safetensors")
    settings = f"model=opus-nano data.root={data} data.world=none data.train=here_train data.val=here_val".split()
    ended = occflow("evaluate", "demo", weights, "--make-average", "--set", *settings)
    average = tmp_path / "some.average.safetensors"
    assert ended.returncode == 0 and average.is_file() and "split here_train, 3 keyframes" in ended.stdout, ended
    ended = occflow("evaluate", "demo", weights, "--out", out, "--against", "truth", "--set", *settings)
    assert ended.returncode == 0, ended.stderr
    for row in ("opus-nano", "average world", "truth, one voxel aside", "truth against truth | 100.00"):
        assert f"\n| {row} | " in ended.stdout
    report = json.loads((out / "scores.json").read_text())
    assert report["samples expected"] == 6 and report["samples missing"] == 0 and report["split"] == "here_val"
    assert "here_train, 3 keyframes" in report["average world of"] and len(report["weights"]) == 64
    assert (out / "submission.gz").is_file()
    again = occflow("evaluate", "demo", weights, "--out", out, "--sign", "team=us", "--set", *settings)
    assert again.returncode == 0 and again.stdout == ended.stdout
    half = ("evaluate", "demo", weights, "--precision", "bf16", "--set", *settings, "--out")
    refused = occflow(*half, out)
    assert refused.returncode == 1 and "made of other weights, labels or settings" in refused.stderr
    told = occflow(*half, tmp_path / "half")
    assert told.returncode == 0 and "network eager in bf16" in told.stdout, told
    other = json.loads((tmp_path / "half" / "scores.json").read_text())
    assert (report["precision"], other["precision"], other["backend"]) == ("float32", "bf16", "eager")
    scores = [r["scores"]["model"] for r in (report, other)]
    assert scores[0] != scores[1]
    alone = occflow("evaluate", "demo", "--out", tmp_path / "self", "--against", "truth", "--set", *settings)
    assert alone.returncode == 0 and "opus" not in alone.stdout and "average world" in alone.stdout
    assert not (tmp_path / "self" / "submission.gz").exists() and (tmp_path / "self" / "average.safetensors").exists()
