"""What every system keeps, whichever it is: its `nano` preset on a small grid, with made-up drives of three cameras."""

from dataclasses import dataclass, fields, is_dataclass, replace

import pytest
import torch
from contract.options import OPTIONS, SMALL
from far import Bus, on_gpu
from systems.rig import drive
from torch import Tensor

from occflow_core.data import augment
from occflow_core.engine.optimise import as_float32
from occflow_core.geometry import OCC3D_GRID, Grid
from occflow_core.ops import gpu
from occflow_core.runtime import Stream, load, save
from occflow_core.runtime.load import Model
from occflow_core.systems import SYSTEMS
from occflow_core.systems.base import seeded
from occflow_core.types import OCC3D, OPENOCC, Clip, Occupancy

GRID = Grid((-12.0, -10.0, -1.0), (1.0, 1.0, 0.8), (24, 20, 8))  # nothing about it is equal
CLOSE = 2e-4  # m, m/s, logits: float32 rounds differently in batches of other sizes, layer after layer
EACH = pytest.mark.parametrize("name", sorted(SYSTEMS))


def small(name, **changes):
    """The nano preset at a size for tests: pictures of 64 x 96, five times."""
    size = {"height": 64, "width": 96, "grid": GRID, "frames": 5}
    return replace(SYSTEMS[name].PRESETS["nano"], **size | SMALL[name] | changes)


def build(name, **changes):
    system = seeded(SYSTEMS[name](small(name, **changes)), 0).eval()
    if getattr(system, "look", None) and name == "opus":  # what begins as nothing must say something here
        torch.nn.init.normal_(system.look.say[-1].weight, generator=torch.Generator().manual_seed(0))
    return system


def truth_of(config, lanes=1, seed=0, flow=True) -> Occupancy:
    generator = torch.Generator().manual_seed(seed)
    classes = {table.table: table for table in (OCC3D, OPENOCC)}[config.classes]
    shape = (lanes, *config.grid.shape)
    labels = torch.where(
        torch.rand(shape, generator=generator) < 0.1,
        torch.randint(0, classes.free, shape, generator=generator),
        classes.free,
    ).to(torch.uint8)
    speeds = torch.randn(*shape, 2, generator=generator) if flow else None
    seen = torch.rand(shape, generator=generator) < 0.7
    ids = torch.randint(0, 9, shape, generator=generator).int() if config.panoptic else None
    return Occupancy(config.grid, classes, labels, speeds, seen, ids)


def tensors(value) -> list[Tensor]:
    """All floating-point tensors of an output, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if is_dataclass(value):
        return [t for f in fields(value) for t in tensors(getattr(value, f.name))]
    return [t for part in value for t in tensors(part)] if isinstance(value, tuple | list) else []


def apart(a, b) -> float:
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    assert pairs
    return max(float((x - y).abs().max()) if x.shape == y.shape else float("inf") for x, y in pairs)


def lane(output, b):
    """One lane of a batch of outputs."""
    if hasattr(output, "lane"):  # what is not dense knows its lanes itself
        return output.lane(b)
    if isinstance(output, Tensor):
        return output[b : b + 1]
    if is_dataclass(output):
        return replace(output, **{f.name: lane(getattr(output, f.name), b) for f in fields(output)})
    return type(output)(lane(part, b) for part in output) if isinstance(output, tuple | list) else output


@torch.no_grad()
def run(system, frames, memory=None):
    """One frame after another; all outputs, and what is remembered after the last."""
    outputs = []
    for i, frame in enumerate(frames):
        output, memory = system(Clip.of(frame, after=frames[i - 1] if i else None), memory)
        outputs.append(output)
    return outputs, memory


@EACH
def test_what_is_saved_is_all_there_is(name, tmp_path):
    system, frames = build(name), drive(3, every=0.5)
    save(system, f"{name}-nano", "fast", tmp_path / "weights.safetensors", trained=True)
    again = load(f"{name}-nano", tmp_path / "weights.safetensors").system
    assert again.config == system.config
    assert apart(run(system, frames)[0], run(again, frames)[0]) == 0


@EACH
def test_building_twice_from_one_config_gives_equal_shapes_and_leaves_it_as_it_was(name):
    config, same = small(name), small(name)
    shapes = [{n: tuple(t.shape) for n, t in SYSTEMS[name](config).state_dict().items()} for _ in range(2)]
    assert shapes[0] == shapes[1] and config == same


@EACH
def test_a_batch_of_two_is_two_batches_of_one_also_when_one_lane_is_fresh(name):
    system, long, other = build(name), drive(4, every=0.5), drive(1, every=0.5, start=20)
    _, memory = run(system, long[:3])
    with torch.no_grad():
        _, both_memory = system(Clip.batch([Clip.of(long[2], after=long[1]), Clip.of(other[0])]), two(system, long))
        going_on, starting = Clip.of(long[3], after=long[2]), Clip.of(other[0])
        alone = [system(going_on, memory)[0], system(starting, None)[0]]
        both, _ = system(Clip.batch([going_on, starting]), both_memory)
    for b in range(2):
        assert apart(lane(both, b), alone[b]) < CLOSE
        ours, theirs = system.decode(both)[b], system.decode(alone[b])[0]
        assert (ours.labels != theirs.labels).float().mean() < 1e-3  # a score may lie on the threshold
    truth = truth_of(system.config, lanes=2)
    apart_terms = [system.loss(alone[b], select(truth, b)) for b in range(2)]
    together = system.loss(both, truth)
    assert together.keys() == apart_terms[0].keys()
    assert all(torch.isfinite(v) for v in together.values())


def two(system, frames):
    """The memory of two lanes that saw the first two frames."""
    _, memory = run(system, frames[:1])
    with torch.no_grad():
        first = Clip.of(frames[0])
        _, memory = system(Clip.batch([first, first]), None)
        second = Clip.of(frames[1], after=frames[0])
        _, memory = system(Clip.batch([second, second]), memory)
    return memory


def select(truth: Occupancy, b: int) -> Occupancy:
    flow = None if truth.flow is None else truth.flow[b : b + 1]
    ids = None if truth.instances is None else truth.instances[b : b + 1]
    return replace(truth, labels=truth.labels[b : b + 1], flow=flow, seen=truth.seen[b : b + 1], instances=ids)


@EACH
def test_the_loss_of_two_equal_lanes_is_the_loss_of_one(name):
    """What a loss is divided by grows with the batch, and no lane is cut out of another."""
    system = build(name)
    one = Clip.of(drive(1, every=0.5)[0])
    with torch.no_grad():
        (single, _), (double, _) = system(one, None), system(Clip.batch([one, one]), None)
    truth = truth_of(system.config)
    twice = replace(truth, labels=truth.labels.repeat(2, 1, 1, 1), flow=truth.flow.repeat(2, 1, 1, 1, 1),
                    seen=truth.seen.repeat(2, 1, 1, 1))  # fmt: skip
    alone, both = system.loss(single, truth), system.loss(double, twice)
    for term, value in alone.items():
        assert both[term].item() == pytest.approx(value.item(), rel=1e-3), term


@EACH
def test_each_lane_is_held_against_its_own_truth(name):
    system, frames = build(name), drive(1, every=0.5) + drive(1, every=0.5, start=30)
    with torch.no_grad():
        both, _ = system(Clip.batch([Clip.of(f) for f in frames]), None)
    truth = truth_of(system.config, lanes=2)
    crossed = replace(truth, labels=truth.labels.flip(0), flow=truth.flow.flip(0), seen=truth.seen.flip(0))
    ours, theirs = system.loss(both, truth), system.loss(both, crossed)
    assert any(not torch.isclose(ours[k], theirs[k], rtol=1e-4) for k in ours)


@EACH
def test_five_frames_one_by_one_are_a_window_of_five(name):
    system, frames = build(name), drive(5, every=0.5)
    streamed, _ = run(system, frames)
    with torch.no_grad():
        window, _ = system(Clip.of(frames[::-1]), None)
    assert apart(streamed[-1], window) < CLOSE
    assert apart(streamed[-1], run(system, frames[-1:])[0][-1]) > 1e-3  # and the past matters


@EACH
def test_a_new_drive_forgets_and_two_that_take_turns_do_not_mix(name):
    system, a, b = build(name), drive(3, every=0.5), drive(3, every=0.5, start=40, drive="other")
    apart_a, apart_b = run(system, a)[0], run(system, b)[0]
    _, stale = run(system, a)
    with torch.no_grad():
        assert apart(system(Clip.of(b[0]), stale)[0], apart_b[0]) == 0
        memories, seen = {"a": None, "b": None}, []
        for i in range(3):
            for key, frames in (("a", a), ("b", b)):
                clip = Clip.of(frames[i], after=frames[i - 1] if i else None)
                output, memories[key] = system(clip, memories[key])
                seen.append((key, i, output))
    for key, i, output in seen:
        assert apart(output, (apart_a if key == "a" else apart_b)[i]) == 0


@EACH
def test_every_parameter_learns_and_its_gradient_is_finite(name):
    system = build(name)
    output, _ = system(Clip.of(drive(5, every=0.5)[::-1]), None)
    sum(system.loss(output, truth_of(system.config)).values()).backward()
    for parameter, p in system.named_parameters():
        if p.requires_grad:  # what a system holds fixed is not learned
            assert p.grad is not None and torch.isfinite(p.grad).all(), parameter


@EACH
def test_in_half_precision_it_costs_nearly_the_same_and_learns(name):
    system, clip = build(name), Clip.of(drive(5, every=0.5)[::-1])
    truth = truth_of(system.config)
    with torch.no_grad():
        whole = system.loss(system(clip, None)[0], truth)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = system(clip, None)
    half = system.loss(as_float32(output), truth)
    # which voxels SparseOcc keeps, and which query is matched with which segment, turns on a hair
    near = 0.1 if name.startswith("sparseocc") else 0.05
    for term, value in whole.items():
        assert half[term].item() == pytest.approx(value.item(), rel=near), term
    sum(half.values()).backward()
    assert all(p.grad.isfinite().all() for p in system.parameters() if p.requires_grad)


@EACH
def test_truth_without_flow_or_without_anything_in_it_teaches_what_it_can(name):
    system = build(name)
    output, _ = system(Clip.of(drive(1, every=0.5)[0]), None)
    blind = truth_of(system.config, flow=False)
    assert all(torch.isfinite(v) for v in system.loss(output, blind).values())
    nothing = replace(blind, labels=torch.full_like(blind.labels, blind.classes.free))
    terms = system.loss(output, nothing)
    assert all(torch.isfinite(v) for v in terms.values())
    sum(terms.values()).backward()
    nan = replace(truth_of(system.config), flow=torch.full((1, *GRID.shape, 2), torch.nan))
    assert all(torch.isfinite(v) for v in system.loss(system(Clip.of(drive(1, 0.5)[0]), None)[0], nan).values())


@EACH
def test_a_truth_of_other_voxels_or_classes_is_refused(name):
    system = build(name)
    output, _ = system(Clip.of(drive(1, every=0.5)[0]), None)
    truth = truth_of(system.config)
    other = OPENOCC if truth.classes is OCC3D else OCC3D
    with pytest.raises(ValueError, match=other.table):
        system.loss(output, replace(truth, classes=other))
    with pytest.raises(ValueError, match="shape=\\(200, 200, 16\\)"):
        system.loss(output, truth_of(replace(system.config, grid=OCC3D_GRID)))


@EACH
@pytest.mark.parametrize("degrees", [90.0, 180.0])
def test_a_world_that_turns_takes_its_truth_along(name, degrees):
    """On a square grid: the turned truth is the truth of the turned world, and the system can learn from it."""
    square = Grid((-12.0, -12.0, -1.0), (1.0, 1.0, 0.8), (24, 24, 8))
    system = build(name, grid=square)
    clip, truth = Clip.of(drive(1, every=0.5)[0]), truth_of(system.config)
    turned, its_truth = augment.moved(clip, truth, augment.turn(degrees))
    assert torch.equal(its_truth.labels, torch.rot90(truth.labels, round(degrees / 90), dims=(1, 2)))
    with torch.no_grad():
        outputs = [system(c, None)[0] for c in (clip, turned)]
    assert apart(*outputs) > 1e-4
    terms = system.loss(outputs[1], its_truth)
    assert all(torch.isfinite(v) for v in terms.values())


@EACH
def test_every_option_is_listed_and_changes_something(name):
    """Shapes, what the network says, what it costs or what is made of it: an option that changes none of them lies."""
    system, told = build(name), OPTIONS[name]
    assert {f.name for f in fields(system.config)} == set(told)
    before = traits(system)
    for option, value in told.items():
        assert getattr(system.config, option) != value, option
        assert traits(build(name, **{option: value})) != before, option


@dataclass
class Traits:
    shapes: dict
    said: list
    cost: dict
    made: list

    def __eq__(self, other):
        return (self.shapes, self.cost) == (other.shapes, other.cost) and all(
            len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b))
            for a, b in ((self.said, other.said), (self.made, other.made))
        )


def traits(system) -> Traits:
    size = (system.config.height, system.config.width)
    frames = drive(system.config.frames, every=0.5, height=size[0], width=size[1])
    torch.manual_seed(0)
    with torch.no_grad():
        output, _ = system(Clip.of(frames[::-1]), None)
        cost = system.loss(output, truth_of(system.config))
        torch.manual_seed(0)
        learning, _ = system.train()(Clip.of(frames[::-1]), None)
        (made,) = system.eval().decode(output)
    shapes = {n: tuple(t.shape) for n, t in system.state_dict().items()}
    costs = {term: value.item() for term, value in cost.items()}
    return Traits(shapes, [*tensors(output), *tensors(learning)], costs, [made.labels, made.score])


@EACH
def test_predictions_carry_the_name_tables_of_the_config(name):
    system = build(name, classes=OPENOCC.table)
    (prediction,) = system.decode(run(system, drive(1, every=0.5))[0][0])
    assert prediction.classes is OPENOCC and prediction.grid == GRID
    assert isinstance(Model(system, name, True, "fast", None).device, torch.device)


ASKING = {"opus-v2", "opus-fusion"}  # how many voxels there are


@pytest.mark.parametrize("name", sorted(SYSTEMS.keys() - ASKING))
def test_a_gpu_is_waited_for_once_before_voxels_are_made(name, monkeypatch):
    monkeypatch.setattr(gpu, "_launches", lambda _: False)  # there is none: definitions run
    system, told = on_gpu(build(name)), []
    decode = system.decode
    monkeypatch.setattr(system, "decode", lambda output: told.append(dict(bus.waits)) or decode(output))
    stream = Stream(Model(system, name, False, "fast", None))
    for frame in drive(2, every=0.5):
        with Bus() as bus:
            stream.step(frame)
    assert told == [{"a number": 1}] * 2, "whether all is finite"


@EACH
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")], ids=["NaN", "infinite"])
def test_features_that_are_not_finite_are_an_error_whatever_is_made_of_them(name, wrong):
    """Never a place that does not exist: on a GPU that ends the process."""
    system, frames = build(name), drive(3, every=0.5)
    stream = Stream(Model(system, f"{name}-nano", False, "fast", None))
    stream.step(frames[0])
    spoilt = system.neck.register_forward_hook(lambda _, __, levels: type(levels)(level * wrong for level in levels))
    with spoilt, pytest.raises(FloatingPointError, match="not finite"):
        stream.step(frames[1])
    assert stream.memory is None
    stream.step(frames[2])


@pytest.mark.parametrize("name", ["opus", "opus-fusion"])
def test_where_it_does_not_learn_only_the_last_layer_is_named_and_says_the_same(name):
    system, clip = build(name), Clip.of(drive(1, every=0.5)[0])
    learning = system(clip, None)[0]
    with torch.no_grad():
        told = system(clip, None)[0]
        assert len(learning.logits) == len(told.points) == 3 and len(told.logits) == len(told.flow) == 1
        assert apart(told.points, learning.points) < CLOSE
        assert apart((told.logits, told.flow), (learning.logits[-1:], learning.flow[-1:])) < CLOSE
