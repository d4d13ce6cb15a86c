"""Can a system learn at all? Its nano preset learns four moments of the synthetic world by heart."""

from dataclasses import replace

import pytest
import torch

from occflow_core.data.nuscenes import NuScenes
from occflow_core.data.world import write_world
from occflow_core.engine.loader import fitted
from occflow_core.geometry import Grid
from occflow_core.metrics import Miou
from occflow_core.runtime.prepare import prepare
from occflow_core.systems import SYSTEMS
from occflow_core.types import OPENOCC, Clip, Occupancy

NEAR = Grid((-8.0, -8.0, -1.0), (0.4, 0.4, 0.4), (40, 40, 16))
# OPUS: at least four points for each occupied voxel; nothing but what was learned fills a voxel. SparseOcc: twice as
# many voxels are kept as are filled
EASY = {
    "opus": {
        "queries": 324,
        "refines": (16, 48),
        "frames": 1,
        "dropout": 0.0,
        "closing": False,
        "threshold": 0.5,
    },
    "sparseocc4d": {
        "queries": 40,
        "kept": (240, 1200, 4000),
        "kept_in_training": (240, 1200, 4000),
        "frames": 1,
        "dropout": 0.0,
        "faint": 0.3,
    },
}
STEPS = {"opus": 280, "sparseocc4d": 200}


@pytest.fixture(scope="module")
def moments(tmp_path_factory):
    """Four keyframes, 0.5 s apart: clips and what is true around the car."""
    root = write_world(tmp_path_factory.mktemp("overfit"), 1, seed=4, keyframes=4, size=(99, 176), sweeps=False)
    world = NuScenes(root, progress=False)
    frames = [prepare(world.frame(moment), 64, 160, "fast") for moment in world.keyframes("scene-0000")]
    return [Clip.of(f) for f in frames], [world.occupancy(s, "openocc") for s in world.samples("scene-0000")]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", sorted(EASY))
def test_four_moments_are_learned_by_heart(name, moments):
    torch.manual_seed(0)
    clips, truths = moments
    config = replace(
        SYSTEMS[name].PRESETS["nano"], height=64, width=160, grid=NEAR, classes=OPENOCC.table, **EASY[name]
    )
    truths = [fitted(truth, config) for truth in truths]
    system = SYSTEMS[name](config).train()
    clip = Clip.batch(clips)
    together = Occupancy(
        NEAR,
        OPENOCC,
        torch.stack([t.labels for t in truths]),
        torch.stack([t.flow for t in truths]),
        torch.stack([t.seen for t in truths]),
    )
    adam = torch.optim.AdamW(system.parameters(), lr=2e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 2e-3, STEPS[name], pct_start=0.1)
    for _ in range(STEPS[name]):
        output, _ = system(clip, None)
        loss = sum(system.loss(output, together).values())
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(system.parameters(), 35.0)
        adam.step()
        schedule.step()

    with torch.no_grad():
        said = system.decode(system(clip, None)[0])
    miou, errors = Miou(OPENOCC), []
    for k, (prediction, truth) in enumerate(zip(said, truths)):
        miou.add(str(k), prediction, truth)
        moving = torch.isin(truth.labels, torch.tensor(OPENOCC.moving_ids, dtype=torch.uint8))
        met = moving & (prediction.labels == truth.labels) & truth.flow.isfinite().all(-1)
        errors.append((prediction.flow - truth.flow)[met].norm(dim=-1))
    # a class that the four never show has no share in the mean; calling something by its name costs the others
    assert miou.result(absent="skip").miou >= 0.7, miou.result()
    assert torch.cat(errors).mean() <= 0.3
