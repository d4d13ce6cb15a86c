"""How well labels fit a truth that is known exactly: tallies over keyframes, one table. X Y Z voxels."""

import numpy as np

from ..types import OCC3D, OPENOCC

KINDS = len(OCC3D.names) + 1


class Agreement:
    """Running tallies; `where` is a word for the table."""

    def __init__(self, where: str = "mask_lidar"):
        self.where, self.frames, self.voxels = where, 0, 0
        self.pairs = np.zeros((KINDS, KINDS), np.int64)  # [true, ours]
        self.moving, self.error, self.worst, self.unknown = 0, 0.0, 0.0, 0

    def add(self, true: np.ndarray, ours: np.ndarray, where: np.ndarray, true_flow=None, flow=None) -> None:
        """One keyframe: Occ3D labels (X, Y, Z), where they are compared (X, Y, Z) bool, flows (X, Y, Z, 2)."""
        self.frames += 1
        self.voxels += int(where.sum())
        pairs = true[where].astype(np.int64) * KINDS + ours[where]
        self.pairs += np.bincount(pairs, minlength=KINDS * KINDS).reshape(KINDS, KINDS)
        if flow is None or true_flow is None:
            return
        both = where & (true == ours) & np.isin(true, OCC3D.moving_ids) & np.isfinite(true_flow).all(-1)
        error = np.linalg.norm(flow[both] - true_flow[both], axis=-1)
        known = error[np.isfinite(error)]
        self.unknown += len(error) - len(known)
        self.moving += len(known)
        self.error += float(known.sum())
        self.worst = max(self.worst, float(known.max(initial=0.0)))

    def merge(self, other: "Agreement") -> None:
        for name in ("frames", "voxels", "pairs", "moving", "error", "unknown"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.worst = max(self.worst, other.worst)

    def iou(self) -> np.ndarray:
        """IoU of each class, (C,); NaN for one that is neither in the truth nor in ours."""
        hit = np.diag(self.pairs).astype(float)
        with np.errstate(invalid="ignore"):
            return (hit / (self.pairs.sum(0) + self.pairs.sum(1) - hit))[:-1]

    def occupied(self) -> float:
        """IoU of occupied and unoccupied."""
        both = self.pairs[:-1, :-1].sum()
        return float(both / max(1, self.pairs.sum() - self.pairs[-1, -1]))

    def mean(self) -> float:
        """mIoU over the classes that the truth has."""
        there = self.pairs[:-1].sum(1) > 0
        return float(self.iou()[there].mean()) if there.any() else float("nan")

    def flow_error(self) -> float:
        """Mean |ours - true| in m/s over voxels of the right class that moves and whose velocity is known to us."""
        return self.error / self.moving if self.moving else float("nan")


def table(agreements: list[Agreement]) -> str:
    """Markdown, a column for each."""
    head = ["", *(a.where for a in agreements)]
    rows = [
        ["keyframes", *(str(a.frames) for a in agreements)],
        ["voxels compared", *(f"{a.voxels:,}" for a in agreements)],
        ["**IoU occupied / unoccupied**", *(f"**{100 * a.occupied():.1f} %**" for a in agreements)],
        ["**mIoU**", *(f"**{100 * a.mean():.1f} %**" for a in agreements)],
        ["**flow error, m/s** (worst)", *(f"**{a.flow_error():.3f}** ({a.worst:.2f})" for a in agreements)],
        ["flow not known, voxels", *(f"{a.unknown:,}" for a in agreements)],
    ]
    for i, name in enumerate(OCC3D.names):
        if any(a.pairs[i].sum() for a in agreements):
            rows.append([name, *(_percent(a, i) for a in agreements)])
    lines = [head, ["---", *("---:" for _ in agreements)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _percent(agreement: Agreement, kind: int) -> str:
    if not agreement.pairs[kind].sum():
        return "–"
    return f"{100 * agreement.iou()[kind]:.1f} %"


def occ3d_of_openocc(labels: np.ndarray) -> np.ndarray:
    """OpenOcc v2 ids -> Occ3D ids, by name."""
    ids = [OCC3D.id(name) for name in OPENOCC.names] + [OCC3D.free]
    return np.array(ids, np.uint8)[labels]
