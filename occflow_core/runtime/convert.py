"""The authors' checkpoint -> a file of ours."""

from pathlib import Path

import torch

from ..systems import SYSTEMS
from ..systems.base import load_strictly
from .load import parse, save


def convert(model: str, authors_file: Path | str, out: Path | str) -> None:
    """Write weights that `load(model, out)` takes, from a checkpoint as mmcv or torch saved it.

    ValueError, and no file, when the model is one of ours, the file is missing, holds more than numbers (nothing in it
    is ever run), or does not fit; every tensor on either side that is not explained is listed.
    """
    system, preset = parse(model)
    made = SYSTEMS[system]
    config = made.PRESETS[preset]
    if not config.as_published:
        raise ValueError(f"convert: {model} is a model of ours, there is no authors' checkpoint of it")
    if not Path(authors_file).is_file():
        raise ValueError(f"convert: there is no file {authors_file}")
    try:
        content = torch.load(authors_file, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle of unknown origin may fail in any way
        first = str(error).strip().split("\n")[0]
        raise ValueError(f"convert: {authors_file} is not a checkpoint of plain tensors: {first}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {str(name).removeprefix("module."): t for name, t in state.items() if isinstance(t, torch.Tensor)}
    if not tensors:
        raise ValueError(f"convert: {authors_file} holds no tensors by name")
    if hasattr(made, "adapted"):  # a system of which the authors published more than one kind
        config = made.adapted(config, tensors)
    filled = made(config)
    try:
        load_strictly(filled, tensors, made.NAMES, filled.constants())
    except ValueError as error:
        raise ValueError(f"convert: {authors_file} as {model}: {error}") from error
    save(filled, model, resize="pillow", path=out, trained=True)
