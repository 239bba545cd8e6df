"""Pictures: what they must show, read back from their pixels."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from hf_ssl.data.views import ViewMaker
from hf_ssl.pictures.agreement import draw_agreement
from hf_ssl.pictures.attention import draw_attention, heat, patches_with_most
from hf_ssl.pictures.canvas import BAD, COLORS, GOOD, Tile, draw_grid, fit, wrap
from hf_ssl.pictures.curves import draw_curves
from hf_ssl.pictures.neighbors import draw_neighbors
from hf_ssl.pictures.patch_pca import draw_patch_pca, patch_colors
from hf_ssl.pictures.reconstructions import draw_reconstructions
from hf_ssl.pictures.tokens import draw_tokens
from hf_ssl.pictures.views import draw_views


def flat(color: str, side: int = 32) -> Image.Image:
    return Image.new("RGB", (side, side), color)


def count(picture: Image.Image, color: str | tuple[int, int, int]) -> int:
    """Pixels of exactly this colour."""
    rgb = ImageColor.getrgb(color) if isinstance(color, str) else color
    return int((np.asarray(picture) == rgb).all(axis=2).sum())


# Canvas.


def test_small_images_grow_to_whole_squares_of_their_pixels():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(fit(image), np.kron(image, np.ones((5, 5, 1), dtype=np.uint8)))


def test_large_images_shrink_to_the_side_and_keep_their_shape():
    assert fit(Image.new("RGB", (640, 320))).size == (160, 80)
    assert fit(Image.new("RGB", (1, 5000))).size == (1, 160)


def test_all_tiles_of_uneven_rows_are_drawn_once_and_unchanged():
    colors = ["#ff0000", "#00ff00", "#0000ff"]
    rows = [[Tile(flat(colors[0], 20), "caption"), Tile(flat(colors[1], 30))], [Tile(flat(colors[2], 40))]]
    sheet = draw_grid(rows, title="title", headings=["first", "second"])
    assert [count(sheet, color) for color in colors] == [400, 900, 1600]


def test_frames_lie_outside_their_tile():
    sheet = draw_grid([[Tile(flat("#ff0000", 20), color="#0000ff")]])
    assert count(sheet, "#ff0000") == 400
    assert count(sheet, "#0000ff") == 28 * 28 - 22 * 22  # three pixels wide, one pixel of white inside


def test_text_is_broken_between_words_and_cut_where_one_is_too_long():
    assert wrap("", 100, 12) == []
    assert wrap("a b", 500, 12) == ["a b"]
    assert wrap("first second", 50, 12) == ["first", "second"]
    assert wrap("no\N{NO-BREAK SPACE}break", 500, 12) == ["no\N{NO-BREAK SPACE}break"]
    (line,) = wrap("incomprehensibilities", 50, 12)
    assert line.endswith("…") and line.startswith("inc")


def test_an_empty_grid_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        draw_grid([])


# Views.


def test_views_are_those_of_training_with_a_box_of_the_same_colour():
    maker = ViewMaker([{"count": 2, "size": 32, "crop": {"scale": [0.3, 0.6]}, "transforms": []}])
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    sheet = draw_views([image], maker, seed=3, title="")
    pixels = np.asarray(sheet)
    for view, color in zip(maker(image, (3, 0, 0)), COLORS, strict=False):
        tile = np.asarray(fit(view))
        assert _contains(pixels, tile)
        assert count(sheet, color) > 2 * (4 * 160)  # the frame of the view and the box in the original


def _contains(pixels: np.ndarray, tile: np.ndarray) -> bool:
    height, width = tile.shape[:2]
    corners = np.argwhere((pixels == tile[0, 0]).all(axis=2))
    return any(
        np.array_equal(pixels[top : top + height, left : left + width], tile)
        for top, left in corners
        if top + height <= len(pixels) and left + width <= pixels.shape[1]
    )


# Reconstructions.


def test_perfect_predictions_give_back_the_image_and_masks_hide_it():
    from hf_ssl.modeling.shared.patches import normalize_patches, patchify

    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    image = torch.randint(0, 256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    pixel_values = (image / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    predictions = normalize_patches(patchify(pixel_values, 8))
    is_masked = torch.arange(16)[None] < 12
    sheet = draw_reconstructions(pixel_values, is_masked, predictions, image_mean=mean, image_std=std)
    tile = np.asarray(fit(image[0].to(torch.uint8)))
    pixels = np.asarray(sheet)
    top, left = np.argwhere((pixels == tile[0, 0]).all(axis=2))[0]
    drawn = [pixels[top : top + 160, x : x + 160].astype(int) for x in range(left, left + 4 * 178, 178)]
    for column in (0, 2, 3):  # image, reconstruction, all predicted
        assert np.abs(drawn[column] - tile).max() <= 1
    assert (drawn[1][:120] == drawn[1][0, 0]).all()  # 12 of 16 patches: the upper three quarters are grey
    assert np.abs(drawn[1][120:] - tile[120:]).max() <= 1


def test_reconstruction_uses_predictions_in_hidden_patches_only():
    pixel_values = torch.full((1, 3, 32, 32), 0.5)
    is_masked = torch.arange(16)[None] < 4
    red = torch.tensor([1.0, 0.0, 0.0]).repeat(64).expand(1, 16, -1)
    sheet = draw_reconstructions(pixel_values, is_masked, red, normalized_patches=False)
    assert (
        count(sheet, "#ff0000") == 160 * 40 + 160 * 160
    )  # a quarter of the third picture, all of the fourth


def test_masks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit images of 32 x 32"):
        draw_reconstructions(torch.zeros(1, 3, 32, 32), torch.zeros(1, 9) > 0, torch.zeros(1, 16, 192))


# Patch features.


def test_like_features_get_like_colours_over_all_images():
    kinds = torch.randint(0, 4, (2, 16), generator=torch.Generator().manual_seed(0))
    features = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))[kinds]
    colors = patch_colors(features)
    assert colors.shape == (2, 16, 3) and colors.dtype == torch.uint8
    distinct = {kind: {tuple(c.tolist()) for c in colors[kinds == kind]} for kind in range(4)}
    assert all(len(found) == 1 for found in distinct.values())
    assert len(set.union(*distinct.values())) == 4


def test_first_direction_of_a_ramp_is_a_ramp_of_red():
    ramp = torch.linspace(-1, 1, 100)[None, :, None] * torch.ones(8) + 3
    red = patch_colors(ramp)[0, :, 0].int()
    steps = red.diff()
    assert red.min() == 0 and red.max() == 255 and ((steps >= 0).all() or (steps <= 0).all())


def test_patch_colours_lie_on_the_grid_row_by_row():
    features = torch.zeros(1, 6, 3)
    features[0, 4] = 1.0  # second row, second column of three
    sheet = np.asarray(draw_patch_pca([flat("#123456", 30)], features, (2, 3), title=""))
    color = tuple(patch_colors(features)[0, 4].tolist())
    where = np.argwhere((sheet == color).all(axis=2))
    extent = where.max(axis=0) - where.min(axis=0) + 1
    assert extent.tolist() == [75, 50]  # a tile of 150 pixels
    with pytest.raises(ValueError, match="3 x 3 patches"):
        draw_patch_pca([flat("white")], features, (3, 3))


# Attention.


def test_maps_are_bright_where_a_head_looks_and_say_how_spread_it_is():
    attention = torch.full((1, 2, 6), 0.01)
    attention[0, 0, 4] = 1.0  # second row, second column of three
    sheet = np.asarray(draw_attention([flat("#123456", 30)], attention, (2, 3), title=""))
    brightest = tuple(heat(torch.ones(1, 1))[0, 0].tolist())
    where = np.argwhere((sheet == brightest).all(axis=2))
    one_patch, whole = 75 * 50, 150 * 150
    assert len(where) == 2 * one_patch + whole  # in the mean and in head 1; head 2 looks everywhere alike
    assert patches_with_most(attention[0, 0]) == 1
    assert patches_with_most(attention[0, 1]) == 4


def test_attention_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"attention \(1, 2, 6\) does not hold 3 x 3 patches of 1 images"):
        draw_attention([flat("white")], torch.ones(1, 2, 6), (3, 3))


# Neighbours.


def test_frames_say_whether_labels_agree():
    sheet = draw_neighbors(
        [flat("white")],
        [[flat("white")] * 3],
        [[0.9, 0.8, 0.7]],
        query_labels=["cat"],
        neighbor_labels=[["cat", "dog", "dog"]],
    )
    assert count(sheet, BAD) == 2 * count(sheet, GOOD) > 0


def test_half_the_labels_are_refused():
    with pytest.raises(ValueError, match="or neither"):
        draw_neighbors([flat("white")], [[flat("white")]], [[0.9]], query_labels=["cat"])


# Curves.

LOG = [{"step": 10 * i, "loss": 5 - 0.1 * i, "learning_rate": 1e-3} for i in range(1, 50)]


def test_a_panel_for_each_thing_logged():
    loss_only = draw_curves([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    two = draw_curves(LOG)
    three = draw_curves([*LOG, {"step": 200, "eval_knn": 0.4}, {"step": 400, "eval_knn": 0.5}])
    assert loss_only.width < two.width < three.width
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_curves([{"step": 1, "grad_norm": 1.0}])


def test_baselines_are_lines_in_the_colour_of_their_score():
    log = [
        *LOG,
        {"step": 200, "eval_knn": 0.4, "eval_linear": 0.6},
        {"step": 400, "eval_knn": 0.5, "eval_linear": 0.7},
    ]
    without = draw_curves(log)
    knn, linear = (
        draw_curves(log, baselines={name: 0.45}) for name in ("kNN of raw pixels", "linear, step 0")
    )
    assert [_longest_level(p, "blue") > 90 for p in (without, knn, linear)] == [False, True, False]
    assert [_longest_level(p, "red") > 90 for p in (without, knn, linear)] == [False, False, True]


def _longest_level(picture: Image.Image, color: str) -> int:
    """Most pixels of about this colour in one row of the right-hand part, where the scores are."""
    pixels = np.asarray(picture).astype(int)[:, int(0.6 * picture.width) :]
    blueness = pixels[:, :, 2] - pixels[:, :, 0]
    return int(((blueness if color == "blue" else -blueness) > 60).sum(axis=1).max())


def test_after_a_resume_the_later_entry_of_a_step_counts():
    twice = draw_curves([{"step": 1, "loss": 9.0}, {"step": 2, "loss": 8.0}, {"step": 2, "loss": 1.0}])
    once = draw_curves([{"step": 1, "loss": 9.0}, {"step": 2, "loss": 1.0}])
    assert np.array_equal(twice, once)


# Tokens.


def test_tokens_have_their_colours_and_hidden_places_those_that_were_named():
    codes = torch.eye(3)
    tokens = torch.tensor([[0, 0, 1, 1]])
    named = torch.tensor([[2, 0, 2, 2]])
    hidden = torch.tensor([[True, False, False, True]])
    image = flat("#336699", 160)
    sheet = draw_tokens([image], tokens, named, hidden, codes, (2, 2))
    first, second, third = (tuple(int(value) for value in color) for color in patch_colors(
        codes[torch.tensor([[0, 0, 1, 1], [2, 0, 1, 2]])]).reshape(-1, 3)[[0, 2, 4]].unbind())  # fmt: skip
    quarter = 80 * 80
    assert count(sheet, "#336699") == 4 * quarter + 2 * quarter  # the image, and what was seen of it
    assert count(sheet, (140, 140, 140)) == 2 * quarter
    assert count(sheet, first) == 2 * quarter + quarter
    assert count(sheet, second) == 2 * quarter + quarter
    assert count(sheet, third) == 2 * quarter


def test_tokens_that_do_not_fit_the_grid_are_refused():
    tokens = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"must all be \(1 images, 3 x 2 patches\)"):
        draw_tokens([flat("#336699")], tokens, tokens, tokens.bool(), torch.eye(3), (3, 2))


# Agreement.


def test_agreement_is_bright_where_predictions_are_right_and_grey_where_there_are_none():
    context = torch.tensor([[True, False, False, False]])
    cosines = torch.tensor([[float("nan"), 1.0, 0.0, float("nan")]])
    sheet = draw_agreement([flat("#336699", 160)], context, cosines, (2, 2))
    dark, bright = (tuple(int(value) for value in color) for color in heat(torch.tensor([[0.0, 1.0]]))[0])
    quarter = 80 * 80
    assert count(sheet, "#336699") == 4 * quarter + quarter
    assert count(sheet, (140, 140, 140)) == 3 * quarter + 2 * quarter
    assert count(sheet, bright) == count(sheet, dark) == quarter


def test_agreement_that_does_not_fit_the_grid_is_refused():
    with pytest.raises(ValueError, match="must both be"):
        draw_agreement([flat("#336699")], torch.zeros(1, 4).bool(), torch.zeros(1, 5), (2, 2))
