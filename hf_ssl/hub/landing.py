"""Export of the trained encoder as a native transformers or timm model that needs none of this package.

Every export is loaded again and compared with our encoder before its folder appears.
"""

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hf_ssl.hub.folders import refuse_foreign_folder, write_whole_folder
from hf_ssl.hub.landing_timm import land_timm
from hf_ssl.hub.landing_video import land_video
from hf_ssl.hub.landing_vit import land_vit
from hf_ssl.hub.locations import locate
from hf_ssl.hub.native import Landing, loading_lines
from hf_ssl.hub.parity import check_parity
from hf_ssl.modeling import method_of
from hf_ssl.modeling.shared.backbone import SSLTimmBackbone
from hf_ssl.modeling.shared.image_processing import SSLImageProcessor
from hf_ssl.modeling.shared.pretraining import SSLForPreTraining, SSLModel, SSLPreTrainedModel
from hf_ssl.modeling.shared.vit import SSLViTBackbone

REPORT_FILE = "export.json"
_PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json")
_FILES = ("config.json", "model.safetensors", *_PROCESSOR_FILES, REPORT_FILE)


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Attributes:
        native_class: class that `AutoModel` builds from the folder.
        folder: where it is.
        max_abs_difference: of features and pooled output between our encoder and the reloaded one, float32.
        notes: what a user of the folder should know; cards print them.
        how_to_load: Python lines that work without this package.
        num_parameters: of our encoder.
    """

    native_class: str
    folder: str
    max_abs_difference: float
    notes: tuple[str, ...]
    how_to_load: tuple[str, ...]
    num_parameters: int


def export_encoder(
    model_or_run_folder: SSLPreTrainedModel | str | Path,
    folder: str | Path,
    processor: SSLImageProcessor | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write the encoder as a native model.

    Args:
        model_or_run_folder: an `<M>Model`, an `<M>ForPreTraining` (its published branch), the folder of a run
            or checkpoint, or a published repository (`owner/name` or `owner/name@revision`).
        folder: target; absent, empty or an earlier export.
        processor: the image processor; None takes the run folder's, else the method's own.
        overwrite: replace whatever the target holds.

    Returns:
        The report; the folder holds it as `export.json`, with "." for its path.

    Raises:
        FileExistsError: the target holds something else.
        FileNotFoundError: the run folder holds no checkpoint.
        ValueError: there is no such folder, the repository needs code of its own, no native class computes
            what the encoder computes, or the reloaded export differs.
    """
    folder = Path(folder).absolute()
    _refuse_to_replace_source(model_or_run_folder, folder)
    refuse_foreign_folder(folder, _FILES, REPORT_FILE, overwrite)
    model, processor, notes = _load(model_or_run_folder, processor)
    backbone = plain_backbone(model)
    _check_channels(backbone, processor)
    landing = choose_landing(backbone, processor)
    differences: list[float] = []
    size = sum(value.numel() for value in backbone.parameters())

    def write(partial: Path) -> None:
        landing.write(partial)
        differences.append(check_parity(backbone, processor, landing, partial))
        # Without the path: the file may be published.
        report = _report(landing, ".", differences[0], notes, size)
        (partial / REPORT_FILE).write_text(json.dumps(asdict(report), indent=2) + "\n")

    write_whole_folder(folder, write)
    return _report(landing, str(folder), differences[0], notes, size)


def choose_landing(backbone: SSLViTBackbone | SSLTimmBackbone, processor: SSLImageProcessor) -> Landing:
    """The native form of an encoder.

    Raises:
        ValueError: there is none.
    """
    if isinstance(backbone, SSLViTBackbone) and backbone.config.is_video:
        return land_video(backbone, processor)
    if isinstance(backbone, SSLViTBackbone):
        return land_vit(backbone, processor)
    return land_timm(backbone, processor)


def _refuse_to_replace_source(source: SSLPreTrainedModel | str | Path, folder: Path) -> None:
    if isinstance(source, str | Path) and Path(source).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"the target {folder} would replace the run it is made from; give another folder")


def _load(
    model_or_run_folder: SSLPreTrainedModel | str | Path, processor: SSLImageProcessor | None
) -> tuple[SSLPreTrainedModel, SSLImageProcessor, list[str]]:
    from transformers import AutoImageProcessor, AutoModel

    model, notes = model_or_run_folder, []
    if isinstance(model, str | Path):
        location = locate(model)
        subfolder = location.subfolder()
        if location.file("config.json", subfolder) is None:
            raise FileNotFoundError(
                f"{location} holds no config.json; give the folder of a run or of a checkpoint"
            )
        model = location.load(AutoModel, subfolder, dtype=torch.float32)
        if processor is None and location.file("preprocessor_config.json", subfolder) is not None:
            processor = location.load(AutoImageProcessor, subfolder)
    if not isinstance(model, SSLModel | SSLForPreTraining):
        raise ValueError(f"{type(model).__name__} is no model of this package; it may be native already")
    if processor is None:
        method = method_of(model.config)
        processor = method.processor_class.for_image_size(model.config.image_size)
        notes.append(
            f"no image processor was given: the folder has {method.prefix}'s own for the training size"
        )
    return model, processor, notes


def plain_backbone(model: SSLPreTrainedModel) -> SSLViTBackbone | SSLTimmBackbone:
    """The encoder's backbone in float32 on the CPU, in eval mode; the model itself is left as it is."""
    branch: Any = model.published_branch() if isinstance(model, SSLForPreTraining) else model
    backbone: SSLViTBackbone | SSLTimmBackbone = (
        copy.deepcopy(branch.backbone).to("cpu", torch.float32).eval()
    )
    backbone.config._attn_implementation = "sdpa"
    return backbone


def _check_channels(backbone: SSLViTBackbone | SSLTimmBackbone, processor: SSLImageProcessor) -> None:
    channels = backbone.config.num_channels
    if processor.do_normalize and len(processor.image_mean) != channels:
        raise ValueError(
            f"the encoder takes {channels} channels, the processor normalises {len(processor.image_mean)}; "
            f"pass a processor with {channels} values of image_mean and image_std"
        )


def _report(
    landing: Landing, folder: str, difference: float, notes: list[str], num_parameters: int
) -> ExportReport:
    return ExportReport(
        landing.native_class,
        folder,
        difference,
        (*notes, *landing.notes),
        tuple(loading_lines(landing.native_class, folder)),
        num_parameters,
    )
