"""A Run is changed by words, each of which is checked; recipes are found by name."""

from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from engine import tiny

from occflow_core.engine import Run, World, recipe, with_settings
from occflow_core.engine.optimise import parts
from occflow_core.engine.run import differences, told
from occflow_core.runtime.load import parse
from occflow_core.systems import SYSTEMS
from occflow_recipes import RECIPES


@pytest.fixture
def run() -> Run:
    return tiny.run(Path("somewhere"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_run_whose_settings_are_json(name):
    import json

    made = recipe(RECIPES, name)
    assert json.loads(json.dumps(told(made))) == told(made) and differences(told(made), told(made)) == []


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_its_model_and_its_patterns_fit(name):
    """On no memory: all that a run names is there."""
    made = recipe(RECIPES, name)
    system, preset = parse(made.model)
    with torch.device("meta"):
        built = SYSTEMS[system](made.config)
    assert parts(built, made.optimise)
    names = [n for n, _ in built.named_parameters()]
    assert all(any(fnmatchcase(n, pattern) for n in names) for pattern in made.frozen)
    assert all(built.get_submodule(part) is not None for part in made.checkpointing)
    if SYSTEMS[system].PRESETS[preset].as_published:
        assert made.config == SYSTEMS[system].PRESETS[preset]


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ValueError, match="no recipe 'demmo'; the nearest is 'demo'"):
        recipe(RECIPES, "demmo")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("steps=50", 50),
        ("optimise.rate=3e-4", 3e-4),
        ("optimise.average=none", None),
        ("optimise.average=0.5", 0.5),
        ("optimise.rates=(('a.*', 1), ('b', 0.1))", (("a.*", 1.0), ("b", 0.1))),
        ("optimise.precision=bf16", "bf16"),
        ("config.grid.low=(0, -1, 2.5)", (0.0, -1.0, 2.5)),
        ("checkpointing=('backbone',)", ("backbone",)),
        ("frozen_norms=true", True),
        ("data.root=/a=b", Path("/a=b")),
        ("data.version=v1.0-trainval", "v1.0-trainval"),
    ],
)
def test_a_setting_changes_its_field_and_no_other(run, setting, value):
    path = setting.partition("=")[0]
    changed = with_settings(run, [setting])
    part, other = changed, run
    for name in path.split("."):
        part, other = getattr(part, name), getattr(other, name)
    assert part == value and type(part) is type(value)
    lines = differences(told(run), told(changed))
    assert [line.split(" ")[0] for line in lines] == ([path] if other != value else [])


def test_what_may_only_be_together_is_set_together():
    """The demo's network knows 60 m around the car: a grid that begins at -6 m must not be 80 m long."""
    near = ["config.grid.low=(-6,-6,-1)", "config.grid.shape=(30,30,16)"]
    for settings in (near, near[::-1], ["config.grid.shape=(300,300,16)", *near]):
        grid = with_settings(recipe(RECIPES, "demo"), settings).config.grid
        assert (grid.low, grid.shape) == ((-6.0, -6.0, -1.0), (30, 30, 16))
    with pytest.raises(ValueError, match="corner is at 105 m"):
        with_settings(recipe(RECIPES, "demo"), near[:1])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("stepz=3", "no field 'stepz'; the nearest is 'steps'"),
        ("optimise.rat=3", "no field 'optimise.rat'; the nearest is 'rate"),
        ("config.chanels=3", "the nearest is 'channels'"),
        ("steps=ten", "steps: expected a whole number, got 'ten'"),
        ("optimise.rate=fast", "optimise.rate: expected a number, got 'fast'"),
        ("frozen_norms=1", "expected true or false"),
        ("data.window=strm", "expected one of stream, window, got 'strm'"),
        ("config.grid=3", "set its fields one by one: config.grid.low"),
        ("config.grid.low=(1, 2)", "config.grid.low: expected values like"),
        ("optimise.betas=__import__('os').abort()", "optimise.betas: expected values like"),
        ("steps.x=1", "nothing inside it"),
        ("steps", "expected field=value, got 'steps'"),
        ("steps=0", "steps: expected at least 1, got 0"),
        ("optimise.rate=-1", "rate and clip must be above 0"),
        ("optimise.average=1.0", r"average must be in \[0, 1\)"),
    ],
)
def test_a_setting_that_cannot_be_is_one_sentence(run, setting, words):
    with pytest.raises(ValueError, match=words) as told:
        with_settings(run, [setting])
    assert "\n" not in str(told.value)


def test_parts_of_a_world_are_set_like_all_else(run):
    made = replace(run, data=replace(run.data, world=World(scenes=3, seed=1)))
    assert with_settings(made, ["data.world.scenes=5"]).data.world.scenes == 5
    assert with_settings(made, ["data.world=none"]).data.world is None


def test_the_command_line_takes_settings_one_by_one_or_together():
    from occflow_core.cli import gathered

    together = ["train", "demo", "--out", "x", "--set", "a=1", "b=2"]
    apart = ["train", "demo", "--set", "a=1", "--out", "x", "--set", "b=2"]
    assert gathered(apart, "--set") == together == gathered(together, "--set")
    assert gathered(["world", "out", "--scenes", "3"], "--set") == ["world", "out", "--scenes", "3"]
