import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from systems import small_sparse
from systems.rig import frame
from systems.small import CONFIG, PUBLISHED, authors_checkpoint, build

from occflow_core.runtime import Stream, load, save
from occflow_core.runtime.convert import convert
from occflow_core.runtime.load import names, parse
from occflow_core.systems import SYSTEMS, opus, sparseocc
from occflow_core.systems.base import translate


@pytest.fixture(autouse=True)
def small_presets(monkeypatch):
    monkeypatch.setitem(opus.PRESETS, "nano", CONFIG)
    monkeypatch.setitem(opus.PRESETS, "tiny", PUBLISHED)


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_without_weights_a_model_is_untrained_says_so_and_repeats_itself():
    model, again, other = load("opus-nano"), load("opus-nano"), load("opus-nano", seed=1)
    assert (model.name, model.trained, model.weights, model.resize) == ("opus-nano (untrained)", False, None, "fast")
    assert equal(model.system, again.system) and not equal(model.system, other.system)
    assert not model.system.training
    assert load("opus-tiny").resize == "pillow"


def test_what_was_saved_is_loaded_and_signed(tmp_path):
    system = build()
    save(system, "opus-nano", "fast", tmp_path / "weights.safetensors", trained=True)
    model = load("opus-nano", tmp_path / "weights.safetensors")
    assert equal(model.system, system) and model.system.config == system.config
    assert (model.name, model.trained, model.resize, len(model.weights)) == ("opus-nano", True, "fast", 64)
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]
    prediction = Stream(model).step(frame(128, 192))
    assert torch.equal(
        prediction.labels, Stream(load("opus-nano", tmp_path / "weights.safetensors")).step(frame(128, 192)).labels
    )


def test_a_file_brings_the_config_it_was_trained_with(tmp_path):
    wider = replace(CONFIG, queries=33, threshold=0.4)
    save(build(wider), "opus-nano", "fast", tmp_path / "w.safetensors", trained=True)
    assert load("opus-nano", tmp_path / "w.safetensors").system.config == wider


def test_an_unknown_model_is_refused_and_the_nearest_named():
    with pytest.raises(ValueError, match="no model 'opus-nan'; the nearest is 'opus-nano'"):
        load("opus-nan")
    with pytest.raises(ValueError, match="no model 'nonsense'"):
        load("nonsense")


def test_files_that_are_not_ours_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="there is no file of weights at .*none.safetensors"):
        load("opus-nano", tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load("opus-nano", tmp_path / "text")
    torch.save({"a": torch.zeros(3)}, tmp_path / "pickle.pth")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load("opus-nano", tmp_path / "pickle.pth")
    save_file({"a": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="does not say which model"):
        load("opus-nano", tmp_path / "foreign.safetensors")
    whole = tmp_path / "whole.safetensors"
    save(build(), "opus-nano", "fast", whole, trained=True)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load("opus-nano", tmp_path / "cut.safetensors")


def test_a_field_that_a_file_of_old_lacks_has_its_default(tmp_path):
    path = tmp_path / "w.safetensors"
    config = asdict(build().config)
    assert config.pop("look") == 0
    about = {"system": "opus", "preset": "nano", "resize": "fast", "trained": True, "config": config}
    save_file(build().state_dict(), path, metadata={"occflow": json.dumps(about)})
    assert load("opus-nano", path).system.config == build().config


def test_weights_of_another_model_or_shape_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save(build(PUBLISHED), "opus-tiny", "pillow", path, trained=True)
    with pytest.raises(ValueError, match="holds opus-tiny, not opus-nano"):
        load("opus-nano", path)

    about = {"system": "opus", "preset": "nano", "resize": "fast", "trained": True, "config": {"height": 3, "tall": 1}}
    save_file(build().state_dict(), path, metadata={"occflow": json.dumps(about)})
    words = r"does not fit opus-nano: its config differs in \['queries', 'refines', 'samples', 'tall', 'width'\]"
    with pytest.raises(ValueError, match=words):
        load("opus-nano", path)

    save(build(), "opus-nano", "fast", path, trained=True)
    tensors = load_file(path)
    tensors["extra"] = tensors.pop("queries.weight")
    tensors["neck.output.1.bias"] = torch.zeros(3)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError) as error:
        load("opus-nano", path)
    for part in ("not a tensor of this system: extra", "missing here: queries.weight", "shape: neck.output.1.bias"):
        assert part in str(error.value)


def test_saving_that_fails_leaves_no_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    path.write_text("before")
    import safetensors.torch

    def half(tensors, beside, metadata):
        beside.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        save(build(), "opus-nano", "fast", path, trained=True)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"] and path.read_text() == "before"
    with pytest.raises(ValueError, match="does not describe"):
        save(build(), "opus-nano", "nearest", path, trained=True)


def test_the_authors_checkpoint_becomes_a_file_of_ours(tmp_path):
    theirs = authors_checkpoint(PUBLISHED)
    wrapped = {"meta": {"epoch": 100}, "state_dict": {f"module.{name}": tensor for name, tensor in theirs.items()}}
    torch.save(wrapped, tmp_path / "theirs.pth")
    convert("opus-tiny", tmp_path / "theirs.pth", tmp_path / "ours.safetensors")
    model = load("opus-tiny", tmp_path / "ours.safetensors")
    assert model.resize == "pillow" and model.trained
    filled = model.system.state_dict()
    places = {translate(name, opus.NAMES)[1]: name for name in theirs}
    assert all(torch.equal(tensor, theirs[places[name]]) for name, tensor in filled.items())
    torch.save(theirs, tmp_path / "bare.pth")  # without the wrapping, too
    convert("opus-tiny", tmp_path / "bare.pth", tmp_path / "bare.safetensors")


def test_of_sparseocc_the_names_in_a_file_tell_how_often_its_masks_are_passed(tmp_path, monkeypatch):
    """With the wrong number a network would load and say something else."""
    for name, config in small_sparse.PARITY.items():
        monkeypatch.setitem(sparseocc.PRESETS, "8f" if name == "v1.1" else f"{name}-8f", config)
    for name, iterations in (("v1.0", 4), ("v1.1", 2)):
        torch.save({"state_dict": small_sparse.authors_checkpoint(small_sparse.PARITY[name])}, tmp_path / "theirs.pth")
        for model in ("sparseocc-8f", "sparseocc-v1.0-8f"):
            convert(model, tmp_path / "theirs.pth", tmp_path / "ours.safetensors")
            config = load(model, tmp_path / "ours.safetensors").system.config
            assert (config.generation, config.iterations) == (name, iterations)


def test_what_cannot_be_converted_is_refused_and_leaves_no_file(tmp_path):
    out, given = tmp_path / "ours.safetensors", tmp_path / "theirs.pth"
    with pytest.raises(ValueError, match="there is no file"):
        convert("opus-tiny", given, out)
    given.write_text("hello")
    with pytest.raises(ValueError, match="not a checkpoint of plain tensors"):
        convert("opus-tiny", given, out)
    torch.save({"state_dict": {}, "epoch": 3}, given)
    with pytest.raises(ValueError, match="holds no tensors by name"):
        convert("opus-tiny", given, out)
    theirs = authors_checkpoint(PUBLISHED)
    theirs["pts_bbox_head.densifiers.0.pc_range"] = torch.zeros(6)
    torch.save(theirs, given)
    with pytest.raises(ValueError, match="not in the name table: pts_bbox_head.densifiers.0.pc_range"):
        convert("opus-tiny", given, out)
    with pytest.raises(ValueError, match="opus-nano is a model of ours"):
        convert("opus-nano", given, out)
    assert not out.exists()


class Bomb:
    def __reduce__(self):
        return (print, ("a checkpoint ran code",))


def test_nothing_in_a_foreign_checkpoint_is_run(tmp_path, capsys):
    torch.save({"state_dict": authors_checkpoint(PUBLISHED), "meta": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match="not a checkpoint of plain tensors"):
        convert("opus-tiny", tmp_path / "bomb.pth", tmp_path / "out")
    assert "ran code" not in capsys.readouterr().out


def test_every_model_has_a_name_of_its_own():
    made = [(system, preset) for system in SYSTEMS for preset in SYSTEMS[system].PRESETS]
    assert [parse(name) for name in names()] == made and len(set(names())) == len(made)
    assert SYSTEMS["opus"].PRESETS and SYSTEMS["opus"].NAMES


def test_the_papers_letters_name_their_sizes():
    assert (parse("opus-t"), parse("opus-v2-l")) == (("opus", "tiny"), ("opus-v2", "large"))
    with pytest.raises(ValueError, match="no model 'opus-x'"):
        parse("opus-x")


def test_half_a_file_holds_matrices_as_float16_and_everything_else_as_it_was(tmp_path):
    whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    system = build()
    for path in (whole, half):
        save(system, "opus-nano", "fast", path, trained=True, half=path == half)
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    again = load("opus-nano", half).system.state_dict()
    for name, tensor in system.state_dict().items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor.half().to(tensor.dtype) if tensor.ndim > 1 else tensor), name


def test_random_weights_in_a_file_still_say_untrained(tmp_path):
    save(build(), "opus-nano", "fast", tmp_path / "w.safetensors", trained=False)
    model = load("opus-nano", tmp_path / "w.safetensors")
    assert model.name == "opus-nano (untrained)" and not model.trained


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    system = build()
    with torch.no_grad():
        system.queries.weight[0, 0] = float("nan")
    save(system, "opus-nano", "fast", tmp_path / "w.safetensors", trained=True)
    with pytest.raises(ValueError, match="not finite: queries.weight"):
        load("opus-nano", tmp_path / "w.safetensors")
