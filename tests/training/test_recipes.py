"""Recipes: every key by its plain name, what is unknown refused with the nearest name."""

from pathlib import Path
from typing import Any

import pytest

from hf_ssl.evaluation.features import POOLS
from hf_ssl.modeling import METHODS
from hf_ssl.training.recipes import (
    RecipeError,
    known_keys,
    load_recipe,
    override,
    recipe_names,
    training_arguments,
)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_builds_its_config_arguments_and_processor(name: str, tmp_path: Path):
    recipe = load_recipe(name)
    config = recipe.config()
    args = training_arguments(recipe, str(tmp_path))
    assert args.global_batch_size == recipe.training.get("global_batch_size", args.global_batch_size)
    processor = METHODS[recipe.method].processor_class.for_image_size(config.image_size, **recipe.processor)
    assert processor.views
    assert set(recipe.data.probe_pools or []) <= set(POOLS)
    assert config.image_size == processor.views[0]["size"]


@pytest.mark.parametrize("name", recipe_names())
def test_a_saved_recipe_means_the_same(name: str, tmp_path: Path):
    recipe = override(load_recipe(name), {"seed": 7})
    recipe.init_from = "somewhere"
    recipe.save(tmp_path / "recipe.yaml")
    loaded = load_recipe(str(tmp_path / "recipe.yaml"))
    assert loaded == recipe and loaded.name == name
    assert loaded.config().to_dict() == recipe.config().to_dict()
    assert training_arguments(loaded, "x").to_dict() | {"logging_dir": 0} == training_arguments(
        recipe, "x"
    ).to_dict() | {"logging_dir": 0}


@pytest.mark.parametrize(
    ("name", "rate", "decays_norms"),
    [
        ("simclr", 4.8, False),
        ("moco", 0.03, True),
        ("moco_v1", 0.03, True),
        ("mocov3", 2.4e-3, True),
        ("mocov3_resnet50", 9.6, False),
        ("mae", 2.4e-3, False),
        ("dino", 2e-3, False),
        ("ijepa", 1e-3, False),
        ("beit_tokenizer", 2e-4, False),
    ],
)
def test_published_recipes_have_the_published_rate_and_groups(
    name: str, rate: float, decays_norms: bool, tmp_path: Path
):
    """Mistakes 24 and 53: the rate follows from images and not from views, and nothing is clipped."""
    args = training_arguments(load_recipe(name), str(tmp_path))
    assert args.learning_rate == pytest.approx(rate)
    assert (args.decay_norms_and_biases, args.max_grad_norm) == (decays_norms, 0)


def test_beit_is_trained_as_published(tmp_path: Path):
    args = training_arguments(load_recipe("beit"), str(tmp_path))
    assert (args.learning_rate, args.learning_rate_end, args.adam_beta2) == (1.5e-3, 1e-5, 0.98)
    assert (args.max_grad_norm, args.clip_mode, args.weight_decay) == (3.0, "global", 0.05)
    config = load_recipe("beit").config()
    assert (config.num_hidden_patches(196), config.vocab_size) == (75, 8192)
    assert config.encoder_config.drop_path_rate == 0


@pytest.mark.parametrize(
    ("name", "rate", "clip", "layer_decay"),
    [
        ("ibot", 2e-3, "per_tensor", 1.0),
        ("dinov2", 4e-3 * 2**0.5, "per_module", 0.9),
        ("dinov2_vitl14", 2e-4 * 3**0.5, "per_module", 1.0),
    ],
)
def test_self_distillation_is_clipped_and_scaled_as_published(
    name: str, rate: float, clip: str, layer_decay: float, tmp_path: Path
):
    """Mistake 35: DINOv2's rate grows with the root of the batch, from 1,024 images on."""
    args = training_arguments(load_recipe(name), str(tmp_path))
    assert args.learning_rate == pytest.approx(rate)
    assert (args.max_grad_norm, args.clip_mode, args.layer_decay) == (3.0, clip, layer_decay)


@pytest.mark.parametrize(
    ("name", "rate", "end", "clip", "warmup", "frozen", "epochs"),
    [
        ("dino_vitb16", 3e-3, 2e-6, 0.3, 50, 3, 400),
        ("ibot_vitb16", 2e-3, 1e-6, 3.0, 30, 1, 400),
        ("ibot_vitl16", 2e-3, 1e-6, 3.0, 30, 1, 250),
    ],
)
def test_larger_vits_of_dino_and_ibot_are_trained_as_published(
    name: str, rate: float, end: float, clip: float, warmup: int, frozen: int, epochs: int, tmp_path: Path
):
    recipe = load_recipe(name)
    args, config = training_arguments(recipe, str(tmp_path)), recipe.config()
    assert args.learning_rate == pytest.approx(rate)
    assert args.learning_rate * args.learning_rate_end == pytest.approx(end)
    assert (args.max_grad_norm, args.clip_mode, args.num_train_epochs) == (clip, "per_tensor", epochs)
    assert config.teacher_temperature_warmup * epochs == pytest.approx(warmup)
    assert config.freeze_prototypes * epochs == pytest.approx(frozen)
    assert not config.train_prototype_scale and config.backbone_config.drop_path_rate == 0.1
    assert [view["count"] for view in recipe.processor["views"]] == [1, 1, 10]


def test_every_method_has_a_tiny_recipe():
    assert {f"{method}_tiny" for method in METHODS} <= set(recipe_names())


def test_plain_names_find_their_section():
    recipe = load_recipe("mae_tiny")
    changed = override(
        recipe,
        {
            "mask_ratio": "0.5",
            "num_hidden_layers": "3",
            "dataset": "some/folder",
            "max_steps": "1e2",
            "image_mean": "[0.5, 0.5, 0.5]",
            "eval_strategy": "no",
            "learning_rate": "1e-4",
        },
    )
    assert changed.model["mask_ratio"] == 0.5
    assert changed.config().backbone_config.num_hidden_layers == 3
    assert changed.data.dataset == "some/folder"
    assert changed.training["max_steps"] == 100 and type(changed.training["max_steps"]) is int
    assert changed.processor["image_mean"] == [0.5] * 3
    args = training_arguments(changed, "x")
    assert args.eval_strategy == "no" and args.learning_rate == 1e-4
    assert "mask_ratio" not in recipe.model or recipe.model["mask_ratio"] != 0.5  # left as it was


def test_another_kind_of_backbone_starts_from_its_own_defaults():
    options = {"model_type": "hf_ssl_vit", "hidden_size": 24, "num_attention_heads": 2, "image_size": 16}
    changed = override(load_recipe("simclr_tiny"), options | {"patch_size": 4, "num_hidden_layers": 1})
    assert changed.config().backbone_config.hidden_size == 24
    with pytest.raises(RecipeError, match="unknown key 'architecture'"):
        override(changed, {"architecture": "resnet18"})


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("base_learning_rate", "learning_rate"),
        ("warmup_epochs", "warmup_steps"),
        ("max_steps", "num_train_epochs"),
    ],
)
def test_a_new_value_wins_over_its_rival(first: str, second: str):
    """A recipe's max_steps would otherwise make --num_train_epochs do nothing."""
    for kept, dropped in ((first, second), (second, first)):
        recipe = override(load_recipe("mae_tiny"), {dropped: 1})
        changed = override(recipe, {kept: 2})
        assert changed.training[kept] == 2 and dropped not in changed.training
    with pytest.raises(RecipeError, match=f"{first} and {second} decide the same thing"):
        override(load_recipe("mae_tiny"), {first: 1, second: 1})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("temperatur", 1, "unknown key 'temperatur'; did you mean 'temperature'"),
        ("hiden_size", 1, "unknown key 'hiden_size'"),
        ("default_backbone", {}, "unknown key 'default_backbone'"),
        ("optim", "sgd", "'optim' has no effect here; use optimizer"),
        ("max_steps", "many", "max_steps must be a whole number, got 'many'"),
        ("probe_limit", "x", "probe_limit must be a whole number, got 'x'"),
        ("model_type", "vitt", "unknown model_type 'vitt'"),
    ],
)
def test_wrong_overrides_are_refused(key: str, value: Any, message: str):
    with pytest.raises(RecipeError, match=message):
        override(load_recipe("simclr_tiny"), {key: value})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: simclrr", "unknown method 'simclrr'; did you mean 'simclr'"),
        ("method: simclr\ntrainig: {}", "unknown section of file.yaml 'trainig'; did you mean 'training'"),
        ("method: simclr\ntraining: {max_step: 1}", "unknown key of section training 'max_step'"),
        ("method: simclr\ndata: {datset: x}", "unknown key of section data 'datset'; did you mean 'dataset'"),
        ("method: simclr\nprocessor: {vews: []}", "unknown key of section processor 'vews'"),
        ("method: simclr\ntraining: [1]", "section training must be a mapping"),
        ("- a list", "must be a mapping with a 'method'"),
        ("a: b: c", "is no valid YAML"),
        (
            "method: !!python/object/apply:os.system [exit]",
            "is no valid YAML: could not determine a constructor",
        ),
        ("method: !!python/name:os.system", "is no valid YAML: could not determine a constructor"),
        ("method: simclr\ntraining: {max_steps: abc}", "max_steps must be a whole number"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, text: str, message: str):
    file = tmp_path / "file.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(str(file))
    assert "\n" not in str(caught.value)


def test_wrong_recipe_name_is_refused_with_the_nearest():
    with pytest.raises(RecipeError, match="unknown recipe 'simclr_tini'; did you mean 'simclr_tiny'"):
        load_recipe("simclr_tini")


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("mae", {"image_size": 33}, "image_size 33 is not a multiple of patch_size"),
        ("simclr", {"temperature": -1}, "temperature"),
        ("simclr", {"temperature": "hot"}, "temperature"),
        ("mae", {"mask_ratio": 1.5}, "mask_ratio"),
    ],
)
def test_values_out_of_range_are_refused_in_one_line(method: str, values: dict[str, Any], message: str):
    with pytest.raises(RecipeError, match=message) as caught:
        override(load_recipe(f"{method}_tiny"), values).config()
    assert "\n" not in str(caught.value)


def test_wrong_arguments_are_refused_in_one_line():
    recipe = override(load_recipe("mae_tiny"), {"eval_strategy": "sometimes"})
    with pytest.raises(RecipeError, match="sometimes") as caught:
        training_arguments(recipe, "x")
    assert "\n" not in str(caught.value)


def test_known_keys_are_those_that_override_takes():
    for method in METHODS:
        for section, keys in known_keys(method).items():
            assert keys, section
    assert "temperature" in known_keys("simclr")["model"]
    assert "patch_size" in known_keys("mae")["backbone"]


def test_views_follow_an_overridden_image_size():
    recipe = override(load_recipe("simclr_small"), {"image_size": 96, "small_stem_stride": 0})
    config = recipe.config()
    processor = METHODS["simclr"].processor_class.for_image_size(config.image_size, **recipe.processor)
    assert [view["size"] for view in processor.views] == [96]
