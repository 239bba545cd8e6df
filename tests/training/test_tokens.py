"""Tokenizers and what learns from them: trained, distilled, taken, refused, resumed, landed, continued."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForPreTraining

from hf_ssl.hub import export_encoder
from hf_ssl.modeling import METHODS
from hf_ssl.training.recipes import RecipeError, load_recipe
from hf_ssl.training.run import Run, train
from tests.training.test_trainer import assert_equal_states, state_of

TINY: dict[str, Any] = {
    "image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_steps": 4, "save_steps": 2, "global_batch_size": 8, "per_device_train_batch_size": 8, "bf16": False,
    "eval_strategy": "no", "split": None, "probe_dataset": None, "probe_splits": None,
    "probe_config_names": None, "probe_label_column": None,
}  # fmt: skip
CODES = {"num_codes": 16, "code_size": 4}


def small(method: str, folder: Path, images: Path, **options: Any) -> Run:
    return train(method, output_dir=str(folder), dataset=str(images), **{**TINY, **options})


@pytest.fixture
def tokenizer(image_folder: Path, tmp_path: Path) -> Path:
    options = {**CODES, "image_mean": [0.4, 0.4, 0.4], "image_std": [0.3, 0.3, 0.3]}
    return small("beit_tokenizer", tmp_path / "tokenizer", image_folder, **options).folder


def test_beit_takes_the_tokenizer_whole_with_its_normalisation(
    tokenizer: Path, image_folder: Path, tmp_path: Path
):
    run = small("beit", tmp_path / "run", image_folder, tokenizer=str(tokenizer))
    model: Any = run.trainer.model
    source = METHODS["beit_tokenizer"].pretraining_class.from_pretrained(tokenizer)
    assert_equal_states(model.tokenizer.state_dict(), source.student.state_dict())
    assert model.config.vocab_size == 16
    assert list(run.trainer.processing_class.image_mean) == [0.4, 0.4, 0.4]
    assert load_recipe(str(run.folder / "recipe.yaml")).tokenizer == str(tokenizer)
    assert run.native_class == "BeitModel"
    pixels = torch.rand(2, 3, 16, 16)
    native = AutoModel.from_pretrained(run.folder / "encoder").eval()
    own = AutoModel.from_pretrained(run.folder).eval()
    torch.testing.assert_close(
        native(pixels).last_hidden_state, own(pixels).last_hidden_state, rtol=0, atol=1e-5
    )


def test_images_normalised_in_another_way_than_the_tokenizer_s_are_refused(
    tokenizer: Path, image_folder: Path, tmp_path: Path
):
    with pytest.raises(RecipeError, match=r"trained with image_mean \[0\.4, 0\.4, 0\.4\] and this run"):
        small("beit", tmp_path / "run", image_folder, tokenizer=str(tokenizer), image_mean=[0.5, 0.5, 0.5])


@pytest.mark.parametrize("method", ["beit_tokenizer", "beit"])
def test_runs_resume_bit_for_bit(tokenizer: Path, image_folder: Path, tmp_path: Path, method: str):
    options = {"tokenizer": str(tokenizer)} if method == "beit" else {**CODES, "restart_every": 1}
    whole = small(method, tmp_path / "run", image_folder, **options)
    expected = state_of(whole.trainer)
    resumed = train(resume=str(whole.folder / "checkpoint-2"))
    assert_equal_states(state_of(resumed.trainer), expected)


def test_a_tokenizer_distils_any_encoder(tokenizer: Path, image_folder: Path, tmp_path: Path):
    mae = small("mae", tmp_path / "mae", image_folder, hidden_size=24)
    encoder = mae.folder / "encoder"
    run = small("beit_tokenizer", tmp_path / "run", image_folder, distill_from=str(encoder), **CODES)
    model: Any = run.trainer.model
    native = load_file(encoder / "model.safetensors")
    assert model.distiller.hidden_size == 24
    assert torch.equal(model.distiller.embeddings.cls_token, native["embeddings.cls_token"])
    assert run.native_class == "ViTModel"
    loaded = AutoModelForPreTraining.from_pretrained(run.folder)
    assert torch.equal(loaded.distiller.embeddings.cls_token, native["embeddings.cls_token"])


def test_another_grid_than_the_encoder_distilled_is_refused(image_folder: Path, tmp_path: Path):
    mae = small("mae", tmp_path / "mae", image_folder)
    with pytest.raises(RecipeError, match="has 4 x 4 patches, the encoder trained 2 x 2"):
        small("beit_tokenizer", tmp_path / "run", image_folder, distill_from=str(mae.folder), patch_size=8)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("beit", None, "beit needs a trained tokenizer: train one with `hf-ssl train beit_tokenizer`"),
        ("beit", "mae", "is a hf_ssl_mae and no tokenizer"),
        ("mae", "tokenizer", "tokenizer is for beit; mae predicts no tokens"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tokenizer: Path, image_folder: Path, tmp_path: Path, method: str, given: str | None, message: str
):
    if given == "mae":
        small("mae", tmp_path / "mae", image_folder)
    options = {} if given is None else {"tokenizer": str(tmp_path / given)}
    with pytest.raises(RecipeError, match=message):
        small(method, tmp_path / "run", image_folder, **options)
    assert not (tmp_path / "run").exists()


def test_beit_goes_on_from_its_own_run_without_naming_the_tokenizer_again(
    tokenizer: Path, image_folder: Path, tmp_path: Path
):
    run = small("beit", tmp_path / "run", image_folder, tokenizer=str(tokenizer))
    options = {name: value for name, value in TINY.items() if name not in ("image_size", "patch_size")}
    on = train("beit", output_dir=str(tmp_path / "on"), dataset=str(image_folder), init_from=str(run.folder),
               **{k: v for k, v in options.items() if not k.startswith(("hidden", "num_"))})  # fmt: skip
    model: Any = on.trainer.model
    source: Any = run.trainer.model
    assert_equal_states(model.tokenizer.state_dict(), source.tokenizer.state_dict())


@pytest.mark.parametrize("size", [16, 24])
def test_other_methods_start_from_a_beit_encoder_also_at_another_size(
    tokenizer: Path, image_folder: Path, tmp_path: Path, size: int
):
    run = small("beit", tmp_path / "run", image_folder, tokenizer=str(tokenizer))
    with torch.no_grad():
        model: Any = run.trainer.model
        torch.nn.init.normal_(model.student.backbone.shared_position_bias.relative_position_bias_table)
    export_encoder(model, tmp_path / "encoder", run.trainer.processing_class)
    options = {**TINY, "image_size": size}
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size"):
        del options[name]
    on = train("simclr", output_dir=str(tmp_path / "on"), dataset=str(image_folder), learning_rate=0.0,
               init_from=str(tmp_path / "encoder"), **options)  # fmt: skip
    pixels = torch.rand(2, 3, size, size)
    native = AutoModel.from_pretrained(tmp_path / "encoder").eval()
    backbone: Any = on.trainer.model.published_branch().backbone
    expected = native(pixels).last_hidden_state
    torch.testing.assert_close(backbone.eval()(pixels).last_hidden_state, expected, rtol=0, atol=1e-5)
    assert on.native_class == "BeitModel"
