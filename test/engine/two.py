"""One of the processes of a test: scores the drives of a data set and says what came out, or why nothing did.

`python -m torch.distributed.run --nproc-per-node 2 test/engine/two.py DATA OUT`
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine import drives

from occflow_core.data.nuscenes import NuScenes
from occflow_core.engine import share
from occflow_core.engine.average import average_world
from occflow_core.engine.distributed import joined
from occflow_core.engine.evaluate import Job, evaluate, evaluate_into


def main(data: Path, out: Path) -> None:
    torch.set_num_threads(1)  # sums of floats depend on how many share them
    world, model = NuScenes(data, progress=False), drives.model()
    with joined("cpu") as processes:
        try:
            scores = evaluate(model, world, world.scenes, "openocc", progress=False)
            average, keyframes = average_world(world, world.scenes, "openocc", progress=False)
            job = Job(world, "openocc", model, average)
            report = evaluate_into(out / "scored", job, world.scenes, {}, {}, progress=False)
            said = {
                "evaluate": scores.to_json(),
                "report": report,
                "average": [int(average.labels.long().sum()), keyframes],
                "processes": len(share.told(None)),
            }
        except ValueError as problem:
            said = {"problem": str(problem)}
        (out / f"{processes.rank}.json").write_text(json.dumps(said))


main(Path(sys.argv[1]), Path(sys.argv[2]))
