"""All pictures of one run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from hf_ssl.data.clips import ClipMaker, decode_clip, frames_of
from hf_ssl.data.decoding import decode_image
from hf_ssl.data.readers import load_image
from hf_ssl.data.sources import open_images
from hf_ssl.data.view_recipe import FramesSpec
from hf_ssl.data.views import ViewMaker
from hf_ssl.evaluation.features import FeatureExtractor
from hf_ssl.evaluation.images import read_rows
from hf_ssl.hub.cards import RECIPE_FILE
from hf_ssl.modeling.shared.configuration import SSLViTConfig
from hf_ssl.pictures.agreement import draw_agreement
from hf_ssl.pictures.attention import draw_attention
from hf_ssl.pictures.clips import draw_clips
from hf_ssl.pictures.curves import draw_history
from hf_ssl.pictures.neighbors import draw_neighbors
from hf_ssl.pictures.patch_pca import draw_patch_pca
from hf_ssl.pictures.reconstructions import draw_reconstructions
from hf_ssl.pictures.tokens import draw_tokens
from hf_ssl.pictures.views import draw_views
from hf_ssl.training.micro_batches import normalize_bytes
from hf_ssl.training.probe_data import probe_sources
from hf_ssl.training.recipes import RecipeError, load_recipe
from hf_ssl.training.run import open_sources
from hf_ssl.training.texts import takes_texts

NUM_IMAGES = 6
NUM_CLIPS = 3
NUM_NEIGHBORS = 6
NUM_GALLERY = 1000


class _Figures:
    """A run's model, processor and images, loaded once for all pictures.

    Args:
        folder: of the run.
        images: other images than those it was trained on, see `draw_run`.
        size: side in pixels of what `patch_features` and `attention` see.
    """

    def __init__(self, folder: Path, images: str | None = None, size: int | None = None) -> None:
        from transformers import AutoImageProcessor, AutoModelForPreTraining

        self.recipe = load_recipe(str(folder / RECIPE_FILE))
        self.folder = folder
        self.processor = AutoImageProcessor.from_pretrained(folder)
        self.model: Any = AutoModelForPreTraining.from_pretrained(folder).eval()
        self.backbone = self.model.published_branch().backbone
        config = self.model.config.backbone_config
        self.vit_config = config if isinstance(config, SSLViTConfig) else None
        if self.vit_config is not None:
            self.model.set_attn_implementation("eager")  # which returns its weights
        source = open_sources(self.recipe.data)[0] if images is None else open_images(images)
        self.frames = frames_of(self.processor)
        self.rows = _rows(source, NUM_IMAGES)
        self.images = [self.decode(row) for row in self.rows]
        self.size = int(self.model.config.image_size) if size is None else size
        self._check(images, size)

    def _check(self, images: str | None, size: int | None) -> None:
        if self.vit_config is None:
            if images is not None or size is not None:
                raise RecipeError(
                    "images and size are for pictures of patches, which a CNN has none of; leave both out"
                )
        elif self.size < 1 or self.size % self.vit_config.patch_size:
            raise RecipeError(
                f"size {self.size} is no multiple of the patch size {self.vit_config.patch_size}"
            )

    def pixel_values(self, images: list[Any], **kwargs: Any) -> Tensor:
        """Images as the encoder takes them (B, C, H, W)."""
        pictures = [Image.fromarray(image) for image in images]
        return self.processor(images=pictures, return_tensors="pt", **kwargs)["pixel_values"]

    def squares(self) -> list[Any]:
        """The middle of every image at `size`: what the encoder sees, and what patches are drawn beside."""
        size = (self.size, self.size)
        return [np.asarray(ImageOps.fit(Image.fromarray(image), size)) for image in self.images]

    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of the squares."""
        assert self.vit_config is not None
        return (self.size // self.vit_config.patch_size,) * 2

    def outputs_of_squares(self, **kwargs: Any) -> Any:
        """What the ViT makes of the squares."""
        with torch.no_grad():
            pixels = self.pixel_values(self.squares(), do_resize=False, do_center_crop=False)
            return self.backbone(pixels, **kwargs)

    def decode(self, row: dict[str, Any]) -> Any:
        """A row's image, or the middle frame of its video."""
        data = load_image(row["image"])
        return decode_image(data) if self.frames is None else decode_clip(data, FramesSpec(1, 1))[0]

    def clips(self) -> Image.Image | None:
        """Clips, what tubes leave of them, and predicted beside true tokens; for methods of video."""
        if self.frames is None:
            return None
        maker, seed = ClipMaker(self.processor.views), int(self.recipe.training.get("seed", 42))
        seeds = [(seed, 0, number) for number in range(NUM_CLIPS)]
        data = [load_image(row["image"]) for row in self.rows[:NUM_CLIPS]]
        decoded = [maker.decode(clip, each) for clip, each in zip(data, seeds, strict=False)]
        [clips] = maker.make_batch(decoded, seeds[: len(decoded)])
        pixels = normalize_bytes(clips, self.processor.image_mean, self.processor.image_std)
        kinds, grid = self.model.agreement_of_clips(pixels)
        return draw_clips(clips, kinds, grid)

    def views(self) -> Image.Image | None:
        """Training views with their crop boxes; of images."""
        if self.frames is not None:
            return None
        seed = int(self.recipe.training.get("seed", 42))
        return draw_views(self.images[:4], ViewMaker(self.processor.views), seed)

    def reconstructions(self) -> Image.Image | None:
        """Hidden patches and what the decoder makes of them; for methods that predict pixels."""
        views = self.processor.views
        needs_more = self.frames is not None or takes_texts(self.recipe)  # than one image
        if len(views) != 1 or views[0]["count"] != 1 or needs_more:
            return None
        pixel_values = self.pixel_values(self.images)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            outputs = self.model(pixel_values)
        if outputs.predictions is None:
            return None
        return draw_reconstructions(
            pixel_values,
            outputs.is_masked,
            outputs.predictions,
            image_mean=self.processor.image_mean,
            image_std=self.processor.image_std,
            normalized_patches=getattr(self.model.config, "normalize_targets", False),
        )

    def tokens(self) -> Image.Image | None:
        """Visual tokens, and those named for hidden patches; for methods that predict them."""
        if not hasattr(self.model, "name_tokens"):
            return None
        squares, pixel_values, grid = self._training_squares()
        is_masked = self.model.draw_masks(torch.arange(len(squares)), grid, (0, 0))
        return draw_tokens(
            squares,
            self.model.tokens(pixel_values),
            self.model.name_tokens(pixel_values, is_masked),
            is_masked,
            self.model.tokenizer.head.codebook.vectors,
            grid,
        )

    def agreement(self) -> Image.Image | None:
        """Predicted beside true tokens; for methods that predict a teacher's."""
        if not hasattr(self.model, "agreement"):
            return None
        squares, pixel_values, grid = self._training_squares()
        is_context, cosines = self.model.agreement(pixel_values)
        return draw_agreement(squares, is_context, cosines, grid)

    def _training_squares(self) -> tuple[list[Any], Tensor, tuple[int, int]]:
        """The middle of every image at the training size, as pixels and as the model takes it; its grid."""
        side = int(self.model.config.image_size)
        squares = [np.asarray(ImageOps.fit(Image.fromarray(image), (side, side))) for image in self.images]
        pixel_values = self.pixel_values(squares, do_resize=False, do_center_crop=False)
        return squares, pixel_values, (self.model.config.encoder_config.grid_size,) * 2

    def patch_features(self) -> Image.Image | None:
        """Main directions of patch tokens as colours; for ViTs."""
        if self.vit_config is None:
            return None
        tokens = self.outputs_of_squares().last_hidden_state
        return draw_patch_pca(self.squares(), tokens[:, self.vit_config.num_prefix_tokens :], self.grid())

    def attention(self) -> Image.Image | None:
        """Where the class token looks, head by head; for ViTs that have one."""
        if self.vit_config is None or not self.vit_config.use_class_token:
            return None
        weights = self.outputs_of_squares(output_attentions=True).attentions[-1]
        return draw_attention(
            self.squares(), weights[:, :, 0, self.vit_config.num_prefix_tokens :], self.grid()
        )

    def neighbors(self) -> Image.Image:
        """Nearest images by the encoder's features; with labels where there are any."""
        gallery_rows, query_rows, names = self._gallery()
        gallery = [self.decode(row) for row in gallery_rows]
        queries = [self.decode(row) for row in query_rows]
        normalize = torch.nn.functional.normalize
        similarity = normalize(self._features(queries), dim=1) @ normalize(self._features(gallery), dim=1).T
        values, indices = similarity.topk(min(NUM_NEIGHBORS, len(gallery)), dim=1)
        labels = None
        if names is not None:
            labels = [[names[gallery_rows[i]["label"]] for i in row] for row in indices.tolist()]
        return draw_neighbors(
            queries,
            [[gallery[i] for i in row] for row in indices.tolist()],
            values.tolist(),
            query_labels=None if names is None else [names[row["label"]] for row in query_rows],
            neighbor_labels=labels,
        )

    def _gallery(self) -> tuple[list[Any], list[Any], list[str] | None]:
        """Rows to search, rows to search for, and the names of their labels."""
        pair = probe_sources(self.recipe.data)
        if pair is None:
            rows = _rows(open_sources(self.recipe.data)[0], NUM_GALLERY)
            is_query = {index * len(rows) // NUM_IMAGES for index in range(NUM_IMAGES)}
            gallery = [row for index, row in enumerate(rows) if index not in is_query]
            return gallery, [rows[index] for index in sorted(is_query)], None
        gallery, queries = (
            _rows(part, limit) for part, limit in zip(pair, (NUM_GALLERY, NUM_IMAGES), strict=True)
        )
        return gallery, queries, getattr(pair[0], "label_names", None)

    def _features(self, images: list[Any]) -> Tensor:
        extractor = FeatureExtractor(self.backbone, (self.recipe.data.probe_pools or ["mean"])[:1])
        return torch.cat(
            [next(iter(extractor(part).values())) for part in self.pixel_values(images).split(256)]
        )

    def curves(self) -> Image.Image | None:
        """Loss, learning rate and scores over steps."""
        state = self.folder / "trainer_state.json"
        if not state.is_file():
            return None
        return draw_history(json.loads(state.read_text(encoding="utf-8"))["log_history"])


def _rows(source: Any, limit: int) -> list[Any]:
    """Rows spread over the whole source, as many sources are sorted."""
    return [row for _, row in read_rows(source, limit)]


def draw_run(
    run: str, output_dir: str | None = None, images: str | None = None, size: int | None = None
) -> list[Path]:
    """Draw every picture that suits the run.

    Args:
        run: folder of a run.
        output_dir: where pictures go; by default `figures` in the run.
        images: other images than those it was trained on, whatever `open_images` takes; then only pictures
            that show single images are drawn: reconstructions, tokens, agreement,
            patch features and attention.
        size: side in pixels at which patch features and attention are computed; by default that of training.

    Returns:
        The PNG files.

    Raises:
        RecipeError: the folder is no run, the size holds no whole patches, or images or size are given for a
            CNN.
        DataError: the images cannot be found.
    """
    folder = Path(run)
    if not (folder / RECIPE_FILE).is_file():
        raise RecipeError(f"'{run}' is no run: it has no {RECIPE_FILE}")
    target = Path(output_dir) if output_dir is not None else folder / "figures"
    figures = _Figures(folder, images, size)
    drawings: dict[str, Callable[[], Image.Image | None]] = {
        "reconstructions": figures.reconstructions,
        "tokens": figures.tokens,
        "agreement": figures.agreement,
        "patch_features": figures.patch_features,
        "attention": figures.attention,
    }
    if images is None:
        drawings |= {
            "views": figures.views,
            "clips": figures.clips,
            "neighbors": figures.neighbors,
            "curves": figures.curves,
        }
    target.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in drawings.items():
        picture = draw()
        if picture is not None:
            paths.append(target / f"{name}.png")
            picture.save(paths[-1])
    return paths
