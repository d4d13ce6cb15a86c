"""What `occflow bench stream` says of streams: what it counts, and that its table tells what it measured."""

import json
from dataclasses import replace

import pytest
import torch
from systems import small, small_sparse, small_v2
from torch.nn import functional as F

from occflow_core import bench, ops, runtime
from occflow_core.cli import main
from occflow_core.runtime import Model, load
from occflow_core.runtime.backends import Engine, Parts
from occflow_core.runtime.stream import Stream
from occflow_core.systems.opus import Opus
from occflow_core.systems.sparseocc import SparseOcc4D

STEPS = 2


@pytest.fixture(scope="module", autouse=True)
def least():
    """A preset of OPUS that steps in a blink, by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(Opus.PRESETS, "least", replace(small.CONFIG, frames=3, levels=2))
        yield


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "stream.json"
    made = bench.bench_stream(
        STEPS, ["opus-least"], ["eager", "tensorrt"], ["float32", "bf16"], ["cpu", "cuda:77"], out=out
    )
    assert json.loads(out.read_text()) == made, "what is written is what is returned"
    return made


# ---- counts ----


def test_products_convolutions_and_attention_count_two_a_multiplication_in_inference_mode_too():
    x, picture, parts = torch.randn(7, 3), torch.randn(2, 3, 10, 12), torch.randn(3, 1, 4, 9, 8)
    linear, convolution = torch.nn.Linear(3, 5), torch.nn.Conv2d(3, 6, 3, padding=1)
    with torch.inference_mode(), bench.Work() as work:
        linear(x)
        convolution(picture)
        F.scaled_dot_product_attention(*parts, attn_mask=torch.zeros(1, 4, 9, 9))
    assert work.rows == 0
    by_hand = 7 * 5 * 3, 2 * 6 * 10 * 12 * 3 * 9, 4 * 9 * 9 * (8 + 8)
    assert work.operations == 2 * sum(by_hand)


def test_a_row_counts_once_however_often_it_is_looked_up_and_not_where_it_has_no_share():
    """One camera, one map of 2 x 4 cells; a point in the middle of a cell has all of its share there."""
    rows = torch.randn(1, 8, 6)
    pixels_from_now = torch.eye(3, 4).expand(1, 1, 1, 3, 4)
    inside = lambda column, row: (column + 0.5, row + 0.5, 1.0)  # noqa: E731 (a cell is a pixel)

    def looked_up(*points, used=True):
        places = torch.tensor(points).view(1, len(points), 1, 1, 3)
        shares = torch.ones(1, len(points), 1, 1, 1)
        mask = torch.tensor([[[used]]])
        with torch.inference_mode(), bench.Work() as work:
            for _ in range(2):  # two layers
                ops.sample([[rows]], [(2, 4)], (2, 4), pixels_from_now, mask, places, shares, as_published=False)
        return work.rows

    row = 6 * 4  # bytes
    assert looked_up(inside(1, 0)) == row
    assert looked_up(inside(1, 0), inside(1, 0), inside(3, 1)) == 2 * row
    assert looked_up((2.0, 1.0, 1.0)) == 4 * row  # where four cells meet
    assert looked_up((-3.0, 1.0, 1.0)) == 0 == looked_up(inside(1, 0), used=False)


def test_a_step_counts_all_weights_the_new_pictures_and_at_most_the_rows_of_its_window():
    model = load("opus-least")
    config = model.system.config
    frames = list(bench_frames(config.frames))
    counts = bench.counted(model, frames)
    weights = 4 * sum(p.numel() for p in model.system.parameters())
    pictures = 6 * 3 * config.height * config.width
    window = config.frames * 6 * _rows(model, frames) * config.channels * 4
    assert weights + pictures < counts["MB"] * 1e6 <= weights + pictures + window + 1e3
    encoder = bench.counted(load("opus-least"), frames[:1])["GFLOP"]
    assert counts["GFLOP"] == encoder, "a step encodes its own pictures alone, however full its memory is"


@pytest.mark.parametrize(
    "made", [small_v2.build, lambda: SparseOcc4D(small_sparse.CONFIG).eval()], ids=["v2", "sparse"]
)
def test_every_kind_of_network_is_counted(made):
    model = Model(made(), "small", False, "fast", None)
    weights = 4 * sum(p.numel() for p in model.system.parameters())
    counts = bench.counted(model, list(bench_frames(1)))
    assert counts["GFLOP"] > 0 and counts["MB"] * 1e6 > weights


def bench_frames(count):
    from occflow_core.data import pattern

    return pattern.drive(count, height=bench.PICTURE[0], width=bench.PICTURE[1], rate=2.0)


def _rows(model, frames) -> int:
    stream = Stream(model)
    stream.step(frames[0])
    return stream.memory.lanes[0][0].rows.shape[1]


# ---- the table ----


def test_a_row_for_each_combination_and_a_reason_where_it_cannot_be_had(figures):
    told = [(row["device"], row["backend"], row["precision"]) for row in figures["rows"]]
    both = [("eager", "float32"), ("eager", "bf16"), ("tensorrt", "float32"), ("tensorrt", "bf16")]
    assert told == [(device, *words) for device in ("cpu", "cuda:77") for words in both]
    why = [row["why"] for row in figures["rows"]]
    assert why[:2] == [None, None] and "needs an NVIDIA GPU" in why[2] and why[3] == why[2]
    assert all("sees no cuda:77" in reason for reason in why[4:])
    assert figures["finished"] and set(figures["probes"]) == {"cpu"}


def test_the_table_has_the_numbers_of_the_json(figures):
    table = bench.stream_table(figures).splitlines()
    head = [cell.strip() for cell in table[3].strip("|").split("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[5 : 5 + len(figures["rows"])]]
    assert all(len(row) == len(head) for row in rows)
    for row, cells in zip(figures["rows"], rows):
        cells = dict(zip(head, cells))
        assert [cells[name] for name in ("model", "backend", "precision", "device")] == [
            row[name] for name in ("model", "backend", "precision", "device")
        ]
        if row["why"] is not None:
            assert cells["total ms"] == "–" and cells["note"] == row["why"]
            continue
        for stage, ms in row["ms"].items():
            assert cells[f"{stage} ms"] == f"{ms['p50']} / {ms['p95']} / {ms['p99']}"
            assert 0 < ms["p50"] <= ms["p95"] <= ms["p99"]
        for name in ("steps/s", "GFLOP", "MB", "floor ms", "memory MB"):
            assert cells[name] == str(row[name]) and row[name] >= 0
        whole = f"{row['window']['times']} x" if row["precision"] == "float32" else "–"
        assert cells["whole window"] == whole
        assert cells["model"] == "opus-least (untrained)"
    probes = figures["probes"]["cpu"]
    assert f"{probes['float32']} GFLOP/s in float32, {probes['bf16']} GFLOP/s in bf16" in "\n".join(table)


def test_the_floor_is_the_longer_of_operations_at_the_peak_and_bytes_at_the_bandwidth(figures):
    row, probes = figures["rows"][0], figures["probes"]["cpu"]
    longer = max(row["GFLOP"] / probes["float32"], row["MB"] / 1000 / probes["GB/s"]) * 1000
    assert row["floor ms"] == pytest.approx(longer, abs=1e-3)
    assert row["floor reached"] == pytest.approx(longer / row["ms"]["network"]["p50"], abs=1e-4)
    slow = {"float32": 1e9, "GB/s": 1.0}
    assert bench._floor(row, slow, "float32")["floor ms"] == pytest.approx(row["MB"], abs=1e-3)


def test_the_stream_says_what_its_whole_window_says(figures):
    exact, half = (row["window"] for row in figures["rows"][:2])
    assert exact["labels differ"] < 0.01 and exact["times"] > 0
    assert half is None, "an engine takes one instant"


def test_half_precision_is_measured_against_float32_on_the_same_drive(figures):
    exact, half = (row["from float32"] for row in figures["rows"][:2])
    assert exact is None
    assert 0 < half["scores mean"] <= half["scores largest"] <= 1
    assert 0 <= half["labels mean"] <= half["labels largest"] < 0.5
    same = bench._apart(Stream(load("opus-least")), Stream(load("opus-least")), list(bench_frames(2)))
    assert set(same.values()) == {0.0}


def test_an_engine_has_a_row_of_its_own_without_a_whole_window(monkeypatch):
    def built(model, backend, cameras, precision):
        if backend == "eager":
            return model
        parts = Parts.of(model.system, cameras)
        return replace(model, system=Engine(parts, parts.modules))  # as an engine, but nothing is compiled

    monkeypatch.setattr(runtime, "built", built)
    monkeypatch.setattr(bench, "probed", lambda *_: {"float32": 100.0, "GB/s": 20.0})
    made = bench.bench_stream(1, ["opus-least"], ["eager", "aot"], ["float32"])
    eager, engine = made["rows"]
    assert engine["why"] is None and engine["window"] is None
    assert set(engine["from float32"].values()) == {0.0}
    assert (engine["GFLOP"], engine["MB"]) == (eager["GFLOP"], eager["MB"])
    assert "| opus-least (untrained) | aot | float32 | cpu |" in bench.stream_table(made)


def test_a_run_that_was_cut_off_keeps_its_rows_and_a_finished_one_is_measured_anew(tmp_path, monkeypatch):
    out, measured = tmp_path / "stream.json", []
    real, words = bench._measured, (STEPS, ["opus-least"], ["eager"], ["float32", "bf16"])

    def cut_off(*arguments):
        measured.append(arguments[3])
        if len(measured) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(bench, "_measured", cut_off)
    monkeypatch.setattr(bench, "probed", lambda *_: {"float32": 100.0, "bf16": 200.0, "GB/s": 20.0})
    with pytest.raises(KeyboardInterrupt):
        bench.bench_stream(*words, out=out)
    (first,) = json.loads(out.read_text())["rows"]
    assert [path.name for path in tmp_path.iterdir()] == ["stream.json"]
    again = bench.bench_stream(*words, out=out)
    assert measured == ["float32", "bf16", "bf16"] and again["finished"]
    assert again["rows"][0]["ms"] == first["ms"]
    bench.bench_stream(STEPS, ["opus-least"], precisions=["float32"], out=out)
    assert measured[3:] == ["float32"]


# ---- words ----


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--models", "opus-domo"), "the nearest is 'opus-demo'"),
        (("--backends", "eager", "magic"), "backend must be one of eager, compiled, aot, tensorrt, got 'magic'"),
        (("--precisions", "int8"), "precision must be one of float32, bf16, fp16, got 'int8'"),
        (("--devices", "toaster"), "devices are cpu, cuda, cuda:1 and so on, got 'toaster'"),
        (("--steps", "0"), "steps must be at least 1, got 0"),
        (("--sets", "3"), "--sets is for node and model and metrics, not for stream"),
    ],
)
def test_a_word_that_is_not_known_is_one_sentence(words, sentence, capsys):
    assert main(["bench", "stream", *words]) == 1
    said = capsys.readouterr()
    assert sentence in said.err and said.err.count("\n") == 1 and not said.out


def test_the_command_prints_the_table_and_writes_the_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "probed", lambda *_: {"float32": 100.0, "GB/s": 20.0})
    out = tmp_path / "stream.json"
    words = f"--models opus-least --steps 1 --precisions float32 --devices cpu --out {out}".split()
    assert main(["bench", "stream", *words]) == 0
    assert capsys.readouterr().out.strip() == bench.stream_table(json.loads(out.read_text()))


def test_options_of_a_stream_are_refused_elsewhere(capsys):
    assert main(["bench", "metrics", "--models", "opus-nano"]) == 1
    assert "--models is for stream, not for metrics" in capsys.readouterr().err
