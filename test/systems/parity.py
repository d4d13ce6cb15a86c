"""What the parity tests of the OPUS family share: how near is equal, gradients by the authors' names, and the published
rules of the decoder, each of which can be switched off alone to see whether anybody would notice.

B batch, T time, N cameras, G groups, C channels of a group, Q queries, S points, L levels.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from occflow_core import ops
from occflow_core.systems.base import translate

CLOSE = 1e-5  # of numbers of the size of one


def close(mine, theirs) -> bool:
    mine = mine.detach().numpy() if isinstance(mine, torch.Tensor) else np.asarray(mine)
    return mine.shape == theirs.shape and bool((abs(mine - theirs) <= CLOSE * (1 + abs(theirs))).all())


def gradients(system, stored, names) -> tuple[set[str], set[str]]:
    """Our names of the parameters whose gradients, mixed down to two numbers each, are stored; and of those among them
    that are not equal."""
    parameters, compared, wrong = dict(system.named_parameters()), set(), set()
    for name in stored:
        if name.startswith("gradient "):
            ours = translate(name.removeprefix("gradient "), names)[1]
            random = np.random.RandomState(4).standard_normal((parameters[ours].numel(), 2))
            compared.add(ours)
            if not close(parameters[ours].grad.flatten().numpy() @ random, stored[name]):
                wrong.add(ours)
    return compared, wrong


def wrong(terms, stored) -> set[str]:
    """Names of the losses that are not those stored."""
    expected = {name.removeprefix("loss "): float(stored[name]) for name in stored if name.startswith("loss ")}
    assert terms.keys() == expected.keys()
    return {name for name, value in terms.items() if value.item() != pytest.approx(expected[name], rel=CLOSE)}


# ---- the published rules of a decoder

ORDER = "time t of group g takes the level weights of group (t*G + g) // T"
CORNERS = "the corner cells' centres lie on the picture's corners"
FIRST = "of the cameras that see a point the first is asked"
CAMERA_ZERO = "a point that no camera sees is read from camera 0"
SAMPLING = (ORDER, CORNERS, FIRST, CAMERA_ZERO)
ALONE = "one point has no spread"
UNBIASED = "the spread of P points is divided by P - 1"
HALF = "moves are told in half metres"
TOGETHER = "norms of the mixing go over points and channels together"
ROW = "the reach is that of the query that listens"
RULES = (*SAMPLING, ALONE, UNBIASED, HALF, TOGETHER, ROW)


def sampled(rows, sizes, picture, pixels_from_now, used, points, weights, without=None):
    """`ops.sample` as published, in few words and much memory: the arguments are its own, `without` one of SAMPLING."""
    b, t, n = used.shape
    q, g, s, levels = weights.shape[1:]
    seen = torch.einsum("btnij,bqgsj->btnqgsi", pixels_from_now, F.pad(points, (0, 1), value=1.0))
    depth = seen[..., 2:]
    unit = seen[..., :2] / depth.clamp_min(1e-5) / points.new_tensor([picture[1], picture[0]])
    valid = (depth[..., 0] > 1e-5) & ((unit > 0) & (unit < 1)).all(-1) & used[..., None, None, None]
    view = valid.int().argmax(dim=2)  # of equals the first: camera 0 where none sees
    if without == FIRST:
        view = (n - 1 - valid.flip(2).int().argmax(dim=2)).where(valid.any(2), 0)
    counts = valid.any(2) if without == CAMERA_ZERO else used.gather(2, view.flatten(2)).view_as(view)
    unit = unit.gather(2, view[:, :, None, ..., None].expand(b, t, 1, q, g, s, 2))[:, :, 0]

    # the authors flatten weights in the order (B, G, T), but features in the order (B, T, G)
    mixed = weights[:, :, :, None].expand(b, q, g, t, s, levels)
    if without == ORDER:
        mixed = mixed.permute(0, 3, 2, 1, 4, 5)
    else:
        mixed = mixed.permute(0, 2, 3, 1, 4, 5).reshape(b, t, g, q, s, levels)

    place = (2 * unit - 1).transpose(2, 3).flatten(0, 2)  # (B*T*G, Q, S, 2)
    maps = torch.stack([torch.stack(list(lane)) for lane in rows])  # (B, T, N, R, G*C)
    total = 0.0
    for level, part in enumerate(maps.split([height * width for height, width in sizes], dim=3)):
        part = part.mT.unflatten(-1, sizes[level]).unflatten(3, (g, -1))  # (B, T, N, G, C, H, W)
        for camera in range(n):
            cells = part[:, :, camera].flatten(0, 2)
            found = F.grid_sample(cells, place, padding_mode="zeros", align_corners=without != CORNERS)
            found = found.view(b, t, g, -1, q, s).permute(0, 1, 2, 4, 5, 3)
            mine = ((view == camera) & counts).transpose(2, 3)
            total = total + found * (mixed[..., level] * mine)[..., None]
    return total.permute(0, 3, 2, 1, 4, 5).flatten(3, 4)  # (B, Q, G, T*S, C)


def without(rule, monkeypatch, layers, home) -> None:
    """Switches a rule off in the layers of a decoder; home: the module that these are written in."""
    if rule in SAMPLING:
        monkeypatch.setattr(ops, "sample", lambda *given: sampled(*given[:-1], without=rule))
    elif rule == ALONE:
        monkeypatch.setattr(ops, "sample", lambda *given: sampled(*given[:-1]))
        for layer in layers:
            layer.sampling.config = replace(layer.sampling.config, as_published=False)
    elif rule == UNBIASED:
        monkeypatch.setattr(torch.Tensor, "std", lambda x, **how: x.var(correction=0, **how).sqrt())
    elif rule == HALF:
        monkeypatch.setattr(home, "STEP", 1.0)
    elif rule == TOGETHER:
        norm = F.layer_norm
        monkeypatch.setattr(F, "layer_norm", lambda x, shape, *more: norm(x, tuple(shape)[-1:], *more))
    elif rule == ROW:
        attention = F.scaled_dot_product_attention

        def turned(q, k, v, attn_mask=None, *more, **how):  # attention without a mask stays as it is
            return attention(q, k, v, None if attn_mask is None else attn_mask.mT, *more, **how)

        monkeypatch.setattr(F, "scaled_dot_product_attention", turned)
    else:
        raise ValueError(f"no rule: {rule}")
