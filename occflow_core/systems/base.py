"""What a system is, and how foreign weights get into one."""

import re
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..geometry import Grid
from ..types import Clip, Occupancy, Prediction


class System(Protocol):
    """The contract: nothing to inherit.

    A class of systems also has PRESETS (name -> config), NAMES (the authors' parameter names -> ours, see `translate`)
    and `constants()` (the authors' buffers that must equal what our config says, by their names). It may have
    `adapted(config, tensors)` (the config for an authors' checkpoint whose kind its names tell) and `grown(config)` (a
    system of more frames that goes on from this one).
    """

    # its own frozen Config: height and width (pixels) of its pictures, grid, classes, as_published; sweeps: how many
    # LiDAR scans `clip.points` must hold, the newest and those before it (0: no LiDAR file is touched for the system);
    # panoptic: whether `truth.instances` is wanted by `loss`, and `decode` fills `Prediction.instances`
    config: Any

    def __call__(self, clip: Clip, memory: Any | None) -> tuple[Any, Any]:
        """(output, memory). Memory is the system's own frozen value, detached; None before the first clip."""

    def loss(self, output: Any, truth: Occupancy) -> dict[str, Tensor]:
        """Named scalar terms, already weighted, to be added up. `truth` has one lane a lane of the output.

        What they are divided by is counted over all processes of a training (`nn.losses.mean_over_processes`).
        """

    def decode(self, output: Any) -> list[Prediction]:
        """One prediction a lane."""


def seeded(system: nn.Module, seed: int) -> nn.Module:
    """The system with new random weights, the same for the same seed; for demonstrations without trained weights.

    `system.initialise(prior=0.3)` then lets every class be so likely that an untrained network says something here and
    there, neither nothing nor everywhere.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in system.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        system.initialise(prior=0.3)
    return system


def translate(name: str, table: Mapping[str, str | None]) -> tuple[bool, str | None]:
    """(is it in the table?, our name; None = known and dropped).

    In a key of the table `#` stands for one number and a last `.` for everything that follows; both travel into the
    value in order: {"neck.convs.#.conv.": "neck.output.#."} takes neck.convs.2.conv.bias to neck.output.2.bias.
    """
    for theirs, ours in table.items():
        found = re.fullmatch(_pattern(theirs), name)
        if found:
            if ours is None:
                return True, None
            for part in found.groups():
                ours = ours.replace("#", part, 1) if "#" in ours else ours + part
            return True, ours
    return False, None


_LAYER = "pts_bbox_head.transformer.decoder.decoder_layers.#."
# What the published OPUS checkpoints (V1, V2, Fusion) name alike -> ours
OPUS_NAMES = {
    "img_backbone.": "backbone.",
    "img_neck.lateral_convs.#.conv.": "neck.lateral.#.",
    "img_neck.fpn_convs.#.conv.": "neck.output.#.",
    "pts_bbox_head.pc_range": None,  # these four must equal `opus_constants`
    "pts_bbox_head.scene_size": None,
    "pts_bbox_head.voxel_size": None,
    "pts_bbox_head.voxel_num": None,
    _LAYER + "position_encoder.": "layers.#.position.",
    _LAYER + "self_attn.attention.attn.in_proj_weight": "layers.#.attention.taken.weight",
    _LAYER + "self_attn.attention.attn.in_proj_bias": "layers.#.attention.taken.bias",
    _LAYER + "self_attn.attention.attn.out_proj.": "layers.#.attention.out.",
    _LAYER + "self_attn.gen_tau.": "layers.#.attention.reach.",
    _LAYER + "sampling.sampling_offset.": "layers.#.sampling.offset.",
    _LAYER + "sampling.scale_weights.": "layers.#.sampling.levels.",
    _LAYER + "ffn.layers.0.0.": "layers.#.feed.0.",
    _LAYER + "ffn.layers.1.": "layers.#.feed.3.",
    _LAYER + "norm#.": "layers.#.norm#.",
    _LAYER + "reg_branch.": "layers.#.move.",
}


def opus_constants(grid: Grid) -> dict[str, Tensor]:
    """The buffers of the published OPUS checkpoints that say which grid their weights are for."""
    return {
        "pts_bbox_head.pc_range": torch.tensor((*grid.low, *grid.high)),
        "pts_bbox_head.scene_size": torch.tensor(grid.size),
        "pts_bbox_head.voxel_size": torch.tensor(grid.voxel),
        "pts_bbox_head.voxel_num": torch.tensor(grid.shape),
    }


def _pattern(key: str) -> str:
    pattern = re.escape(key).replace(re.escape("#"), r"(\d+)")
    return pattern + "(.+)" if key.endswith(".") else pattern


def load_strictly(
    system: nn.Module,
    tensors: Mapping[str, Tensor],
    names: Mapping[str, str | None] | None = None,
    constants: Mapping[str, Tensor] | None = None,
) -> None:
    """Fill the system, in place, from tensors under other names; all of it or nothing.

    names: see `translate`; None where the names are ours. constants: tensors of theirs that are dropped but must equal
    these. ValueError that lists everything unexplained on either side.
    """
    ours, found, wrong = system.state_dict(), {}, []
    for name, tensor in tensors.items():
        known, target = (True, name) if names is None else translate(name, names)
        if not known or (target is not None and target not in ours):
            wrong.append(f"not in the name table: {name}" if not known else f"not a tensor of this system: {name}")
        elif target is None:
            expected = (constants or {}).get(name)
            if expected is not None and not _equal(tensor, expected):
                wrong.append(f"differs: {name}: theirs {_brief(tensor)}, ours {_brief(expected)}")
        elif tuple(tensor.shape) != tuple(ours[target].shape):
            wrong.append(f"shape: {name}: theirs {tuple(tensor.shape)}, ours {tuple(ours[target].shape)}")
            found[target] = None
        elif target in found:
            wrong.append(f"twice: {name} also becomes {target}")
        else:
            found[target] = tensor
    wrong += [f"missing here: {name}" for name in ours if name not in found]
    if wrong:
        raise ValueError("checkpoint does not fit:\n  " + "\n  ".join(wrong))
    system.load_state_dict(found)


def _equal(theirs: Tensor, ours: Tensor) -> bool:
    return theirs.shape == ours.shape and torch.allclose(theirs.double(), ours.double(), rtol=0, atol=1e-5)


def _brief(tensor: Tensor) -> str:
    return "(" + ", ".join(f"{value:g}" for value in tensor.flatten().tolist()) + ")"
