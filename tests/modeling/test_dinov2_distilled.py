"""Distillation of DINOv2 into a smaller student (Oquab et al. 2023, section 5)."""

from typing import Any

import pytest
import torch

from hf_ssl.modeling.dinov2 import DINOv2Config, DINOv2ForPreTraining
from tests.modeling.tiny import BY_NAME

ROW = BY_NAME["dinov2-distilled"]
THERE: dict[str, Any] = ROW.options["distiller_config"]


def trained_teacher() -> Any:
    """A larger model that has been trained, by its looks."""
    torch.manual_seed(9)
    model = DINOv2ForPreTraining(DINOv2Config(**THERE)).train()
    with torch.no_grad():
        for value in model.teacher.parameters():
            value.add_(torch.rand_like(value), alpha=0.1)
        model.center.value.add_(torch.rand_like(model.center.value))
    return model


def step(model: Any, batch: dict[str, Any], number: int = 0) -> Any:
    """One step of the protocol, without an optimizer."""
    model.begin_step(number, 10, seed=1)
    model.prepare_step([batch])
    return model(**batch, row_index=torch.arange(len(batch["pixel_values"])))


def test_targets_are_those_of_the_frozen_teacher_alone():
    source, model, batch = trained_teacher(), ROW.build(), ROW.batch(4)
    model.take_distiller(source)
    source.begin_step(0, 10, seed=1)
    source.prepare_step([batch])
    step(model, batch)
    rows = torch.arange(4)
    theirs = source._class_targets.of_rows(rows, source.teacher.head.prototypes.weights()).statistics()
    own = model._class_targets.of_rows(rows, model.distiller.head.prototypes.weights()).statistics()
    assert all(torch.equal(own[name], theirs[name]) for name in theirs)
    with torch.no_grad():
        before = step(model, batch).loss
        for value in model.teacher.parameters():
            value.add_(torch.randn_like(value))
        assert torch.equal(step(model, batch).loss, before)  # the average makes no targets
        for value in model.distiller.backbone.parameters():
            value.add_(torch.randn_like(value))
        assert not torch.equal(step(model, batch).loss, before)


def test_the_student_sees_its_views_whole_and_learns_the_chosen_patches():
    model, batch = ROW.build(), ROW.batch(4)
    seen = []
    forward = model.student.backbone.forward

    def look(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("bool_masked_pos"))
        return forward(*args, **kwargs)

    model.student.backbone.forward = look
    outputs = step(model, batch)
    assert seen and all(mask is None for mask in seen)
    assert outputs.is_masked.any() and outputs.parts["patch_loss"] > 0


def test_a_step_moves_the_average_and_never_the_frozen_teacher():
    model, batch = ROW.build(), ROW.batch(4)
    frozen = {name: value.clone() for name, value in model.distiller.state_dict().items()}
    step(model, batch).loss.backward()
    assert all(value.grad is None for value in model.distiller.parameters())
    assert not any(value.requires_grad for value in model.distiller.parameters())
    assert not model.distiller.training
    weight = model.student.backbone.layernorm.weight
    average = model.teacher.backbone.layernorm.weight.clone()
    with torch.no_grad():
        weight.add_(1.0)
    model.end_step([{}])
    momentum = model.config.teacher_momentum
    torch.testing.assert_close(
        model.teacher.backbone.layernorm.weight, momentum * average + (1 - momentum) * weight
    )
    assert all(torch.equal(value, frozen[name]) for name, value in model.distiller.state_dict().items())


def test_the_encoder_is_the_small_average():
    model = ROW.build()
    assert model.published_branch() is model.teacher
    assert model.teacher.backbone.hidden_size == 16 and model.distiller.backbone.hidden_size == 24


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"num_prototypes": 12}, "num_prototypes is 12 and the frozen teacher's 24"),
        ({"backbone_config": {"patch_size": 8}}, "patch_size is 8 and the frozen teacher's 4"),
        ({"separate_patch_head": True}, "separate_patch_head is True"),
    ],
)
def test_a_teacher_with_other_prototypes_or_patches_is_refused(changes: dict[str, Any], name: str):
    with pytest.raises(Exception, match=name):
        ROW.config(**changes)


def test_a_teacher_of_another_size_is_refused():
    with pytest.raises(ValueError, match="the frozen teacher is not as distiller_config says"):
        ROW.build().take_distiller(BY_NAME["dinov2"].build())
    with pytest.raises(ValueError, match="has no frozen teacher"):
        BY_NAME["dinov2"].build().take_distiller(trained_teacher())
