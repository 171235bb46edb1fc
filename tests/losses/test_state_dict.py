"""A state_dict says under which hyper-parameters it was learned; a module that has others says so when it loads it."""

from __future__ import annotations

import copy
import io
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from helpers.refusals import warned

import ltloss
from ltloss.distributed import (
    add_classes,
    export_safetensors,
    import_safetensors,
    load_checkpoint,
    parallelize,
    save_checkpoint,
)
from ltloss.testing import MODULES


def through_a_file(state: object) -> OrderedDict[str, torch.Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("way", [lambda state: state, copy.deepcopy, through_a_file])
def test_other_hyper_parameters_are_named_with_both_values(way: object) -> None:
    saved = way(ltloss.CombinedMarginLoss(9, 5, scale=64.0, angular_margin=torch.linspace(0.1, 0.4, 9)).state_dict())  # type: ignore[operator]
    module = ltloss.CombinedMarginLoss(9, 5, scale=16.0, angular_margin=0.3)
    with warned("scale=16", "64", "angular_margin=0.3", "(9,)", "[0.1, 0.4]", kind=UserWarning):
        module.load_state_dict(saved)
    assert torch.equal(module.weight, saved["weight"])
    assert (module.scale, module.angular_margin) == (16.0, 0.3)


@pytest.mark.parametrize("name", MODULES)
def test_equal_ones_load_without_a_word(name: str) -> None:
    saved = through_a_file(MODULES[name](9, 5).state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MODULES[name](9, 5).load_state_dict(saved)
        MODULES[name](9, 5).load_state_dict(dict(saved))  # as version 0.1 saved it, and as other formats keep it
        MODULES[name](9, 5, device="meta").load_state_dict(saved, assign=True)


def test_another_update_of_the_centres_is_named() -> None:
    saved = ltloss.CosineSpaceLoss(9, 5).state_dict()
    with warned("center_update='ema'", "'mean'", "center_momentum=0.5", "0.9", kind=UserWarning):
        ltloss.CosineSpaceLoss(9, 5, center_update="ema", center_momentum=0.5).load_state_dict(saved)


def test_what_was_set_later_counts() -> None:
    module, other = ltloss.ArcFaceLoss(9, 5, scale=8.0), ltloss.ArcFaceLoss(9, 5, scale=8.0)
    module.scale = 12.0
    with warned("scale=8", "12", kind=UserWarning):
        other.load_state_dict(module.state_dict())


def test_schedules_are_no_difference() -> None:
    module, other = ltloss.ArcFaceLoss(9, 5), ltloss.ArcFaceLoss(9, 5)
    module.set_class_weight(torch.arange(1.0, 10.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(module.state_dict())


def test_a_function_of_the_length_has_a_name() -> None:
    """Not its address, which is another one in every process."""
    make = lambda g: ltloss.LongTailLoss.from_counts([3, 1], 5, feature_norm=g)  # noqa: E731
    saved = make(torch.reciprocal).state_dict()
    assert " at 0x" not in repr(make(lambda r: r))
    with warned("feature_norm", "reciprocal", kind=UserWarning):
        make(torch.sqrt).load_state_dict(saved)


def test_inside_of_a_model() -> None:
    build = lambda scale: torch.nn.ModuleDict({"head": ltloss.CosFaceLoss(9, 5, scale=scale)})  # noqa: E731
    saved = torch.nn.DataParallel(build(8.0)).state_dict()
    torch.nn.modules.utils.consume_prefix_in_state_dict_if_present(saved, "module.")
    with warned("scale=4", "8", kind=UserWarning):
        build(4.0).load_state_dict(saved)


def test_on_the_meta_device() -> None:
    module = ltloss.LongTailLoss.from_counts([3, 1], 5).to("meta")
    assert list(module.state_dict()) == ["weight"]
    assert "angular_margin=(2,) in" in repr(module)


def test_files_of_our_own(tmp_path: Path) -> None:
    head, same, other = (ltloss.ArcFaceLoss(9, 5, scale=scale) for scale in (8.0, 8.0, 4.0))
    sharded = parallelize(ltloss.ArcFaceLoss(9, 5, scale=4.0, device="meta"), None)
    save_checkpoint(tmp_path / "checkpoint", {"head": head})
    export_safetensors(head, tmp_path / "head.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(tmp_path / "checkpoint", {"head": same})
        import_safetensors(same, tmp_path / "head.safetensors")
    for module in (other, sharded):
        with warned("scale=4", "8", kind=UserWarning):
            load_checkpoint(tmp_path / "checkpoint", {"head": module})
        with warned("scale=4", "8", kind=UserWarning):
            import_safetensors(module, tmp_path / "head.safetensors")
        assert torch.equal(module.weight, head.weight)


def test_more_classes_keep_their_constants() -> None:
    larger = add_classes(ltloss.LDAMLoss.from_counts([16, 1], 8), 1, cosine_margin=torch.tensor([0.1, 0.2, 0.3]))
    assert torch.equal(larger.double().cosine_margin, torch.tensor([0.1, 0.2, 0.3]))
