"""Rates, schedule, precision, averages: against closed forms."""

import math
from dataclasses import replace

import pytest
import torch
from engine import tiny
from torch import nn

from occflow_core.engine.fit import fit
from occflow_core.engine.optimise import Average, Optimiser, as_float32, factor, parts, still
from occflow_core.engine.run import Optimise
from occflow_core.engine.train import _keep_no_activations
from occflow_core.types import Clip

CPU = torch.device("cpu")


def test_the_rate_rises_linearly_then_falls_as_a_cosine():
    settings = Optimise(warm_up=10, warm_from=0.25, floor=0.1)
    assert factor(0, 100, settings) == pytest.approx(0.25)
    assert factor(5, 100, settings) == pytest.approx((0.25 + 0.75 / 2) * (0.1 + 0.9 * (1 + math.cos(math.pi / 20)) / 2))
    assert factor(50, 100, settings) == pytest.approx(0.1 + 0.9 / 2)
    assert factor(99, 100, settings) == pytest.approx(0.1, rel=1e-2)
    assert [factor(k, 100, settings) for k in range(10, 100)] == sorted(
        (factor(k, 100, settings) for k in range(10, 100)), reverse=True
    )
    assert factor(0, 100, replace(settings, warm_up=0)) == 1


def test_parts_have_rates_and_decay_of_their_own_and_the_first_pattern_counts():
    system = tiny.Tiny(tiny.Config())
    settings = Optimise(rate=1.0, rates=(("backbone.0.*", 0.1), ("backbone.*", 0.5)), decay=0.3, no_decay=("*.bias",))
    found = {}
    for group in parts(system, settings):
        for parameter in group["params"]:
            (name,) = [name for name, p in system.named_parameters() if p is parameter]
            found[name] = group["rate"], group["weight_decay"]
    assert found == {
        "backbone.0.weight": (0.1, 0.3),
        "backbone.0.bias": (0.1, 0.0),
        "backbone.1.weight": (0.5, 0.3),
        "backbone.1.bias": (0.5, 0.0),
        "head.0.weight": (1.0, 0.3),
        "head.0.bias": (1.0, 0.0),
        "head.2.weight": (1.0, 0.3),
        "head.2.bias": (1.0, 0.0),
    }


@pytest.mark.parametrize("settings", [{"rates": (("backbon.*", 0.1),)}, {"no_decay": ("backbon.*",)}])
def test_a_pattern_that_fits_nothing_is_named(settings):
    with pytest.raises(ValueError, match=r"no parameter fits 'backbon\.\*'; they begin with backbone, head"):
        parts(tiny.Tiny(tiny.Config()), Optimise(**settings))


class Line(nn.Module):
    """y = w x, and the batches of its training are numbers."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([2.0, -1.0]))

    def forward(self, x, memory):
        return self.w * x, None

    def loss(self, output, truth):
        return {"wrong": (output - truth).square().mean()}


def gradients(numbers, **settings):
    """Adam's first moment after one step, over 1 - beta: the gradient that it was given."""
    system = Line()
    optimiser = Optimiser(system, Optimise(**{"clip": 1e9, **settings}), 10, CPU)
    steps = []
    fit(system, system, iter(numbers), lambda n, x, y: (x, y), optimiser, 1, after_step=steps.append)
    return optimiser.moments()["w/exp_avg"] / 0.1, steps[0]


def test_a_step_is_adams_with_the_rate_of_the_schedule():
    system, settings = Line(), Optimise(rate=0.1, decay=0.2, warm_up=3, clip=1e9)
    optimiser, twin = Optimiser(system, settings, 5, CPU), Line()
    adam = torch.optim.AdamW(twin.parameters(), lr=0.1, weight_decay=0.2)
    x, y = torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.5])
    fit(system, system, iter([(x, y)] * 5), lambda n, x, y: (x, y), optimiser, 5)
    for step in range(5):
        adam.param_groups[0]["lr"] = 0.1 * factor(step, 5, settings)
        adam.zero_grad()
        twin.loss(twin(x, None)[0], y)["wrong"].backward()
        adam.step()
    assert torch.allclose(system.w, twin.w, atol=1e-7) and not torch.allclose(system.w, Line().w, atol=0.1)


def test_accumulated_batches_have_the_gradient_of_one_that_holds_them_all():
    x, y = torch.tensor([[1.0, 3.0], [2.0, -1.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    whole, _ = gradients([(x, y)])
    halves, step = gradients([(x[0], y[0]), (x[1], y[1])], accumulate=2)
    assert torch.allclose(whole, halves, atol=1e-6)
    assert step.terms["wrong"] == pytest.approx(Line().loss(Line()(x, None)[0], y)["wrong"].item())


def test_a_gradient_longer_than_allowed_is_cut_to_that_length_and_told_as_it_was():
    x, y = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0])
    free, step = gradients([(x, y)])
    cut, told = gradients([(x, y)], clip=0.5)
    assert step.gradient == told.gradient == pytest.approx(float(free.norm()))
    assert torch.allclose(cut, free / free.norm() * 0.5, atol=1e-5)


def test_a_gradient_that_is_not_finite_stops_and_names_the_parameter():
    x = torch.tensor([1.0, 3.0])

    class Root(Line):
        def forward(self, x, memory):
            return (self.w[:1] - 2).sqrt() * x, None  # finite, its slope is not

    system = Root()
    optimiser = Optimiser(system, Optimise(), 1, CPU)
    with pytest.raises(FloatingPointError, match="step 0: the gradient is not finite in w"):
        fit(system, system, iter([(x, x)]), lambda n, x, y: (x, y), optimiser, 1)
    assert torch.equal(system.w, Line().w)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_network_runs_in_half_precision_and_its_loss_in_float32(precision):
    seen = {}

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x, memory):
            y = self.inner(x)
            seen["network"] = y.dtype
            return y, None

        def loss(self, output, truth):
            seen["loss"] = output.dtype
            return {"size": output.square().mean()}

    system = Half()
    optimiser = Optimiser(system, Optimise(precision=precision), 1, CPU)
    x = torch.randn(2, 4)
    fit(system, system, iter([(x, x)]), lambda n, x, y: (x, y), optimiser, 1)
    assert seen == {"network": {"bf16": torch.bfloat16, "fp16": torch.float16}[precision], "loss": torch.float32}
    assert system.inner.weight.dtype == torch.float32


def test_outputs_become_float32_whatever_they_are_made_of():
    entry = tiny.Entry(torch.ones(2, dtype=torch.bfloat16), (torch.ones(1, dtype=torch.int64), None), 2.0)
    made = as_float32((entry, [torch.ones(1, dtype=torch.float16)]))
    assert made[0].features.dtype == torch.float32 and made[1][0].dtype == torch.float32
    assert made[0].cameras[0].dtype == torch.int64 and made[0].age == 2.0


def test_the_average_is_the_sum_it_should_be():
    system = nn.Linear(1, 1, bias=False)
    values = [3.0, -1.0, 4.0, 1.0, 5.0]
    with torch.no_grad():
        system.weight.fill_(values[0])
        average, mean = Average(system, 0.3), values[0]
        for n, value in enumerate(values[1:]):
            system.weight.fill_(value)
            average.update(system)
            keep = min(0.3, (1 + n) / (10 + n))
            mean = keep * mean + (1 - keep) * value
            assert float(average.state(system)["weight"]) == pytest.approx(mean)
    assert system.weight.item() == 5.0


def test_the_average_keeps_the_batch_norms_of_now():
    system = nn.BatchNorm1d(2)
    average = Average(system, 0.9)
    system(torch.randn(8, 2))
    average.update(system)
    state = average.state(system)
    assert state.keys() == system.state_dict().keys()
    assert torch.equal(state["running_mean"], system.running_mean) and int(state["num_batches_tracked"]) == 1


def clip(batch=2) -> Clip:
    from systems import rig

    frames = [rig.frame(height=16, width=32, n=2, seed=s) for s in range(batch)]
    return Clip.batch([Clip.of(frame) for frame in frames])


def test_frozen_norms_keep_their_statistics_and_learn_their_scale():
    system = tiny.Tiny(tiny.Config()).train()
    still(system)
    before = system.backbone[1].running_mean.clone()
    system(clip(), None)[0].sum().backward()
    assert torch.equal(system.backbone[1].running_mean, before) and system.backbone[1].weight.grad.abs().sum() > 0


class _Kept:
    """Counts what autograd keeps."""

    numbers = 0

    def __call__(self, tensor):
        self.numbers += tensor.numel()
        return tensor


def test_activations_computed_twice_change_neither_gradients_nor_statistics():
    results = []
    for names in ((), ("backbone",), ("backbone.0", "backbone.1", "head")):
        torch.manual_seed(0)
        system = tiny.Tiny(tiny.Config()).train()
        for name in names:
            _keep_no_activations(system, name)
        torch.manual_seed(1)
        kept = _Kept()
        with torch.autograd.graph.saved_tensors_hooks(kept, lambda t: t):
            output, _ = system(clip(), None)
        output.square().mean().backward()
        results.append((kept.numbers, {n: p.grad for n, p in system.named_parameters()}, system.state_dict()))
    (kept, gradients, state), *others = results
    assert int(state["backbone.1.num_batches_tracked"]) == 1
    for fewer, g, s in others:
        assert all(torch.equal(g[name], gradients[name]) for name in gradients)
        assert s.keys() == state.keys() and all(torch.equal(s[name], state[name]) for name in state)
        assert fewer < kept
