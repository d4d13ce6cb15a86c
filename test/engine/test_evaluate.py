"""Scores of drives: what is scored is what drives, nothing is lost, and nobody can tell who counted."""

import gzip
import io
import json
import os
import pickle
import pickletools
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from engine import drives
from systems import small_sparse

from occflow_core.data.nuscenes import NuScenes
from occflow_core.engine import Data, Optimise, Run, submission
from occflow_core.engine import evaluate as module
from occflow_core.engine.average import average_world, load, save
from occflow_core.engine.evaluate import (
    ASIDE,
    AVERAGE,
    MODEL,
    TRUTH,
    Job,
    aside,
    evaluate,
    evaluate_into,
    evaluate_said,
    table,
)
from occflow_core.geometry import OCC3D_GRID
from occflow_core.metrics import Scores, directions, origins
from occflow_core.runtime import Model, Stream
from occflow_core.systems.base import seeded
from occflow_core.systems.sparseocc import SparseOcc4D
from occflow_core.types import OCC3D, OPENOCC, Prediction


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return drives.write(tmp_path_factory.mktemp("drives"))


@pytest.fixture
def world(data) -> NuScenes:
    return NuScenes(data, progress=False)


class Guess(torch.nn.Module):
    """A system that says what the truth of its first keyframe was, and counts what it is shown."""

    def __init__(self, world, config=drives.FULL):
        super().__init__()
        self.config, self.weight = config, torch.nn.Parameter(torch.zeros(1))
        self.truth = world.occupancy(world.samples(world.scenes[0])[0], "openocc", instances=config.panoptic)
        self.clips = []

    def forward(self, clip, memory):
        self.clips.append(clip)
        return len(self.clips), len(self.clips)

    def decode(self, output):
        return [module.as_prediction(self.truth)]


@dataclass(frozen=True)
class Panoptic(type(drives.FULL)):
    panoptic: ClassVar[bool] = True


def guess(world, name="guess", config=drives.FULL) -> tuple[Model, Guess]:
    system = Guess(world, config)
    return Model(system, name, True, "fast", name), system


def scored(out, world, model=None, scenes=None, **arguments):
    job = {name: arguments.pop(name) for name in ("average", "keep_going", "sweeps") if name in arguments}
    job = Job(world, arguments.pop("labels", "openocc"), model, **job)
    return evaluate_into(out, job, scenes or world.scenes, {}, progress=False, **arguments)


# ---- what is scored


@pytest.mark.timeout(300)
def test_scores_are_those_of_a_stream_that_is_stepped_by_hand(world):
    by_hand, scenes = Scores(OPENOCC), world.scenes[:2]
    for scene in scenes:
        stream, keyframes = Stream(drives.model()), world.keyframes(scene)
        data = [world.data(moment.reference) for moment in keyframes]
        lidar = [d.world_from_car @ d.car_from_sensor for d in data]
        for k, moment in enumerate(keyframes):
            truth = world.occupancy(moment.sample, "openocc")
            eyes = origins(lidar, k, data[k].car_from_sensor)
            assert len(eyes) == 3, "4 m from keyframe to keyframe: all of them are near"
            by_hand.add(moment.sample, stream.step(world.frame(moment)), truth, eyes)
    assert evaluate(drives.model(), world, scenes, "openocc", progress=False).to_json() == by_hand.to_json()


def test_each_drive_begins_fresh_and_frames_come_in_order(world):
    model, system = guess(world)
    evaluate(model, world, world.scenes[:2], "openocc", progress=False)
    assert [bool(clip.fresh) for clip in system.clips] == [True, False, False, True, False, False]
    assert all(float(clip.since_last) == pytest.approx(0.5) for clip in system.clips if not clip.fresh)


def test_sweeps_are_shown_and_keyframes_scored(world):
    model, system = guess(world)
    scores = evaluate(model, world, world.scenes[:1], "openocc", sweeps=True, progress=False)
    assert len(system.clips) == len(world.moments(world.scenes[0])) > 3 == len(scores.samples)


@dataclass(frozen=True)
class Seeing(type(drives.FULL)):
    sweeps: int = 2


def test_scans_come_to_a_model_that_asks_for_them_and_to_no_other(world):
    model, system = guess(world)
    scene = world.scenes[0]
    evaluate(model, world, [scene], "openocc", progress=False)
    system.config = Seeing(**vars(drives.FULL))
    evaluate(model, world, [scene], "openocc", progress=False)
    without, seeing = system.clips[:3], system.clips[3:]
    assert all(clip.points is None for clip in without)
    for clip, moment in zip(seeing, world.keyframes(scene), strict=True):
        assert torch.equal(clip.points[0], world.cloud(moment, 2))


def test_the_baselines_and_the_truth_stand_beside_the_model(tmp_path, world):
    model, _ = guess(world)
    average, keyframes = average_world(world, world.split("here_train"), "openocc", progress=False)
    assert keyframes == 3
    report = scored(tmp_path, world, model, average=average)
    scores = report["scores"]
    assert list(scores) == [MODEL, AVERAGE, ASIDE, TRUTH]
    assert scores[TRUTH]["mIoU"] == scores[TRUTH]["RayIoU"] == scores[TRUTH]["OccScore"] == 1.0
    assert scores[TRUTH]["mAVE"] == 0.0 and scores[TRUTH]["flow"]["unknown"] > 0
    assert 0.5 < scores[ASIDE]["RayIoU"] < 1 and 0.3 < scores[MODEL]["RayIoU"] < 1
    assert all(result["samples"] == 9 for result in scores.values())
    text = (tmp_path / "scores.md").read_text()
    assert text.strip() == table(report) and json.loads((tmp_path / "scores.json").read_text()) == report
    for name in ("guess", AVERAGE, ASIDE, TRUTH):
        assert f"\n| {name} | " in text
    assert "| truth against truth | 100.00 | 100.00 | 100.00 | 100.00 | 100.00 | 0.000 | 100.00 |" in text
    assert "\n| car | " in text and "9 of 9 keyframes in 3 drives" in text
    assert "RayPQ" not in text and not any("RayPQ" in result for result in scores.values())


def test_a_model_that_tells_instances_apart_gets_raypq_and_the_average_world_a_dash(tmp_path, world):
    model, system = guess(world, config=Panoptic(**vars(drives.FULL)))
    average, _ = average_world(world, world.split("here_train"), "openocc", progress=False)
    report = scored(tmp_path, world, model, average=average)
    scores = report["scores"]
    assert scores[TRUTH]["RayPQ"] == 1.0 and "RayPQ" not in scores[AVERAGE]
    assert scores[TRUTH]["panoptic"]["matched"]["car"] == [18] * 3, "two cars in each of nine keyframes"
    # the guess is right about the first keyframes; later its cars are left behind, and count twice
    told = scores[MODEL]["panoptic"]
    assert 0.3 < scores[MODEL]["RayPQ"] < 1 and told["matched"]["car"] == [6] * 3
    assert told["missed"]["car"] == told["wrong"]["car"] == [12] * 3
    header, _, *rows = [line for line in (tmp_path / "scores.md").read_text().splitlines() if line.startswith("|")]
    assert header.endswith("| Occ Score | RayPQ |")
    assert rows[1].startswith(f"| {AVERAGE} |") and rows[1].endswith(" | – |")
    assert rows[3].startswith(f"| {TRUTH} |") and rows[3].endswith(" | 100.00 |")
    assert evaluate(model, world, world.scenes, "openocc", progress=False).result() == scores[MODEL]
    stepped = len(system.clips)
    assert scored(tmp_path, world, model, average=average) == report and len(system.clips) == stepped, "as it is kept"
    for unequal in (0.999, None):
        with pytest.raises(RuntimeError, match="must score 100 %, got .*'RayPQ'"):
            module._perfect(scores[TRUTH] | {"RayPQ": unequal})
    module._perfect(scores[TRUTH])


def test_masks_of_sparseocc_become_instances_that_are_scored(tmp_path, world):
    few = {"kept": (50, 200, 1500), "kept_in_training": (50, 200, 1500)}
    config = replace(small_sparse.CONFIG, panoptic=True, queries=1, grid=OCC3D_GRID, **few)
    system = seeded(SparseOcc4D(config), 0).eval()
    model = Model(system, "sparseocc4d-nano (untrained)", False, "fast", None)
    report = scored(tmp_path, world, model, scenes=world.scenes[:1])
    assert report["panoptic"] and report["scores"][MODEL]["RayPQ"] == 0.0
    told = Stream(model).step(world.frame(world.keyframes(world.scenes[0])[0]))
    assert torch.equal(told.instances == 1, told.labels != OPENOCC.free) and 1 <= told.instances.sum() <= 1500


def test_what_somebody_said_with_instances_is_scored_with_them(world):
    scene = world.scenes[0]
    first = world.samples(scene)[0]
    said = {first: module.as_prediction(world.occupancy(first, "openocc", instances=True))}
    assert evaluate_said(Job(world, "openocc"), scene, said).rows[MODEL].result()["RayPQ"] == 1.0
    said = {first: replace(said[first], instances=None)}
    assert "RayPQ" not in evaluate_said(Job(world, "openocc"), scene, said).rows[MODEL].result()


def test_occ3d_is_scored_where_a_camera_sees_and_without_flow(tmp_path, world):
    report = scored(tmp_path, world, labels="occ3d")
    got = report["scores"][ASIDE]
    assert got["voxels seen"]["voxels"] == 9 * 150 * 200 * 16 and got["voxels unseen"]["voxels"] == 9 * 50 * 200 * 16
    assert "mAVE" not in got and "OccScore" not in got and report["scores"][TRUTH]["mIoU"] == 1.0
    assert "unseen" in (tmp_path / "scores.md").read_text()


def test_one_voxel_aside_is_ahead_and_takes_its_velocity_along(world):
    truth = world.occupancy(world.samples(world.scenes[0])[0], "openocc", instances=True)
    told = aside(truth)
    assert torch.equal(told.labels[1:], truth.labels[:-1]) and (told.labels[0] == OPENOCC.free).all()
    assert torch.equal(told.flow[1:], truth.flow[:-1]) and (told.flow[0] == 0).all()
    assert torch.equal(told.instances[1:], truth.instances[:-1]) and not told.instances[0].any()


def test_the_published_variants_can_be_asked_for_afterwards_and_are_named(tmp_path, world):
    model, system = guess(world)
    usual = scored(tmp_path, world, model)
    stepped = len(system.clips)
    other = scored(tmp_path, world, model, absent="skip", over="all")
    assert len(system.clips) == stepped, "drives are not repeated for it"
    assert other["scores"][ASIDE]["mAVE"] != usual["scores"][ASIDE]["mAVE"]
    text = table(other)
    assert "absent classes left out" in text and "AVE over all rays" in text and "left out" not in table(usual)


# ---- going on


def test_finished_drives_are_not_repeated_and_the_end_is_the_same(tmp_path, world):
    model, system = guess(world)
    whole = scored(tmp_path / "whole", world, model)
    scored(tmp_path / "parts", world, model, world.scenes[:2])
    system.clips.clear()
    again = scored(tmp_path / "parts", world, model)
    assert len(system.clips) == 3, "the third drive alone"
    assert json.dumps(again) == json.dumps(whole)


def test_a_drive_that_was_cut_off_is_repeated_whole(tmp_path, world, monkeypatch):
    model, system = guess(world)
    whole = scored(tmp_path / "whole", world, model)

    def broken(output):
        if output == 15:  # nine of the run before; the third keyframe of the second drive
            raise ValueError("switched off")
        return [module.as_prediction(system.truth)]

    monkeypatch.setattr(system, "decode", broken)
    with pytest.raises(ValueError, match="scene-0002, .*: switched off"):
        scored(tmp_path / "cut", world, model)
    assert [path.name for path in (tmp_path / "cut" / "drives").iterdir()] == ["scene-0001.json"]
    assert not (tmp_path / "cut" / "scores.json").exists()
    monkeypatch.undo()
    assert json.dumps(scored(tmp_path / "cut", world, model)) == json.dumps(whole)


def test_tallies_of_other_weights_are_not_taken_over(tmp_path, world):
    scored(tmp_path, world, guess(world, "one")[0], world.scenes[:1])
    with pytest.raises(ValueError, match="scene-0001.json cannot be gone on with: it was made of other weights"):
        scored(tmp_path, world, guess(world, "other")[0])
    (tmp_path / "drives" / "scene-0001.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be gone on with"):
        scored(tmp_path, world, guess(world, "one")[0])


def test_names_of_drives_cannot_leave_the_folder(tmp_path):
    assert module._drive_path(tmp_path, "../../x/y").parent == tmp_path / "drives"


# ---- bad input


def test_a_keyframe_that_cannot_be_scored_is_an_error_or_counted(tmp_path):
    world = NuScenes(drives.write(tmp_path / "data", 1), progress=False)
    sample = world.samples("scene-0001")[1]
    world.label_path(sample, "openocc").unlink()
    with pytest.raises(ValueError, match=f"scene-0001, {sample}: sample {sample}: no label file"):
        scored(tmp_path / "stops", world)
    report = scored(tmp_path / "goes on", world, guess(world)[0], keep_going=True)
    assert report["samples missing"] == 1 and report["missing"] == [sample] and "no label file" in report["problems"][0]
    assert report["scores"][MODEL]["samples"] == 2 and "2 of 3 keyframes" in table(report)


def test_a_network_that_is_not_finite_is_named_with_its_keyframe(tmp_path, world, monkeypatch):
    model, system = guess(world)
    monkeypatch.setattr(system, "forward", lambda clip, memory: (torch.tensor(float("nan")), None))
    with pytest.raises(ValueError, match="scene-0001, [0-9a-f]{32}: the network's output is not finite"):
        scored(tmp_path, world, model)


def test_classes_and_grids_that_differ_are_refused_before_anything_is_read(world):
    model, system = guess(world)
    with pytest.raises(
        ValueError, match="the model speaks of classes openocc-v2, the labels 'occ3d' of occ3d-nuscenes"
    ):
        Job(world, "occ3d", model)
    system.config = replace(drives.FULL, grid=drives.CONFIG.grid)
    with pytest.raises(ValueError, match="the model fills Grid.* another measure"):
        Job(world, "openocc", model)
    with pytest.raises(ValueError, match="one of occ3d, openocc, got 'lidar'"):
        Job(world, "lidar")


def test_nothing_to_score_is_an_error(tmp_path, world):
    for scenes in ((), world.scenes[:1] * 2):
        with pytest.raises(ValueError, match="expected different scenes with keyframes"):
            evaluate_into(tmp_path, Job(world, "openocc"), scenes, {}, progress=False)


def test_a_truth_that_is_not_a_hundred_percent_against_itself_ends_in_an_error(tmp_path, world, monkeypatch):
    monkeypatch.setattr(module, "as_prediction", lambda truth: module.aside(truth))
    monkeypatch.setattr(module, "aside", lambda truth: truth_moved(truth))
    report = scored(tmp_path, world, scenes=world.scenes[:1])
    with pytest.raises(RuntimeError, match="must score 100 %, got .*'RayIoU': 0"):
        module._perfect(report["scores"][TRUTH])


def truth_moved(truth):
    """The truth one voxel to the left, as a prediction."""
    labels = truth.labels.roll(1, 1)
    return Prediction(truth.grid, truth.classes, labels, torch.zeros(labels.shape), truth.flow.nan_to_num())


# ---- the average world


def test_the_average_world_is_the_majority_of_each_voxel(world):
    average, keyframes = average_world(world, world.scenes, "openocc", progress=False)
    truths = [world.occupancy(s, "openocc").labels for scene in world.scenes for s in world.samples(scene)]
    votes = torch.stack([sum((t == c).int() for t in truths) for c in range(OPENOCC.free + 1)])
    assert keyframes == 9 == int(votes[:, 0, 0, 0].sum())
    assert torch.equal(average.labels.long(), votes.argmax(0))
    filled = average.labels != OPENOCC.free
    assert torch.allclose(average.score[filled], votes.max(0).values[filled] / 9) and not average.score[~filled].any()
    assert average.flow is not None and not average.flow.any()


def test_the_average_world_asks_only_keyframes_that_see_a_voxel(tmp_path):
    world = NuScenes(drives.write(tmp_path, 1), progress=False)
    first, *others = (world.label_path(sample, "occ3d") for sample in world.samples("scene-0001"))
    labels = np.load(first)["semantics"]
    for path in others:  # they say free, of what they do not see
        np.savez(path, semantics=np.full_like(labels, OCC3D.free), mask_camera=np.zeros_like(labels))
    average, _ = average_world(world, world.scenes, "occ3d", progress=False)
    assert np.array_equal(average.labels[50:], labels[50:]) and (average.labels[:50] == OCC3D.free).all()
    assert average.flow is None


def test_a_stored_average_world_comes_back(tmp_path, world):
    average, _ = average_world(world, world.scenes, "openocc", progress=False)
    path = tmp_path / "a.average.safetensors"
    save(average, path, "here")
    again, source = load(path)
    assert source == "here" and torch.equal(again.labels, average.labels) and torch.equal(again.flow, average.flow)
    assert (again.grid, again.classes) == (average.grid, average.classes)
    assert torch.allclose(again.score, average.score, atol=0.002)
    assert path.stat().st_size < 1_400_000


def test_what_is_no_average_world_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--make-average"):
        load(tmp_path / "none")
    (tmp_path / "some").write_bytes(b"something else")
    with pytest.raises(ValueError, match="is no map of the average world"):
        load(tmp_path / "some")
    with pytest.raises(ValueError, match="is no map of the average world"):
        load(drives.weights(tmp_path / "weights"))


def test_a_training_split_without_scenes_is_named(tmp_path):
    root = drives.write(tmp_path / "data", 1)
    (root / "v1.0-mini" / "splits.json").write_text('{"none": []}')
    run = Run("opus-nano", drives.FULL, Data(root, train="none"), Optimise(), steps=1, batch=1)
    with pytest.raises(ValueError, match="split none of .* has no scenes .*--average FILE"):
        module.make_average(run, tmp_path / "a.safetensors", progress=False)


# ---- the challenge's file


class Known(pickle.Unpickler):
    """Only what the format is made of; and not NumPy's inner modules, whose names differ between its versions."""

    def find_class(self, module, name):
        return {("numpy", "ndarray"): np.ndarray, ("builtins", "dict"): dict}[module, name]


def read(path: Path):
    return Known(io.BytesIO(gzip.decompress(path.read_bytes()))).load()


def test_the_challenges_file_holds_the_rays_of_every_sample(tmp_path, world):
    model, _ = guess(world)
    scored(tmp_path, world, model, submit={"team": "us", "method": "guess"})
    told = read(tmp_path / "submission.gz")
    assert list(told) == [*submission.FIELDS, "results"] and (told["team"], told["method"], told["authors"]) == (
        "us",
        "guess",
        "",
    )
    assert list(told["results"]) == [sample for scene in world.scenes for sample in world.samples(scene)]
    assert type(told["results"]) is dict
    truth = world.occupancy(world.samples(world.scenes[0])[0], "openocc")
    for rays in told["results"].values():
        number = 3 * len(directions())
        assert {name: (a.shape, a.dtype.name) for name, a in rays.items()} == {
            "pcd_cls": ((number,), "uint8"),
            "pcd_dist": ((number,), "float16"),
            "pcd_flow": ((number, 2), "float16"),
        }
    first = told["results"][world.samples(world.scenes[0])[0]]
    # origin 0 is the car's own place: the steepest ray ahead meets the road, 1.84 + 1 m below, before its voxel ends
    assert first["pcd_cls"][0] == OPENOCC.id("driveable_surface") and 3 < first["pcd_dist"][0] < 4.1
    car = first["pcd_cls"] == OPENOCC.id("car")
    assert car.any() and (first["pcd_flow"][car] == np.float16([4.0, 0.5])).all()
    assert set(first["pcd_cls"]) <= set(truth.labels.unique().tolist())


def test_equal_predictions_give_equal_files_also_when_gone_on(tmp_path, world):
    model, system = guess(world)
    scored(tmp_path / "a", world, model, submit={})
    scored(tmp_path / "b", world, model, world.scenes[:1], submit={})
    scored(tmp_path / "b", world, model, submit={})
    one, other = ((tmp_path / name / "submission.gz").read_bytes() for name in "ab")
    assert one == other
    opcodes = [code.name for code, *_ in pickletools.genops(gzip.decompress(one))]
    assert "MEMOIZE" not in opcodes and "BINPUT" not in opcodes, "a memory of all samples: gigabytes"


def test_rays_are_asked_for_later_and_the_drive_is_driven_again(tmp_path, world):
    model, system = guess(world)
    scored(tmp_path, world, model, world.scenes[:1])
    scored(tmp_path, world, model, world.scenes[:1], submit={})
    assert len(system.clips) == 6 and len(read(tmp_path / "submission.gz")["results"]) == 3


def test_a_field_that_the_file_has_not_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tema is no field"):
        submission.write(tmp_path / "s.gz", [], {"tema": "us"})
    assert not list(tmp_path.iterdir())


# ---- several processes


def together(number: int, data: Path, out: Path) -> list[dict]:
    """What each of `number` processes said."""
    out.mkdir()
    script = Path(__file__).parent / "two.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}", script]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*command, data, out], capture_output=True, text=True, timeout=240, env=environment)
    assert ended.returncode == 0, ended.stderr
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(number)]


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_tallies_of_two_processes_are_those_of_one_bit_for_bit(tmp_path, data):
    (alone,) = together(1, data, tmp_path / "one")
    two = together(2, data, tmp_path / "two")
    assert [said.pop("processes") for said in (alone, *two)] == [1, 2, 2]
    assert two[0] == two[1] == alone and "evaluate" in alone
    for name in ("scores.json", "scores.md", "submission.gz"):
        one, other = ((tmp_path / many / "scored" / name).read_bytes() for many in ("one", "two"))
        assert one == other


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_where_one_process_fails_the_other_ends_with_its_sentence(tmp_path):
    data = drives.write(tmp_path / "data", 2)
    world = NuScenes(data, progress=False)
    world.label_path(world.samples("scene-0002")[2], "openocc").unlink()
    first, second = together(2, data, tmp_path / "out")
    assert "no label file" in second["problem"] and first["problem"] == f"another process ended: {second['problem']}"
