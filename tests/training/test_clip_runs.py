"""Runs on videos: trained, resumed, scored beside motion, landed, drawn, continued from another run."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hf_ssl.cli.evaluate import evaluate
from hf_ssl.training.figures import draw_run
from hf_ssl.training.probe_data import probe_sources
from hf_ssl.training.recipes import DataArguments, RecipeError
from hf_ssl.training.run import Run, train
from tests.data.test_clips import folder_of_frames
from tests.training.test_trainer import assert_equal_states, state_of

pytest.importorskip("av")

TINY: dict[str, Any] = {
    "image_size": 16, "patch_size": 4, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "predictor_hidden_size": 12, "predictor_num_hidden_layers": 1, "predictor_num_attention_heads": 2,
    "max_steps": 4, "save_steps": 2, "eval_steps": 2, "global_batch_size": 4,
    "per_device_train_batch_size": 2, "bf16": False, "split": None, "probe_dataset": None,
    "probe_splits": None, "probe_config_names": None, "probe_label_column": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of five videos each, of brightness that rises or falls."""
    from tests.data.test_clips import LEVELS, video_of

    folder = tmp_path_factory.mktemp("videos")
    for number in range(10):
        kind = ("falls", "rises")[number % 2]
        (folder / kind).mkdir(exist_ok=True)
        levels = LEVELS[number // 2 :]
        (folder / kind / f"{number}.mp4").write_bytes(video_of(levels if number % 2 else levels[::-1]))
    return folder


@pytest.fixture(scope="module")
def run(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(
        "vjepa", output_dir=str(tmp_path_factory.mktemp("runs") / "run"), dataset=str(videos), **TINY
    )


def test_a_run_is_scored_beside_motion_and_lands(run: Run):
    assert run.native_class == "VJEPA2Model"
    assert (run.folder / "encoder" / "video_preprocessor_config.json").is_file()
    card = (run.folder / "README.md").read_text()
    assert "AutoVideoProcessor" in card and "AutoImageProcessor" not in card


def test_a_run_on_videos_resumes_bit_for_bit(run: Run):
    expected = state_of(run.trainer)
    resumed = train(resume=str(run.folder / "checkpoint-2"))
    assert_equal_states(state_of(resumed.trainer), expected)


def test_clips_and_tubes_are_drawn(run: Run, tmp_path: Path):
    names = {path.stem: path for path in draw_run(str(run.folder), output_dir=str(tmp_path))}
    assert {"clips", "patch_features", "neighbors"} <= names.keys()
    assert "views" not in names and "reconstructions" not in names
    assert Image.open(names["clips"]).height > Image.open(names["clips"]).width


def test_a_run_continues_from_another_with_everything(run: Run, videos: Path, tmp_path: Path):
    options = {**TINY, "max_steps": 2, "learning_rate": 0.0, "weight_decay": 0.0}
    options |= {"teacher_momentum": 1.0, "teacher_momentum_end": 1.0}
    going_on = train(
        "vjepa", output_dir=str(tmp_path / "next"), dataset=str(videos), init_from=str(run.folder), **options
    )
    assert_equal_states(going_on.trainer.model.state_dict(), run.trainer.model.state_dict())


def test_folders_of_frames_are_trained_on_and_scored_as_clips(tmp_path: Path):
    folder = folder_of_frames(tmp_path / "frames", {f"{kind}/{n}": 9 + n for kind in "ab" for n in range(5)})
    options = {**TINY, "max_steps": 2, "image_column": "frames"}
    run = train("vjepa", output_dir=str(tmp_path / "run"), dataset=str(folder), **options)
    assert run.scores is not None and run.scores.protocol["train_images"] == 8
    assert "pixels motion" in {row.features for row in run.scores.rows}


def test_data_that_are_named_for_training_and_probe_alike_have_one_column(tmp_path: Path):
    clips = {f"{split}/{kind}/{n}": 3 for split in ("train", "test") for kind in "ab" for n in range(2)}
    folder = str(folder_of_frames(tmp_path, clips))
    pair = probe_sources(DataArguments(dataset=folder, probe_dataset=folder, image_column="frames"))
    assert pair is not None and [source.num_rows for source in pair] == [4, 4]
    other = probe_sources(DataArguments(dataset="sample", probe_dataset=folder, image_column="frames"))
    assert other is not None and [source.num_rows for source in other] == [12, 12]


def test_a_method_of_images_refuses_videos(videos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    sizes = {"image_size": 16, "global_batch_size": 4, "per_device_train_batch_size": 4, "max_steps": 2}
    names = ("split", "probe_dataset", "probe_splits", "probe_config_names", "probe_label_column")
    with pytest.raises(ValueError, match="no readable image"):
        train(
            "mae",
            output_dir=str(tmp_path / "run"),
            dataset=str(videos),
            **sizes,
            **dict.fromkeys(names),
        )
    assert "this is a video; only recipes whose view has `frames` take videos" in caplog.text


def test_a_view_without_frames_is_refused_for_clips(videos: Path, tmp_path: Path):
    views = [{"count": 1, "kind": "global", "crop": {"scale": [0.5, 1.0]}, "transforms": []}]
    with pytest.raises(RecipeError, match="frames"):
        train("vjepa", output_dir=str(tmp_path / "run"), dataset=str(videos), views=views, **TINY)


def test_a_recipe_without_data_asks_for_yours(tmp_path: Path):
    with pytest.raises(RecipeError, match="names no data; give yours with --dataset"):
        train("vjepa", recipe="vjepa_small", output_dir=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_fine_tuning_on_clips_is_refused(run: Run, videos: Path):
    with pytest.raises(ValueError, match="--fine_tune is for encoders of images"):
        evaluate(str(run.folder), dataset=str(videos), limit=4, fine_tune=1.0)
