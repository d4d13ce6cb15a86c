"""All of SparseOcc behind the pyramid beside the authors' own, in both generations, with their numbers.

`sparseocc_v10_parity.npz` and `sparseocc_v11_parity.npz` hold what their `SparseOccHead`, `SparseOccTransformer` and
`LoadOccGTFromFile` (github.com/MCG-NJU/SparseOcc at 550b12a, tag v1.0, and at fe9a966, tag v1.1) said on a CPU in
float64: weights of `small_sparse.authors_checkpoint` loaded by name, inputs of `small_v2.seen` and
`small_sparse.told`, and `small_sparse.draws` handed in wherever they draw numbers. First as in tests, there also with
masks that cover less (`small_sparse.BARREN`); then as in training, without dropout, the truth in a corner of their
grid: a segment a class, a segment a thing, and (v1.1) some labels from nowhere. Merges are also those of
`small_sparse.crowd`. mmcv's and mmdet's parts (attention, feed-forward block, focal loss and its cost) were replaced by
what they compute; pictures were looked into by their own PyTorch, not by their kernel. `small_v2.brief` shortens the
rows, and gradients are mixed down to two numbers each, in the order of the authors' names.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from systems import parity, small_sparse, small_v2
from systems.parity import close
from systems.small_sparse import PARITY
from torch.nn import functional as F

from occflow_core import ops
from occflow_core.nn import losses
from occflow_core.systems import sparseocc

STORED = {
    generation: np.load(Path(__file__).with_name(f"sparseocc_{generation.replace('.', '')}_parity.npz"))
    for generation in PARITY
}
TERMS = {"v1.0": ("filled", "names"), "v1.1": ("lovász", "filled", "names' affinity", "names")}  # as the authors add up

both = pytest.mark.parametrize("generation", list(PARITY))


def said(system: sparseocc.SparseOcc) -> sparseocc.Output:
    return system.answer(small_v2.view())


def differing(output: sparseocc.Output, generation: str) -> set[str]:
    """What of an output is not the authors'; of masks and classes the last are compared, whichever number they have."""
    stored, others = STORED[generation], set()
    for i, kept in enumerate(output.kept):
        same = np.array_equal(kept.where.numpy(), stored[f"where {i}"])
        same = same and (kept.filled is None or close(kept.filled, stored[f"filled {i}"]))
        if not same or not close(small_v2.brief(kept.names), stored[f"names {i}"]):
            others.add(f"kept {i}")
    if masks_differ(output, generation):
        others.add("masks")
    return others


def masks_differ(output: sparseocc.Output, generation: str, of="") -> bool:
    stored, last = STORED[generation], PARITY[generation].iterations
    said = [(small_v2.brief(m), small_v2.brief(n)) for m, n in zip(output.masks, output.names, strict=True)]
    first = all(
        close(m, stored[f"{of}masks {j}"]) and close(n, stored[f"{of}classes {j}"])
        for j, (m, n) in enumerate(said[:last])
    )
    masks, names = said[-1]
    return not (first and close(masks, stored[f"{of}masks {last}"]) and close(names, stored[f"{of}classes {last}"]))


@both
@torch.no_grad()
def test_kept_voxels_masks_and_classes_are_the_authors(generation):
    output = said(small_sparse.as_theirs(PARITY[generation]))
    assert not differing(output, generation)
    covered = (output.masks[0] > 0).any(-1)
    assert covered.any(1).all() and not covered.all(1).any()  # in each lane some queries cover nothing, some do
    assert [kept.edge for kept in output.kept] == [4, 2, 1] and all(kept.inside.all() for kept in output.kept)
    assert len(output.masks) == len(output.names) == PARITY[generation].iterations + 1


@both
@pytest.mark.parametrize("case, lanes", [(0, 1), (1, 2)])
@torch.no_grad()
def test_where_no_query_of_a_lane_covers_anything_they_are_too(generation, case, lanes):
    shifts = small_sparse.SHIFTS | {small_sparse.MASK_BIAS: small_sparse.BARREN[generation][case]}
    system = small_sparse.as_theirs(PARITY[generation], shifts)
    output = said(system)
    assert (~(output.masks[0] > 0).any(-1)).all(1).sum() == lanes
    assert not masks_differ(output, generation, f"barren {case} ")

    def spread(module, given):
        """Their places from all over the grid, as where other queries of the lane do cover something."""
        query, places, step, view = given
        low, shape = places.new_tensor(system.config.grid.low), places.new_tensor(system.config.grid.shape)
        barren = (places - low < step).all(-1).all(-1).all(-1)
        return query, torch.where(barren[:, None, None, None], low + (places - low) * shape, places), step, view

    system.masks.sampling.register_forward_pre_hook(spread)
    assert masks_differ(said(system), generation, f"barren {case} ")


# ---- the published rules of the network


@both
@pytest.mark.parametrize("rule", [*parity.SAMPLING, parity.TOGETHER, parity.ROW])
@torch.no_grad()
def test_without_a_published_rule_of_the_decoder_the_voxels_are_others(generation, rule, monkeypatch):
    system = small_sparse.as_theirs(PARITY[generation])
    parity.without(rule, monkeypatch, system.scales, sparseocc)
    assert differing(said(system), generation) == {"kept 0", "kept 1", "kept 2", "masks"}


@both
@torch.no_grad()
def test_the_published_sampling_in_few_words_gives_the_authors_voxels_too(generation, monkeypatch):
    monkeypatch.setattr(ops, "sample", lambda *given: parity.sampled(*given[:-1]))
    assert not differing(said(small_sparse.as_theirs(PARITY[generation])), generation)


# ---- each rule of voxels and masks switched off alone: a function of the system, and what is then not the authors'


def begun_elsewhere(system):
    system.scales[0].register_forward_pre_hook(lambda scale, given: (given[0] + 0.1, *given[1:]))


def middle_told_for_a_place(system):
    for i, scale in enumerate(system.scales):
        half = 2 ** (sparseocc.SCALES - i) / 2 / torch.tensor(system.config.grid.shape)
        scale.position.register_forward_pre_hook(lambda _, given, half=half: (given[0] + half,))


def place_told_once(system):
    for scale in system.scales[1:]:
        scale.position.register_forward_hook(lambda _, given, place: torch.zeros_like(place))


def residual_without_the_place(system):
    told = {}
    for scale in system.scales[:2]:
        scale.position.register_forward_hook(lambda _, given, place, scale=scale: told.update({scale: place}))
        scale.attention.register_forward_hook(lambda _, given, query, scale=scale: query - told[scale])


def apart_in_height_too(system):
    grid, corners = system.config.grid, {}
    for scale in system.scales[:2]:
        scale.register_forward_pre_hook(lambda scale, given: corners.update({scale: given[1] * grid.voxel[0]}))
        scale.attention.register_forward_pre_hook(lambda _, given, scale=scale: (given[0], corners[scale]))


def looked_around_the_corner(system):
    for scale in system.scales:
        scale.sampling.register_forward_pre_hook(lambda _, given: (given[0], given[1] - given[2] / 2, *given[2:]))


def offsets_in_metres(system):
    for scale in system.scales:
        scale.sampling.register_forward_pre_hook(lambda _, given: (*given[:2], torch.ones_like(given[2]), given[3]))


def fewer_kept(system):
    system.config = replace(system.config, kept=(40, 119, 300))


def masks_looked_at_in_the_middle(system):
    system.masks.sampling.register_forward_pre_hook(lambda _, given: (given[0], given[1] + given[2] / 2, *given[2:]))


def position_in_what_is_heard(system):
    system.masks.attention.register_forward_pre_hook(lambda _, given: (given[0],) * 3)


def position_in_the_residual(system):
    position = system.masks.position.weight
    system.masks.attention.register_forward_hook(lambda _, given, heard: (heard[0] + position, None))


def other_draws(system):
    system.masks.draws = system.masks.draws.flip(0)


def others_anywhere(system):
    system.masks.anywhere = system.masks.anywhere.flip(0)


KEPT = [{f"kept {i}" for i in range(first, 3)} | {"masks"} for first in range(3)]
RULES = {
    begun_elsewhere: KEPT[0],
    middle_told_for_a_place: KEPT[0],
    place_told_once: KEPT[1],
    residual_without_the_place: KEPT[0],
    apart_in_height_too: KEPT[0],
    looked_around_the_corner: KEPT[0],
    offsets_in_metres: KEPT[0],
    fewer_kept: KEPT[1],
    masks_looked_at_in_the_middle: {"masks"},
    position_in_what_is_heard: {"masks"},
    position_in_the_residual: {"masks"},
    other_draws: {"masks"},
    others_anywhere: {"masks"},
}


@both
@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_without_a_published_rule_of_voxels_or_masks_they_are_others(generation, rule):
    system = small_sparse.as_theirs(PARITY[generation])
    rule(system)
    assert differing(said(system), generation) == RULES[rule]


@both
@torch.no_grad()
def test_so_they_are_with_children_in_another_order(generation, monkeypatch):
    monkeypatch.setattr(sparseocc, "CHILDREN", torch.cartesian_prod(*[torch.arange(2)] * 3))
    assert differing(said(small_sparse.as_theirs(PARITY[generation])), generation) == KEPT[0]


@torch.no_grad()
def test_so_they_are_where_the_least_free_are_told_by_its_logit_alone(monkeypatch):
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, dim: x.sigmoid() if x.shape[-1] == 18 else softmax(x, dim))
    assert differing(said(small_sparse.as_theirs(PARITY["v1.1"])), "v1.1") == KEPT[0]


@both
@torch.no_grad()
def test_the_number_of_iterations_is_of_the_generation(generation):
    """The weights do not tell it."""
    config = PARITY[generation]
    other = small_sparse.as_theirs(replace(config, iterations={2: 4, 4: 2}[config.iterations]))
    assert differing(said(other), generation) == {"masks"}


# ---- merges


def kept_crowd(config: sparseocc.Config) -> sparseocc.Output:
    where, masks, names = small_sparse.crowd()
    inside = torch.ones(where.shape[:2], dtype=torch.bool)
    return sparseocc.Output((sparseocc.Kept(1, where, inside, None, names, None),), (masks,), (names,))


def merges_differ(output: sparseocc.Output, config: sparseocc.Config, of="") -> set[str]:
    """Which of "labels", "pano" (labels of segments) and "ids" are not the authors'; voxels not kept must be free."""
    stored, free, others = STORED[config.generation], config.table.free, set()
    last = output.kept[-1]
    for panoptic, names in ((False, ("labels",)), (True, ("pano", "ids"))):
        system = sparseocc.SparseOcc(replace(config, panoptic=panoptic))
        for b, prediction in enumerate(system.decode(output)):
            at = last.where[b].unbind(-1)
            for name, dense in zip(names, (prediction.labels, prediction.instances), strict=False):
                rest = dense.clone()
                rest[at] = 0 if name == "ids" else free
                assert (rest == (0 if name == "ids" else free)).all()
                if not np.array_equal(dense[at].numpy(), stored[of + name][b]):
                    others.add(name)
    return others


@both
@torch.no_grad()
def test_labels_and_segments_are_the_authors(generation):
    config = PARITY[generation]
    assert not merges_differ(said(small_sparse.as_theirs(config)), config)
    assert not merges_differ(kept_crowd(config), config, "crowd ")
    assert all(len(np.unique(STORED[generation][f"crowd {name}"])) > 10 for name in ("labels", "pano", "ids"))


@pytest.mark.parametrize("threshold", [0.28, 0.32])
def test_with_another_threshold_of_classes_they_are_others(threshold):
    config = replace(PARITY["v1.1"], threshold=threshold)
    assert merges_differ(kept_crowd(config), config, "crowd ") == {"labels", "pano", "ids"}


@pytest.mark.parametrize("faint", [0.009, 0.011])
def test_so_are_labels_with_another_share_that_is_too_faint(faint):
    config = replace(PARITY["v1.1"], faint=faint)
    assert merges_differ(kept_crowd(config), config, "crowd ") == {"labels"}


@pytest.mark.parametrize("overlap, which", [(0.79, set()), (0.8 + 1e-9, {"pano", "ids"}), (0.59, {"pano", "ids"})])
def test_so_are_segments_with_another_share_that_others_may_take(monkeypatch, overlap, which):
    monkeypatch.setattr(sparseocc, "OVERLAP", overlap)
    assert merges_differ(kept_crowd(PARITY["v1.1"]), PARITY["v1.1"], "crowd ") == which


def test_the_second_segment_of_a_class_that_does_not_move_stays_free_in_the_authors_labels():
    config = replace(PARITY["v1.1"], as_published=False)
    assert merges_differ(kept_crowd(config), config, "crowd ") == {"pano"}


# ---- losses


def stored_terms(generation: str, of="") -> dict[str, float]:
    """As `parity.wrong` and `parity.gradients` read them."""
    config, stored = PARITY[generation], STORED[generation]
    names = [f"{name} {i}" for i in range(sparseocc.SCALES) for name in TERMS[generation]]
    names += [f"{name} {j}" for j in range(config.iterations + 1) for name in ("masks", "dice", "classes")]
    told = {f"loss {name}": value for name, value in zip(names, stored[of + "losses"], strict=True)}
    theirs = [name for name in sorted(small_sparse.authors_tensors(config)) if name.startswith("pts_bbox_head.")]
    return told | {f"gradient {name}": row for name, row in zip(theirs, stored["gradients"], strict=True)}


def learning(generation: str, **changes) -> tuple[sparseocc.SparseOcc, sparseocc.Output]:
    system = small_sparse.as_theirs(replace(PARITY[generation], **changes)).train()
    return system, said(system)


def wrong(terms, generation: str, of="") -> set[str]:
    return {name.rsplit(maxsplit=1)[0] for name in parity.wrong(terms, stored_terms(generation, of))}


def gradients(generation: str) -> tuple[set[str], set[str], sparseocc.SparseOcc]:
    system, output = learning(generation)
    terms = system.loss(output, small_sparse.truth())
    assert not wrong(terms, generation)
    sum(terms.values()).backward()
    return *parity.gradients(system, stored_terms(generation), sparseocc.NAMES), system


@both
def test_losses_and_gradients_are_the_authors(generation):
    compared, unequal, system = gradients(generation)
    assert not unequal
    assert compared == {name for name, _ in system.named_parameters() if not name.startswith(("backbone.", "neck."))}


@both
def test_scales_learn_from_their_own_losses_alone(generation, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "detach", lambda x: x)
    _, unequal, _ = gradients(generation)
    assert {name.split(".")[0] for name in unequal} == {"scales"}
    assert not any(name.startswith("scales.2.") for name in unequal)


@both
@torch.no_grad()
def test_voxels_kept_in_training_are_the_authors(generation):
    stored, config = STORED[generation], PARITY[generation]
    _, output = learning(generation)
    assert np.array_equal(output.kept[-1].where.numpy(), stored["training where 2"])
    assert close(small_v2.brief(output.masks[-1]), stored[f"training masks {config.iterations}"])
    assert len(stored["training where 2"][0]) == config.kept_in_training[-1]


@both
@torch.no_grad()
def test_losses_of_segments_of_things_are_the_authors(generation):
    system, output = learning(generation, panoptic=True)
    assert not wrong(system.loss(output, small_sparse.truth()), generation, "panoptic ")
    assert wrong(system.loss(output, small_sparse.truth()), generation) == {"masks", "dice", "classes"}


@torch.no_grad()
def test_labels_from_nowhere_cost_what_they_cost_the_authors():
    """Nobody's class to the Lovász loss, and unknown to the others; no segment either."""
    system, output = learning("v1.1")
    assert not wrong(system.loss(output, small_sparse.truth(turned=True)), "v1.1", "turned ")


@pytest.mark.parametrize(
    "generation, home, name, value, which",
    [
        ("v1.0", losses, "balanced", lambda logits, true, group: F.softplus(logits) - logits * true, {"filled"}),
        ("v1.1", sparseocc, "CLASS_WEIGHTS", dict.fromkeys(sparseocc.CLASS_WEIGHTS, 1.0), {"names"}),
        ("v1.1", losses, "semantic_affinity", lambda p, label: losses.lovasz_softmax(p, label), {"names' affinity"}),
        *((g, sparseocc, "MATCHING", (2.0, 5.0, 5.0), {"masks", "dice", "classes"}) for g in PARITY),
        *((g, sparseocc, "MATCHING", (4.0, 2.0, 5.0), {"masks", "dice", "classes"}) for g in PARITY),
        *((g, sparseocc, "MATCHING", (4.0, 5.0, 2.0), {"masks", "dice", "classes"}) for g in PARITY),
    ],
)
@torch.no_grad()
def test_another_number_in_the_losses_would_change_them(monkeypatch, generation, home, name, value, which):
    system, output = learning(generation)
    monkeypatch.setattr(home, name, value)
    assert wrong(system.loss(output, small_sparse.truth()), generation) == which


@both
@pytest.mark.parametrize("weight, which", [("class", "classes"), ("mask", "masks"), ("dice", "dice")])
@torch.no_grad()
def test_so_would_another_weight(generation, weight, which):
    system, output = learning(generation)
    system.config = replace(system.config, **{f"{weight}_weight": 1.0})
    assert wrong(system.loss(output, small_sparse.truth()), generation) == {which}
