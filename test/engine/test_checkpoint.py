"""What a system remembers goes to disk and comes back; nothing else than what it names is ever made."""

import json
from dataclasses import dataclass

import pytest
import torch
from engine import tiny

from occflow_core.engine import checkpoint
from occflow_core.engine.checkpoint import flatten, memory_type, unflatten
from occflow_core.engine.distributed import Processes
from occflow_core.geometry import Cameras
from occflow_core.systems import SYSTEMS

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)


def remembered() -> tiny.Memory:
    def entry(k):
        eye = torch.eye(4, dtype=torch.float64)
        cameras = Cameras(torch.eye(3).expand(2, 3, 3), eye.expand(2, 4, 4), 16, 32)
        return tiny.Entry(torch.full((4,), float(k)).bfloat16(), cameras, 0.1 * k)

    return tiny.Memory(((entry(1), entry(2)), (), (entry(3),)))


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "__dataclass_fields__"):
        return type(one) is type(other) and all(same(getattr(one, n), getattr(other, n)) for n in vars(one))
    return type(one) is type(other) and one == other


def test_there_and_back_is_the_same_memory(tmp_path):
    memory, tensors = remembered(), {}
    told = flatten(memory, tensors)
    checkpoint.write(tmp_path, 3, {}, {}, {"memory": told}, tensors, 2, ALONE)
    about, found = checkpoint.read(tmp_path / "step-00000003" / "process-0")
    again = unflatten(about["memory"], memory_type(tiny.Tiny), found, CPU)
    assert same(again, memory) and not same(again, tiny.Memory(memory.lanes[:2]))
    assert unflatten(json.loads(json.dumps(flatten(None, {}))), memory_type(tiny.Tiny), {}, CPU) is None


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_names_the_type_of_its_memory(name):
    hint = memory_type(SYSTEMS[name])
    assert type(None) in hint.__args__ and all(isinstance(kind, type) for kind in hint.__args__)


@dataclass(frozen=True)
class Other:
    lanes: tuple[int, ...]


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told | {"dataclass": "Other"},
        lambda told: told | {"fields": {}},
        lambda told: told | {"fields": {"lanes": {"tensor": "none"}}},
        lambda told: {"tuple": []},
        lambda told: told | {"fields": {"lanes": {"tuple": [{"dataclass": "Path", "fields": {}}]}}},
    ],
)
def test_a_memory_of_another_kind_is_refused(change):
    tensors = {}
    told = change(flatten(remembered(), tensors))
    with pytest.raises(ValueError, match="a memory of .* cannot be made of"):
        unflatten(told, memory_type(tiny.Tiny), tensors, CPU)


def test_a_memory_that_cannot_be_written_says_where():
    with pytest.raises(TypeError, match=r"memory.lanes.1: .* got dict"):
        flatten(tiny.Memory(((), {})), {})


def test_the_newest_stay_and_leftovers_go(tmp_path):
    (tmp_path / ".step-00000002.part").mkdir()
    for step in (1, 5, 10, 100_000_000):
        checkpoint.write(tmp_path, step, {}, {"x": torch.ones(2)}, {}, {}, 2, ALONE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-100000000"]
    assert checkpoint.newest(tmp_path).name == "step-100000000"
    assert checkpoint.newest(tmp_path / "nowhere") is None


def test_tensors_may_share_memory_and_keep_their_types(tmp_path):
    base = torch.arange(6.0)
    given = {"a": base[:4], "b": base[2:], "c": torch.tensor(3), "d": base.bfloat16().view(2, 3).mT, "e": base > 2}
    checkpoint.write(tmp_path, 1, {}, given, {}, {}, 1, ALONE)
    _, found = checkpoint.read(tmp_path / "step-00000001" / "state")
    assert found.keys() == given.keys() and all(same(found[name], given[name]) for name in given)


def test_what_is_read_gives_the_same_sums_as_what_was_written(tmp_path):
    """Vector units add in another order where numbers lie at other places of a cache line."""
    given = {f"x{k}": torch.randn(k, 24) for k in (1, 3, 5, 1000)}
    checkpoint.write(tmp_path, 1, {}, given | {"odd": torch.ones(3, dtype=torch.bool)}, {}, {}, 1, ALONE)
    _, found = checkpoint.read(tmp_path / "step-00000001" / "state")
    assert [t.data_ptr() % 64 for t in found.values()] == [0] * len(found)
    other = torch.randn(1000, 24)
    assert torch.equal(
        torch.stack([a @ b for a, b in zip(found["x1000"], other)]),
        torch.stack([a @ b for a, b in zip(given["x1000"], other)]),
    )
