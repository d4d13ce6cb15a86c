"""AdamW with rates by part, its schedule, mixed precision, and the moving average of the weights."""

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import fields, is_dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from .run import Optimise

_KINDS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Optimiser:
    """What happens between a loss and new weights."""

    def __init__(self, system: nn.Module, settings: Optimise, steps: int, device: torch.device):
        """steps: of the whole run, for the schedule. ValueError for a pattern that fits no parameter."""
        self.system, self.settings, self.steps, self.device = system, settings, steps, device
        groups = parts(system, settings)
        self.rates = [group.pop("rate") for group in groups]
        # fused: one pass over memory; the sums are the same in every run
        self.adam = torch.optim.AdamW(groups, lr=settings.rate, betas=settings.betas, fused=True)
        scaled = settings.precision == "fp16" and device.type == "cuda"
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)

    def precision(self):
        """The context in which the network runs."""
        kind = _KINDS[self.settings.precision]
        return nullcontext() if kind is None else torch.autocast(self.device.type, kind)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss / self.settings.accumulate).backward()

    def step(self, step: int) -> float:
        """New weights from the gradients, which are gone afterwards. Returns the gradient's length before clipping.

        FloatingPointError, with the weights as they were, for a gradient that is not finite; with fp16 that step is
        left out instead, and the loss is scaled less from then on.
        """
        for group, rate in zip(self.adam.param_groups, self.rates):
            group["lr"] = rate * factor(step, self.steps, self.settings)
        self.scaler.unscale_(self.adam)
        length = nn.utils.clip_grad_norm_(self.system.parameters(), self.settings.clip)
        if not self.scaler.is_enabled() and not torch.isfinite(length):
            bad = [n for n, p in self.system.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            raise FloatingPointError(f"step {step}: the gradient is not finite in {', '.join(bad[:5])}")
        self.scaler.step(self.adam)
        self.scaler.update()
        self.adam.zero_grad(set_to_none=True)
        return float(length)

    def moments(self) -> dict[str, Tensor]:
        """Adam's state by the names of the parameters; zeros for those that had no gradient yet."""
        named = {}
        for name, p in self.system.named_parameters():
            none = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            state = self.adam.state.get(p, none)
            named |= {f"{name}/{key}": state[key].detach() for key in none}
        return named

    def fill(self, moments: Mapping[str, Tensor]) -> None:
        """The other way."""
        for name, p in self.system.named_parameters():
            keys = ("step", "exp_avg", "exp_avg_sq")
            self.adam.state[p] = {key: moments[f"{name}/{key}"].to(p.device) for key in keys}


def parts(system: nn.Module, settings: Optimise) -> list[dict[str, Any]]:
    """Parameter groups of equal rate and decay; `rate` is the highest that the group ever has."""
    unused = {pattern for pattern, _ in settings.rates} | set(settings.no_decay)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in system.named_parameters():
        matching = [(pattern, by) for pattern, by in settings.rates if fnmatchcase(name, pattern)]
        spared = [pattern for pattern in settings.no_decay if fnmatchcase(name, pattern)]
        unused -= {pattern for pattern, _ in matching} | set(spared)
        key = settings.rate * (matching[0][1] if matching else 1.0), 0.0 if spared else settings.decay
        groups.setdefault(key, []).append(parameter)
    if unused:
        names = ", ".join(sorted({name.split(".")[0] for name, _ in system.named_parameters()}))
        raise ValueError(f"optimise: no parameter fits {', '.join(map(repr, sorted(unused)))}; they begin with {names}")
    return [{"params": made, "rate": rate, "weight_decay": decay} for (rate, decay), made in groups.items()]


def factor(step: int, steps: int, settings: Optimise) -> float:
    """Share of the highest rate at a step: a cosine down to `floor`, and the linear warm-up as a factor on it."""
    cosine = settings.floor + (1 - settings.floor) * (1 + math.cos(math.pi * step / steps)) / 2
    warm = 1.0
    if step < settings.warm_up:
        warm = settings.warm_from + (1 - settings.warm_from) * step / settings.warm_up
    return cosine * warm


class Average:
    """The exponential moving average of a system's weights; its batch norms' statistics are as they are now.

    Early on the average is shorter, min(decay, (1 + n) / (10 + n)) after n steps: it forgets the random beginning.
    """

    def __init__(self, system: nn.Module, decay: float):
        self.decay, self.count = decay, 0
        self.weights = {name: p.detach().clone() for name, p in system.named_parameters()}

    @torch.no_grad()
    def update(self, system: nn.Module) -> None:
        keep = min(self.decay, (1 + self.count) / (10 + self.count))
        self.count += 1
        for name, p in system.named_parameters():
            self.weights[name].lerp_(p, 1 - keep)

    def fill(self, weights: Mapping[str, Tensor], count: int) -> None:
        """Go on from averages that were saved after `count` updates."""
        self.count = count
        for name, mean in self.weights.items():
            mean.copy_(weights[name])

    def state(self, system: nn.Module) -> dict[str, Tensor]:
        """A whole state_dict: averaged parameters, buffers of now."""
        return {**system.state_dict(), **self.weights}


def as_float32(value: Any) -> Any:
    """A system's output with its floating-point tensors in float32: losses are computed in it."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if is_dataclass(value):
        return replace(value, **{f.name: as_float32(getattr(value, f.name)) for f in fields(value) if f.init})
    return type(value)(as_float32(part) for part in value) if isinstance(value, tuple | list) else value


def still(system: nn.Module, frozen: Iterable[type] = (nn.modules.batchnorm._BatchNorm,)) -> None:
    """Batch norms that neither look at the batch nor learn from it what is usual."""
    for module in system.modules():
        if isinstance(module, tuple(frozen)):
            module.eval()
