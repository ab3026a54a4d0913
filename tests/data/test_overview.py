"""The contact sheet: what it says of a set, which images it shows, and that it shows them as training sees them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.image_containers import encoded, noise, write_zip
from vaebm_fast.cli import main
from vaebm_fast.data import open_source
from vaebm_fast.data.overview import overview
from vaebm_fast.data.prepare import PrepareOptions, prepare

IMAGES = noise(10, 8)


def test_images_are_spread_over_the_set_with_their_classes(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", IMAGES, [index % 3 for index in range(10)])
    source = open_source(tmp_path / "a.zip", image_size=8, image_channels=3)
    seen = overview(source, None, 4)
    assert seen.captions == ("0: class 0", "3: class 0", "6: class 0", "9: class 0")
    assert (seen.images == IMAGES[[0, 3, 6, 9]]).all()
    assert seen.lines == (
        f"{tmp_path / 'a.zip'}: 10 images, read as 8x8x3, transform square, 3 classes",
        "sizes before, of the 4 shown: 8x8 (4)",
    )
    assert len(overview(source, None, 99).images) == 10 and len(overview(source, None, 1).images) == 1


def test_what_was_skipped_and_what_is_unreadable_is_said(tmp_path: Path) -> None:
    for index in range(4):
        (tmp_path / f"{index}.png").write_bytes(encoded(noise(1, 8 + index % 2, 8)[0]))
    (tmp_path / "2.png").write_bytes(b"x")
    (tmp_path / "notes.txt").touch()
    with pytest.warns(UserWarning, match="1 file passed over"):
        source = open_source(tmp_path, image_size=8, image_channels=3)
    seen = overview(source, tmp_path, 9)
    assert seen.captions == ("0", "1", "unreadable", "3") and (seen.images[2] == 128).all()
    assert seen.lines[1] == "sizes before, of the 4 shown: 8x9 (2), 8x8 (1)" and len(seen.lines) == 4
    assert seen.lines[2].startswith("passed over: 1 without an image's ending") and "notes.txt" in seen.lines[2]
    assert seen.lines[3].startswith(f"{tmp_path / '2.png'} cannot be read as an image")


def test_a_prepared_set_tells_of_all_its_images_and_of_those_left_out(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for index in range(7):
        (tmp_path / "set" / f"{index}.png").write_bytes(encoded(noise(1, 8 + index, 9 + index)[0]))
    (tmp_path / "set" / "broken.png").write_bytes(b"")
    prepare(tmp_path / "set", tmp_path / "out", PrepareOptions(size=8, on_bad="skip"))
    source = open_source(tmp_path / "out", image_size=8, image_channels=3)
    seen = overview(source, tmp_path / "out", 3)
    assert seen.lines[1].startswith("sizes before: 9x8 (1), 10x9 (1), ") and seen.lines[1].endswith(
        ", and 3 other sizes"
    )
    assert seen.lines[2] == "left out: it is empty (1)"


def test_the_command_writes_a_sheet_that_shows_the_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_zip(tmp_path / "a.zip", IMAGES)
    sheet = tmp_path / "sheet.png"
    assert main(["show", str(tmp_path / "a.zip"), "--out", str(sheet), "--size", "8", "--images", "3"]) == 0
    said = capsys.readouterr().out
    assert "10 images, read as 8x8x3" in said and f"The contact sheet is {sheet}." in said
    drawn = np.asarray(Image.open(sheet))
    zoomed = IMAGES[0].repeat(12, axis=0).repeat(12, axis=1)
    tops = [top for top in range(len(drawn) - 96) if (drawn[top : top + 96, 8:104] == zoomed).all()]
    assert len(tops) == 1 and (drawn[: tops[0]] == 0).any(), "text above the images"
    assert (drawn[tops[0] : tops[0] + 96, 112:208] == IMAGES[4].repeat(12, axis=0).repeat(12, axis=1)).all()


def test_a_prepared_set_is_shown_at_its_own_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare("digits", tmp_path / "out", PrepareOptions(size=8, channels=1))
    sheet = ["--out", str(tmp_path / "sheet.png")]
    assert main(["show", str(tmp_path / "out"), "--split", "held_out", *sheet]) == 0
    assert "held_out: 899 images, read as 8x8x1, transform square, 10 classes" in capsys.readouterr().out
    (tmp_path / "out" / "train.jsonl").write_text("{}")
    assert main(["show", str(tmp_path / "out"), *sheet]) == 1
    assert "train.jsonl is damaged (a line without a key)" in capsys.readouterr().err
    assert main(["show", "digits", "--images", "0", *sheet]) == 1
    assert "images is 0; it must be at least 1" in capsys.readouterr().err
