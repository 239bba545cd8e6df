"""Every published ViT that can be started from gives its features exactly, at its own grid and at another."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from hf_ssl.training.frozen_parts import build_model
from hf_ssl.training.recipes import Recipe, RecipeError, load_recipe, override
from hf_ssl.training.starting_points import with_start
from tests.modeling.tiny import BY_NAME

SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 4,
}  # fmt: skip
NATIVE = [
    ("ViT", {"intermediate_size": 40, "layer_norm_eps": 1e-12, "hidden_act": "gelu_new"}),
    ("ViT", {"intermediate_size": 64, "qkv_bias": False}),
    ("ViTMAE", {"intermediate_size": 64}),
    ("ViTMSN", {"intermediate_size": 64}),
    ("IJepa", {"intermediate_size": 64}),
    ("Dinov2", {"layerscale_value": 0.3}),
    ("Dinov2", {"use_swiglu_ffn": True}),
    ("Dinov2WithRegisters", {"num_register_tokens": 3}),
]


def save_native(folder: Path, kind: str, **options: Any) -> Any:
    """A random model of a native class, no tensor of which is as it starts."""
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **options})
    model = getattr(transformers, f"{kind}Model")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape, generator=generator), alpha=0.2)
    model.save_pretrained(folder)
    return model


def started(start: str | Path, method: str, **changes: Any) -> Any:
    """The model of a run of the tiny recipe that starts there."""
    recipe = with_start(load_recipe(f"{method}_tiny"), str(start), adopt_model=True)
    recipe = override(recipe, changes)
    return build_model(recipe, recipe.config()).eval()


def features(model: Any, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return model.published_branch().backbone(pixels).last_hidden_state


def native_features(native: Any, pixels: Tensor) -> Tensor:
    options: dict[str, Any] = {}
    kind = native.config.model_type
    if kind == "vit_mae":
        native.config.mask_ratio = 0.0
        options["noise"] = torch.arange((pixels.shape[-1] // 4) ** 2, dtype=torch.float32).expand(
            len(pixels), -1
        )
    if not kind.startswith("dinov2"):
        options["interpolate_pos_encoding"] = True
    with torch.no_grad():
        return native(pixels, **options).last_hidden_state


@pytest.mark.parametrize("side", [16, 24])
@pytest.mark.parametrize(("kind", "options"), NATIVE, ids=lambda value: str(value))
def test_a_native_vit_gives_its_features(tmp_path: Path, kind: str, options: dict[str, Any], side: int):
    native = save_native(tmp_path, kind, **options)
    model = started(tmp_path, "simclr", image_size=side)
    assert model.config.backbone_config.image_size == side
    pixels = torch.rand(2, 3, side, side)
    torch.testing.assert_close(features(model, pixels), native_features(native, pixels), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["dino", "ibot", "dinov2", "moco", "mocov3", "mae"])
@pytest.mark.parametrize("kind", ["ViT", "Dinov2"])
def test_every_method_takes_it_into_all_its_branches(tmp_path: Path, method: str, kind: str):
    native = save_native(tmp_path, kind)
    model = started(tmp_path, method)
    pixels = torch.rand(2, 3, 16, 16)
    expected = native_features(native, pixels)
    for branch in [model.student, *([model.teacher] if model.has_teacher else [])]:
        found = branch.backbone(pixels).last_hidden_state
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert model.starts_with_fresh_heads


def save_timm(folder: Path, architecture: str) -> Any:
    network = timm.create_model(architecture, num_classes=0).eval()
    save_file(network.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    described = {"architecture": architecture, "num_classes": 0, "pretrained_cfg": network.pretrained_cfg}
    (folder / "config.json").write_text(json.dumps(described))
    return network


@pytest.mark.parametrize("architecture", ["test_vit", "vit_small_patch14_reg4_dinov2"])
def test_a_vit_of_timm_gives_its_features(tmp_path: Path, architecture: str):
    network = save_timm(tmp_path, architecture)
    model = started(tmp_path, "dinov2", num_prototypes=24)
    side = network.patch_embed.img_size[0]
    pixels = torch.rand(1, 3, side, side)
    with torch.no_grad():
        expected = network.forward_features(pixels)
    torch.testing.assert_close(features(model, pixels), expected, rtol=0, atol=1e-5)


def test_a_vit_of_timm_without_a_last_norm_stays_timm_s(tmp_path: Path):
    save_timm(tmp_path, "test_vit2")
    recipe = with_start(load_recipe("simclr_tiny"), str(tmp_path), adopt_model=True)
    assert recipe.model["backbone_config"]["architecture"] == "test_vit2"
    with pytest.raises(RecipeError, match="needs a ViT backbone"):
        with_start(load_recipe("dinov2_tiny"), str(tmp_path), adopt_model=True).config()


def test_the_size_and_normalisation_of_its_processor_are_taken(tmp_path: Path):
    save_native(tmp_path, "Dinov2", image_size=56, patch_size=14)
    transformers.ViTImageProcessor(
        size={"height": 28, "width": 28}, image_mean=[0.1, 0.2, 0.3]
    ).save_pretrained(tmp_path)
    recipe = with_start(load_recipe("dinov2_tiny"), str(tmp_path), adopt_model=True)
    assert recipe.config().image_size == 28
    assert recipe.processor["image_mean"] == [0.1, 0.2, 0.3]
    assert [view.get("size", 28) for view in recipe.processor["views"]] == [28, 28, 14]


def test_a_named_recipe_keeps_its_views_and_normalises_as_the_encoder(tmp_path: Path):
    save_native(tmp_path, "ViT", intermediate_size=64)
    transformers.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    recipe = load_recipe("dinov2_tiny")
    started_there = with_start(recipe, str(tmp_path), adopt_model=False)
    assert started_there.processor["image_mean"] == [0.1, 0.2, 0.3]
    assert started_there.processor["views"] == recipe.processor["views"]
    assert started_there.model == recipe.model
    recipe.processor["image_mean"] = [0.4, 0.4, 0.4]
    assert with_start(recipe, str(tmp_path), adopt_model=False).processor["image_mean"] == [0.4, 0.4, 0.4]


def test_the_backbone_of_another_method_is_taken(tmp_path: Path):
    source = BY_NAME["mae"].build(seed=3)
    source.save_pretrained(tmp_path)
    model = started(tmp_path, "simclr")
    pixels = torch.rand(2, 3, 16, 16)
    assert torch.equal(features(model, pixels), features(source.eval(), pixels))


def test_a_named_recipe_with_other_heads_of_attention_is_refused(tmp_path: Path):
    save_native(tmp_path, "ViT", intermediate_size=64)
    model = override(
        load_recipe("simclr_tiny"), {"model_type": "hf_ssl_vit", **SIZES, "num_attention_heads": 2}
    )
    recipe = replace(model, init_from=str(tmp_path))
    with pytest.raises(RecipeError, match=r"computes other features \(by .*num_attention_heads"):
        build_model(recipe, recipe.config())


@pytest.mark.parametrize(
    ("kind", "reason"), [("DINOv3ViT", "turns its queries and keys"), ("DeiT", "has a distillation token")]
)
def test_what_our_vit_cannot_compute_is_refused_in_one_line(tmp_path: Path, kind: str, reason: str):
    sizes = {"intermediate_size": 64}
    save_native(tmp_path, kind, **sizes)
    recipe = load_recipe("dinov2_tiny")
    with pytest.raises(RecipeError, match=f"cannot start from .*{reason}.*start from a vit") as error:
        with_start(recipe, str(tmp_path), adopt_model=True)
    assert "\n" not in str(error.value)
    with pytest.raises(RecipeError, match=reason):
        build_model(Recipe("tiny", "dinov2", init_from=str(tmp_path)), recipe.config())
