import pytest
import torch
from systems.small import CONFIG, PUBLISHED, authors_checkpoint, build

from occflow_core.systems import opus
from occflow_core.systems.base import load_strictly, translate


def test_a_name_table_carries_numbers_and_endings():
    table = {"a.": "b.", "n.#.conv.": "m.out.#.", "layer#.norm#.weight": "l.#.n#.weight", "gone": None}
    assert translate("a.x.weight", table) == (True, "b.x.weight")
    assert translate("n.12.conv.bias", table) == (True, "m.out.12.bias")
    assert translate("layer3.norm1.weight", table) == (True, "l.3.n1.weight")
    assert translate("gone", table) == (True, None)
    assert translate("n.x.conv.bias", table) == (False, None)
    assert translate("gone.too", table) == (False, None)


def test_a_foreign_checkpoint_fills_every_tensor():
    system, theirs = build(PUBLISHED), authors_checkpoint(PUBLISHED)
    load_strictly(system, theirs, opus.NAMES, system.constants())
    filled = system.state_dict()
    for name, tensor in theirs.items():
        place = translate(name, opus.NAMES)[1]
        assert place is None or torch.equal(filled[place], tensor), name


def test_whatever_is_unexplained_on_either_side_is_listed_at_once_and_nothing_is_loaded():
    system, theirs = build(PUBLISHED), authors_checkpoint(PUBLISHED)
    before = {name: tensor.clone() for name, tensor in system.state_dict().items()}
    theirs["oops"] = torch.zeros(2)
    del theirs["pts_bbox_head.init_points.weight"]
    theirs["img_neck.fpn_convs.0.conv.bias"] = torch.zeros(5)
    theirs["img_backbone.fc.weight"] = torch.zeros(3)
    theirs["pts_bbox_head.pc_range"] = torch.tensor([-51.2, -51.2, -5, 51.2, 51.2, 3])
    with pytest.raises(ValueError) as error:
        load_strictly(system, theirs, opus.NAMES, system.constants())
    told = str(error.value).splitlines()
    assert told[0] == "checkpoint does not fit:"
    assert "  not in the name table: oops" in told
    assert "  missing here: queries.weight" in told
    assert "  shape: img_neck.fpn_convs.0.conv.bias: theirs (5,), ours (16,)" in told
    assert "  not a tensor of this system: img_backbone.fc.weight" in told
    assert any(line.startswith("  differs: pts_bbox_head.pc_range: theirs (-51.2, -51.2, -5, ") for line in told)
    assert len(told) == 6
    assert all(torch.equal(system.state_dict()[name], tensor) for name, tensor in before.items())


def test_two_tensors_for_one_place_are_refused():
    system = build(CONFIG)
    tensors = dict(system.state_dict())
    tensors["img_neck.lateral_convs.0.conv.bias"] = tensors["neck.lateral.0.bias"]
    table = {"img_neck.lateral_convs.#.conv.": "neck.lateral.#."} | {name: name for name in system.state_dict()}
    with pytest.raises(ValueError, match="twice: img_neck.lateral_convs.0.conv.bias also becomes neck.lateral.0.bias"):
        load_strictly(system, tensors, table)
