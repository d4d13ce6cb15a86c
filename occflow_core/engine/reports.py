"""What a training shows while it runs: a curve as CSV, TensorBoard's events, a bar with the time left."""

import csv
import io
import os
from pathlib import Path

from .fit import Step


class Curve:
    """A row for each step: step, loss, its terms, gradient, rate, seconds, waited. Numbers have all their digits."""

    def __init__(self, path: Path, start: int):
        """Rows of a file that is there already stay, up to the step before `start`."""
        self.path, self.file = path, None
        kept = []
        if start and path.exists():
            with path.open(newline="") as old:
                # the last row may be half a row
                kept = [row for row in csv.reader(old) if not row[:1] or not row[0].isdigit() or int(row[0]) < start]
        beside = path.with_name(f".{path.name}.part")
        with beside.open("w", newline="") as new:
            csv.writer(new).writerows(kept)
        os.replace(beside, path)
        self.header = bool(kept)

    def __enter__(self) -> "Curve":
        self.file = self.path.open("a", newline="")
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def add(self, step: Step, rate: float) -> None:
        row = {"step": step.number, "loss": step.loss, **step.terms, "gradient": step.gradient, "rate": rate}
        row |= {"seconds": round(step.seconds, 4), "waited": round(step.waited, 4)}
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerows([list(row), list(row.values())] if not self.header else [list(row.values())])
        self.header = True
        self.file.write(text.getvalue())
        self.file.flush()


class Events:
    """The same for TensorBoard, every tenth step."""

    EVERY = 10

    def __init__(self, folder: Path, start: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("train: TensorBoard is missing: pip install tensorboard") from error
        self.writer = SummaryWriter(str(folder), purge_step=start)

    def __enter__(self) -> "Events":
        return self

    def __exit__(self, *_) -> None:
        self.writer.close()

    def add(self, step: Step, rate: float) -> None:
        if step.number % self.EVERY:
            return
        values = {"loss": step.loss, "gradient": step.gradient, "rate": rate, "seconds": step.seconds}
        values |= {f"terms/{name}": value for name, value in step.terms.items()}
        values["waiting for data"] = step.waited / step.seconds
        for name, value in values.items():
            self.writer.add_scalar(name, value, step.number)


class Bar:
    """Steps done, time left, the loss, and the share of time that was spent waiting for data."""

    def __init__(self, start: int, steps: int):
        from tqdm import tqdm

        self.bar = tqdm(initial=start, total=steps, unit="step", desc="train", smoothing=0.1)
        self.seconds = self.waited = 0.0

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def add(self, step: Step, rate: float) -> None:
        self.seconds += step.seconds
        self.waited += step.waited
        share = self.waited / self.seconds
        self.bar.set_postfix_str(f"loss {step.loss:.3g}, data {share:.0%}, rate {rate:.1e}", refresh=False)
        self.bar.update()
