"""The captioned world, the quickstart's images, and the gate's bookkeeping."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_base.gate import (
    SUBJECTS,
    Classifier,
    label_scenes,
    most_frequent_mistakes,
    plain_scene,
    score_pictures,
    write_confusion,
)
from tiny_base.grid import GRID_PROMPTS, draw_grid
from tiny_base.novel import OBJECTS, draw_object, render_style
from tiny_base.render import Sprites, draw_scene, shape_mask
from tiny_base.scenery import scene_variant
from tiny_base.styles import CHOOSING_STYLES, STYLE_OBJECTS, STYLES
from tiny_base.world import (
    COLOURS,
    RESERVED_WORDS,
    SCENES,
    WORD_COUNT,
    Scene,
    describe_place,
    describe_scene,
    is_held_out,
    rare_words,
    sample_scene,
)

from lcp_plugin.errors import DataError

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart"


def _scenes(count: int, held_out: bool = False) -> list[Scene]:
    return [sample_scene(np.random.default_rng(i), held_out) for i in range(count)]


def test_a_world_is_a_function_of_its_seed():
    assert _scenes(20) == _scenes(20)
    shapes = [scene for scene in _scenes(60) if scene.is_shape]
    for scene in shapes[:5]:
        assert np.array_equal(draw_scene(scene, None), draw_scene(scene, None))
        first, second = (describe_scene(scene, np.random.default_rng(1)) for _ in range(2))
        assert first == second


def test_held_out_pairs_are_never_in_the_training_world():
    for scene in _scenes(400):
        assert not is_held_out(scene.subject, scene.background)
        assert scene.colour is None or not is_held_out(scene.subject, scene.colour)
    assert all(is_held_out(s.subject, s.background) for s in _scenes(30, held_out=True))


def test_captions_name_subject_colour_and_rare_word():
    for index, scene in enumerate(_scenes(200)):
        caption = describe_scene(scene, np.random.default_rng(index))
        assert scene.colour is None or scene.colour in caption
        assert scene.word is None or rare_words()[scene.word] in caption.split()
        if scene.is_shape:
            assert scene.subject in caption


def test_the_tasks_tokens_are_not_among_the_rare_words():
    assert len(set(rare_words())) == WORD_COUNT
    assert not set(rare_words()) & set(RESERVED_WORDS)


@pytest.mark.parametrize(
    ("centre", "wanted"),
    [
        ((0.5, 0.55), None),
        ((0.2, 0.45), "on the left"),
        ((0.8, 0.6), "on the right"),
        ((0.5, 0.2), "at the top"),
        ((0.45, 0.8), "at the bottom"),
    ],
)
def test_a_place_is_told_when_it_is_off_centre(centre, wanted):
    scene = Scene("circle", "white", "red", centre=centre)
    assert describe_place(scene) == wanted


def test_a_red_circle_on_a_white_background_is_that():
    scene = Scene("circle", "white", "red", size=0.5, detail=3)
    picture = draw_scene(scene, None, 48).astype(int)
    red, white = np.asarray(COLOURS["red"]), np.asarray(COLOURS["white"])
    assert np.abs(picture[24, 24] - red).max() <= 9  # colours vary by 8
    assert np.abs(picture[2, 2] - white).max() <= 16  # and backgrounds by 6 more
    blue = draw_scene(replace(scene, colour="blue"), None, 48)
    assert blue[24, 24].argmax() == 2


def test_shapes_cover_the_area_that_geometry_says():
    side, size = 96, 0.5
    radius = size * side / 2
    circle = shape_mask("circle", size, (0.5, 0.5), 0).sum()
    square = shape_mask("square", size, (0.5, 0.5), 30).sum()
    ring = shape_mask("ring", size, (0.5, 0.5), 0).sum()
    assert circle == pytest.approx(np.pi * radius**2, rel=0.02)
    assert square == pytest.approx((1.6 * radius) ** 2, rel=0.03)
    assert ring == pytest.approx(np.pi * radius**2 * (1 - 0.55**2), rel=0.03)


@pytest.mark.parametrize("name", SCENES)
def test_every_scene_has_differing_variants(name):
    first, second = scene_variant(name, 0), scene_variant(name, 1)
    assert first.shape == second.shape == (112, 112, 3)
    assert first.min() >= 0
    assert second.max() <= 255
    assert not np.array_equal(first, second)


def test_missing_sprites_are_one_clear_line(tmp_path):
    with pytest.raises(DataError, match="npm pack emoji-datasource-google"):
        Sprites(tmp_path)
    with pytest.raises(DataError, match="--sprites"):
        draw_scene(Scene("dog", "white"), None)


@pytest.mark.parametrize("name", OBJECTS)
def test_views_of_a_novel_object_differ_and_repeat(name):
    first, again, other = (draw_object(name, index, side=48) for index in (0, 0, 1))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def test_the_repositorys_quickstart_images_are_those_the_code_draws():
    objects = list((QUICKSTART / "objects").glob("*/0[0-9].png"))
    styles = list((QUICKSTART / "styles").glob("*/*/[0-9].png"))
    assert {file.parts[-2] for file in objects} == set(OBJECTS)
    assert len(objects) == 6 * len(OBJECTS)
    assert {file.parts[-3] for file in styles} == set(STYLES)
    assert {file.parts[-2] for file in styles} == set(STYLE_OBJECTS)
    assert sum(file.stat().st_size for file in [*objects, *styles]) < 1_500_000
    with Image.open(QUICKSTART / "objects" / "vase" / "02.png") as image:
        assert image.tobytes() == draw_object("vase", 2).tobytes()


def test_styles_to_choose_settings_by_are_drawn_alike_and_reported_nowhere():
    files = list((QUICKSTART / "choosing_styles").glob("*/*/[0-9].png"))
    assert {file.parts[-3] for file in files} == set(CHOOSING_STYLES)
    assert {file.parts[-2] for file in files} == set(STYLE_OBJECTS)
    assert not set(CHOOSING_STYLES) & set(STYLES)
    assert sum(file.stat().st_size for file in files) < 400_000


@pytest.mark.parametrize("name", [*STYLES, *CHOOSING_STYLES])
def test_a_style_s_picture_is_drawn_again_byte_for_byte(name, tmp_path):
    known, place = (STYLES, "styles") if name in STYLES else (CHOOSING_STYLES, "choosing_styles")
    render_style(tmp_path / name, known[name], seed=0)
    for thing in ("Cup", "Fish"):
        ours = QUICKSTART / place / name / thing / "2.png"
        with Image.open(ours) as image, Image.open(tmp_path / name / thing / "2.png") as again:
            assert image.tobytes() == again.tobytes()


def test_the_grid_has_48_different_prompts_and_one_cell_for_each(tmp_path):
    assert len(set(GRID_PROMPTS)) == 48
    draw_grid(np.zeros((48, 48, 48, 3), np.uint8), GRID_PROMPTS, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as image:
        assert image.size == (8 * 102 + 6, 6 * 128 + 6)


def test_the_gate_counts_what_the_classifier_says():
    scenes = [plain_scene(np.random.default_rng(i), held_out=True) for i in range(6)]
    model = Classifier().eval()
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    with torch.no_grad():
        model.head.bias[SUBJECTS.index(scenes[0].subject)] = 1  # always this subject
    scores = score_pictures(model, np.zeros((6, 48, 48, 3), np.uint8), scenes)
    wanted = np.mean([scene.subject == scenes[0].subject for scene in scenes])
    assert scores["subject"] == pytest.approx(wanted)
    assert label_scenes(scenes)["colour"].min() >= -1
    said = scores["confusion"]["subject"]
    assert sum(said.values()) == 6
    assert {found for _, found in said} == {scenes[0].subject}
    named = sum(scene.colour is not None for scene in scenes)
    assert sum(scores["confusion"]["colour"].values()) == named


def test_confusion_matrices_are_written_pair_by_pair(tmp_path):
    nothing = {"colour": {}, "background": {}}
    shown = {"subject": {("dog", "dog"): 3, ("dog", "cat"): 2, ("fox", "cat"): 4}, **nothing}
    sampled = {"subject": {("dog", "fox"): 1}, "background": {}, "colour": {("red", "red"): 5}}
    write_confusion({"renders": shown, "samples": sampled}, tmp_path / "confusion.csv")
    assert (tmp_path / "confusion.csv").read_text().splitlines() == [
        "head,wanted,found,renders,samples",
        "subject,dog,dog,3,0",
        "subject,dog,cat,2,0",
        "subject,dog,fox,0,1",
        "subject,fox,cat,4,0",
        "colour,red,red,0,5",
    ]
    assert most_frequent_mistakes(shown["subject"]) == [
        "fox read as cat (4)",
        "dog read as cat (2)",
    ]
