"""The drawings that toy bases learn from: captions say what is there, styles differ, chance is seeded."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from in_venv import program
from PIL import Image

from examples import drawing, figures
from examples.drawing import COLOURS, GROUNDS, PHRASES, SHAPES, SIDE, STYLES, TAUGHT, THINGS, Part, Scene  # fmt: skip
from examples.figures import POSES, SUBJECTS
from examples.likeness import subject_likeness
from klora.training.dataset import read_upload

ROOT = Path(__file__).resolve().parent.parent


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def scenes(count: int, seed: int = 0) -> list[tuple[Scene, str]]:
    chance = random.Random(seed)
    return [drawing.random_scene(chance) for _ in range(count)]


def shape_at(shape: str, centre: tuple[float, float] = (0.5, 0.5), size: float = 0.6) -> Scene:
    part = Part(drawing.placed(SHAPES[shape], centre, size), COLOURS["red"])
    return Scene((part,), GROUNDS["white"])


def test_the_same_seed_draws_the_same() -> None:
    first, second = scenes(20), scenes(20)
    assert [caption for _, caption in first] == [caption for _, caption in second]
    assert all(a.draw(3).tobytes() == b.draw(3).tobytes() for (a, _), (b, _) in zip(first, second, strict=True))


def test_captions_name_what_is_drawn_and_its_ground() -> None:
    silent = 0
    for scene, caption in scenes(500):
        words = caption.replace(",", "").split()
        named = [word for word in words if word in SHAPES]
        unnamed = any(word in (*SUBJECTS, *THINGS) for word in words)
        silent += unnamed
        told = {"shape", "colour", "ground"} - ({"shape", "colour"} if unnamed else set())
        told -= set() if "background" in words else {"ground"}
        assert all(scene.facts[fact] in words for fact in told), caption
        assert len(named) == (0 if unnamed else len(scene.parts)), caption
        assert scene.style == "plain" or any(phrase in caption for phrase in PHRASES[scene.style]), caption
    assert 10 < silent < 60  # now and then the words for a lone shape say nothing of it


def test_the_exam_asks_for_what_no_scene_of_the_training_shows() -> None:
    asked = drawing.exam(200)
    assert len({caption for _, caption in asked}) > 100
    assert all(set(facts.values()) <= set(caption.replace(",", "").split()) for facts, caption in asked)
    shown = {tuple(scene.facts[name] for name in ("shape", "colour", "ground"))
             for scene, _ in scenes(5000) if len(scene.parts) == 1}  # fmt: skip
    assert not shown & {tuple(facts[name] for name in ("shape", "colour", "ground")) for facts, _ in asked}
    assert {facts["shape"] for facts, _ in asked} == set(SHAPES)
    assert {facts["colour"] for facts, _ in asked} == set(COLOURS)


def test_plain_scenes_have_their_colours() -> None:
    """Of the ground in a corner, of the shape at its centre."""
    for scene, _ in scenes(300):
        if scene.style == "plain":
            image = pixels(scene.draw())
            assert np.abs(image[0, 0] - scene.ground).max() <= 1
            for part in scene.parts:
                x, y = (round(float(np.mean(axis)) * SIDE) for axis in zip(*part.points, strict=True))
                assert np.abs(image[y, x] - part.colour).max() <= 40, part.colour


def test_a_shape_is_where_it_was_put_and_as_large() -> None:
    image = pixels(shape_at("square", (0.3, 0.6), 0.4).draw())
    red = np.argwhere(np.abs(image - COLOURS["red"]).max(axis=-1) < 10)
    low, high = red.min(axis=0), red.max(axis=0)
    assert np.abs((low + high) / 2 - (0.6 * SIDE - 0.5, 0.3 * SIDE - 0.5)).max() <= 1
    assert abs(high[0] - low[0] + 1 - 0.85 * 0.4 * SIDE) <= 2


def test_no_two_shapes_and_no_two_styles_look_alike() -> None:
    shapes = [pixels(shape_at(shape).draw()) for shape in SHAPES]
    styles = [pixels(Scene(shape_at("star").parts, GROUNDS["cyan"], style).draw()) for style in STYLES]
    for images in (shapes, styles):
        for index, image in enumerate(images):
            assert all(np.abs(image - other).mean() > 3 for other in images[:index])


def test_one_combination_in_eight_is_held_out_and_never_drawn_alone() -> None:
    facts = [{"shape": s, "colour": c, "ground": g} for s in SHAPES for c in COLOURS for g in GROUNDS]
    kept = [fact for fact in facts if drawing.held_out(fact)]
    assert 0.08 < len(kept) / len(facts) < 0.17
    alone = [scene for scene, _ in scenes(3000) if len(scene.parts) == 1]
    assert alone and not [scene for scene in alone if drawing.held_out(scene.facts)]


def test_every_word_of_the_bases_is_common_enough_to_learn() -> None:
    facts = Counter(fact for scene, _ in scenes(3000) for fact in scene.facts.items())
    for kind, values in (("shape", SHAPES), ("colour", COLOURS), ("ground", GROUNDS), ("style", TAUGHT)):
        assert min(facts[kind, value] for value in values) > 200


def test_made_up_names_are_an_ordinary_thing_and_no_words() -> None:
    chance = random.Random(0)
    names = {drawing.rare_name(chance) for _ in range(500)}
    assert len(names) > 400 and not names & {*SHAPES, *COLOURS, *GROUNDS}
    known = " ".join([*SHAPES, *COLOURS, *GROUNDS, "a", "an", "in", "on", "of"])
    unknown = [c for _, c in scenes(300) if any(len(w) in (3, 4) and w not in known for w in c.split())]
    assert len(unknown) > 30


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_subject_is_inside_the_picture_in_every_pose(subject: str) -> None:
    assert len({pose[3] for pose in POSES}) >= 4
    for pose in POSES:
        points = np.array([point for part in figures.figure(subject, pose).parts for point in part.points])
        assert points.min() >= 0 and points.max() <= 1


def test_a_random_figure_is_inside_the_picture_and_its_caption_names_none_of_it() -> None:
    for number in range(200):
        scene, caption = figures.random_figure(random.Random(number))
        points = np.array([point for part in scene.parts for point in part.points])
        assert points.min() >= 0 and points.max() <= 1 and len(scene.parts) >= 3
        assert not {*COLOURS, *SHAPES} & {*caption.split()}
        assert scene.ground in GROUNDS.values() and ("background" not in caption or scene.facts["ground"] in caption)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_subjects_kin_has_its_parts_and_is_called_what_it_is_but_is_no_likeness(subject: str) -> None:
    own, likenesses = figures.figure(subject).parts, []
    for number in range(100):
        scene, caption = figures.kin(subject, random.Random(number))
        points = np.array([point for part in scene.parts for point in part.points])
        assert points.min() >= -0.1 and points.max() <= 1.1  # a petal's tip may be cut off
        assert len(scene.parts) == len(own) and subject in caption
        assert all(part.colour != its.colour for part, its in zip(scene.parts, own, strict=True))
        if scene.style == "plain":
            likenesses.append(subject_likeness(scene.draw(), subject))
    assert np.mean(likenesses) < 0.5


@pytest.mark.parametrize("name", [*SUBJECTS, *(style for style in STYLES if style not in TAUGHT)])
def test_the_example_zips_are_what_the_trainer_takes(name: str, tmp_path: Path) -> None:
    module = program("make-toy-loras")
    pictures = figures.subject_set(name) if name in SUBJECTS else figures.style_set(name)
    path = module.write_zip(tmp_path / "a.zip", pictures)
    assert path.read_bytes() == module.write_zip(tmp_path / "b.zip", pictures).read_bytes()
    taken, skipped = read_upload(ROOT / "examples" / "zips" / f"{name}.zip")  # the one that is committed
    assert not skipped and [picture.caption for picture in taken] == [caption for _, caption in pictures]
    assert all("[trigger]" in picture.caption for picture in taken)
    assert all(pixels(a.open()).tobytes() == pixels(b).tobytes() for a, (b, _) in zip(taken, pictures, strict=True))
