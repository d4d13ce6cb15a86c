"""A GPU that is not there: tensors say that they are on one, while their numbers lie on the CPU. So what is sent to a
GPU and what the host must wait for can be counted, and what it would compute can be compared, on any machine."""

from collections import Counter
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
aten = torch.ops.aten
# What a host cannot go on from before a GPU told it a number or how many there are
ASKS = {
    name: [getattr(op, overload) for overload in op.overloads()] if hasattr(op, "overloads") else [op]
    for name, op in {
        "a number": aten._local_scalar_dense,
        "nonzero": aten.nonzero,
        "masked_select": aten.masked_select,
        "unique": aten._unique2,
        "unique_consecutive": aten.unique_consecutive,
        "unique_dim": aten.unique_dim,
        "equal": aten.equal,
        "repeat_interleave": aten.repeat_interleave,
        "bincount": aten.bincount,
        "where": aten.where.default,
        "argwhere": aten.argwhere,
        "inv": aten.linalg_inv,  # whether there is one
    }.items()
}
ASKS = {op: name for name, ops in ASKS.items() for op in ops}
OWN = {
    Tensor.copy_: aten.copy_.default,
    Tensor.contiguous: aten.contiguous.default,
    Tensor.__invert__: aten.bitwise_not.default,
    Tensor.nonzero: aten.nonzero.default,
}
# What inference mode leaves whole, though whether it goes across is told by what it is made of
MADE = {getattr(op, overload) for op in (aten.to, aten.item, aten.is_nonzero) for overload in op.overloads()}


class Far(Tensor):
    """A tensor on the GPU that is not there."""

    near: Tensor  # its numbers

    @staticmethod
    def __new__(cls, near: Tensor) -> "Far":
        shape, layout = near.shape, {"strides": near.stride(), "storage_offset": near.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, shape, **layout, dtype=near.dtype, device=GPU, requires_grad=False)
        made.near = near
        return made

    def __repr__(self):
        return f"Far({self.near})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        bus, kwargs = Bus.open[-1] if Bus.open else None, kwargs or {}
        # these of PyTorch's own would look for the GPU
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            return bus.indexed(func, *args)
        if func is Tensor.new_tensor:
            return bus.told(*args[1:], **{"dtype": args[0].dtype} | kwargs)
        if func is Tensor.tolist:
            bus.waits["read"] += 1
            return args[0].near.tolist()
        if func in OWN:
            return bus.__torch_dispatch__(OWN[func], types, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of `Bus`")


class Bus(TorchDispatchMode):
    """Between the host and the GPU that is not there: computes for both, and keeps what goes across.

    sent: type and bytes of each tensor that went to the GPU. waits: what the host waited for, and how often: `ASKS`,
    "read" for tensors that came back, "sent" for those that were not fetched from pinned memory.
    """

    open: ClassVar[list["Bus"]] = []

    def __init__(self):
        super().__init__()
        self.sent: list[tuple[torch.dtype, int]] = []
        self.waits: Counter[str] = Counter()
        self._depth = 0
        self._pinned: dict[int, Tensor] = {}  # by the address of its memory, which is kept

    def __enter__(self) -> "Bus":
        if not self._depth:  # as PyTorch's fake tensors do on a machine without a GPU
            torch._C._set_only_lift_cpu_tensors(True)
            torch._C._ensureCUDADeviceGuardSet()
            torch.cuda._tls.is_initializing = True  # else `to` would look for the GPU
            self.open.append(self)
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *problem) -> None:
        super().__exit__(*problem)
        self._depth -= 1
        if not self._depth:
            self.open.remove(self)
            del torch.cuda._tls.is_initializing
            torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is aten.is_pinned.default:
            return not isinstance(args[0], Far) and self._address(args[0]) in self._pinned
        if func in MADE:
            with self:
                return func.decompose(*args, **kwargs)

        tensors = flat((args, kwargs))
        far = any(isinstance(tensor, Far) for tensor in tensors)
        device = kwargs.get("device")
        if device is not None:
            device, kwargs["device"] = torch.device(device), torch.device("cpu")
        goes = far if device is None else device.type == "cuda"
        pinned = kwargs.get("pin_memory") and not goes
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        self._count(func, args, kwargs, far, goes)

        if func in (aten._fused_sdp_choice.default,):
            return 0  # attention as it is defined: what a GPU has for it, this machine has not
        near = {id(t): t.near for t in tensors if isinstance(t, Far)}
        args, kwargs = tree_map_only(Far, lambda t: near[id(t)], (args, kwargs))
        made = func(*args, **kwargs)
        if pinned:
            return self._pin(made)
        if not goes:
            return made
        same = {id(t.near): t for t in tensors if isinstance(t, Far)}  # what was changed in place
        return tree_map_only(Tensor, lambda t: same[id(t)] if id(t) in same else Far(t), made)

    def _count(self, func, args, kwargs, far: bool, goes: bool) -> None:
        if func is aten._to_copy.default and far != goes:
            if goes:
                self._send(args[0], kwargs.get("non_blocking", False))
            else:
                self.waits["read"] += 1
        elif func is aten.copy_.default and isinstance(args[0], Far) != isinstance(args[1], Far):
            if far and isinstance(args[0], Far):
                self._send(args[1], len(args) > 2 and args[2])
            else:
                self.waits["read"] += 1
        elif far and func in ASKS:
            self.waits[ASKS[func]] += 1
        elif far and goes:
            # numbers on the host may stand beside tensors on a GPU; whole tensors may not
            lone = [t for t in flat(args) if not isinstance(t, Far) and t.ndim]
            assert not lone or func is aten._to_copy.default, f"{func}: tensors of the host and of the GPU"

    def told(self, values, dtype) -> Far:
        """`new_tensor`."""
        made = torch.tensor(values, dtype=dtype)
        self._send(made, False)
        return Far(made)

    def indexed(self, func, *args):
        """x[index], or x[index] = value."""
        tensor, index, *value = args
        assert isinstance(tensor, Far), "a tensor of the host is not indexed by one of the GPU"
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, Far) and part.dtype in (torch.bool, torch.uint8):
                self.waits["a mask"] += 1
            elif isinstance(part, Far) and not part.ndim:
                self.waits["a number"] += 1
            elif isinstance(part, (list, Tensor)) and not isinstance(part, Far):
                self._send(torch.as_tensor(part), False)
        for part in flat(value):
            if part.ndim and not isinstance(part, Far):
                self._send(part, False)
        made = func(tensor.near, *tree_map_only(Far, lambda t: t.near, args[1:]))
        return None if made is None else Far(made)

    def _send(self, tensor: Tensor, non_blocking: bool) -> None:
        self.sent.append((tensor.dtype, tensor.numel() * tensor.element_size()))
        if not (non_blocking and self._address(tensor) in self._pinned):
            self.waits["sent"] += 1

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned[self._address(tensor)] = tensor
        return tensor

    @staticmethod
    def _address(tensor: Tensor) -> int:
        return 0 if isinstance(tensor, Far) else tensor.untyped_storage().data_ptr()


def flat(value) -> list[Tensor]:
    tensors: list[Tensor] = []
    tree_map_only(Tensor, tensors.append, value)
    return tensors


@torch.inference_mode()
def on_gpu(system: torch.nn.Module) -> torch.nn.Module:
    """The same network with its weights on the GPU that is not there. It is changed."""
    for module in system.modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is not None:
                    kind[name] = Far(tensor.detach())
    return system
