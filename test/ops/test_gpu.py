"""Whether kernels are launched, on any machine."""

import sys
import warnings
from functools import cache

import pytest
import torch
from ops.interpreter import needs_triton

from occflow_core import ops
from occflow_core.ops import gpu

CUDA = torch.device("cuda")


@pytest.fixture
def launches(monkeypatch):
    """As on the first call: what an earlier test learned is forgotten."""
    monkeypatch.setattr(gpu, "_launches", gpu._launches.__wrapped__)


def test_kernels_serve_gpus_alone(monkeypatch):
    monkeypatch.setattr(gpu, "_launches", lambda _: True)
    assert [gpu.serves(torch.device(kind)) for kind in ("cuda", "cpu", "meta")] == [True, False, False]


def test_a_program_that_is_exported_is_made_of_definitions(monkeypatch):
    monkeypatch.setattr(gpu, "_launches", lambda _: True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not gpu.serves(CUDA)


def test_without_triton_a_gpu_runs_the_definitions_and_nothing_is_said(monkeypatch, launches):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "occflow_core.ops.probe_triton", raising=False)
    monkeypatch.delattr(ops, "probe_triton", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not gpu.serves(CUDA)


@needs_triton
def test_a_gpu_on_which_nothing_can_be_launched_runs_the_definitions_and_says_why(monkeypatch, launches):
    from occflow_core.ops import probe_triton

    def fails(_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(probe_triton, "launch", fails)
    with pytest.warns(UserWarning, match="on cuda:1 .*Failed to find C compiler.*apt install gcc python3-dev"):
        assert not gpu.serves(torch.device("cuda:1"))


@needs_triton
def test_each_gpu_is_tried_itself_once_and_again_where_its_memory_was_full(monkeypatch, launches):
    from occflow_core.ops import probe_triton

    monkeypatch.setattr(gpu, "_launches", cache(gpu._launches))
    tried, full = [], {"cuda:1"}

    def launch(device):
        tried.append(str(device))
        if str(device) in full:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(probe_triton, "launch", launch)
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    assert gpu.serves(first) and gpu.serves(first)
    with pytest.raises(torch.OutOfMemoryError):
        gpu.serves(second)
    full.clear()
    assert gpu.serves(second) and gpu.serves(second)
    assert tried == ["cuda:0", "cuda:1", "cuda:1"]
