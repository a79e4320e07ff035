"""Photographs of every kind that people have: read as they look, or named before training."""

from __future__ import annotations

import os
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="the example needs Pillow")

import photographs
import train_classifier
from photographs import DataError
from PIL import ExifTags, Image


@pytest.fixture(autouse=True)
def nothing_read_before() -> None:
    photographs.read_image.cache_clear()
    photographs._warn_once.cache_clear()


# From 0 to 1, from left to right.
RAMP = np.linspace(0, 1, 256)[None].repeat(8, 0)
GREY = Image.fromarray(np.uint8(np.round(255 * RAMP)))


def ramp(dtype: type, white: int) -> Image.Image:
    return Image.fromarray(np.round(RAMP * white, 4).astype(dtype))


@pytest.mark.parametrize(
    ("image", "name"),
    [
        (GREY, "8.png"),
        (ramp(np.uint16, 65535), "16.png"),
        (ramp(np.uint16, 65535), "16.tif"),
        (ramp(np.dtype(">u2"), 65535), "16 big-endian.tif"),
        (ramp(np.int32, 65535), "32.tif"),
        (ramp(np.float32, 1), "float.tif"),
        (GREY.convert("P"), "palette.png"),
        (GREY.convert("LA"), "opaque.png"),
        (GREY.convert("RGBA"), "opaque.webp"),
        (GREY.convert("RGB").convert("CMYK"), "cmyk.tif"),
        (GREY.convert("RGB").convert("CMYK"), "cmyk.jpg"),
        (GREY.convert("RGB").convert("YCbCr"), "ycbcr.tif"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.mode,
)
def test_grey_is_as_grey_in_every_format(image: Image.Image, name: str, tmp_path: Path) -> None:
    image.save(tmp_path / name)
    read = photographs.read_image(tmp_path / name)
    assert read.mode == "RGB"
    difference = np.asarray(read, dtype=int) - np.asarray(GREY, dtype=int)[..., None]
    assert abs(difference).max() <= (4 if name.endswith(("jpg", "webp")) else 1)


def test_black_and_white(tmp_path: Path) -> None:
    GREY.convert("1", dither=Image.Dither.NONE).save(tmp_path / "1.png")
    read = np.asarray(photographs.read_image(tmp_path / "1.png"))
    assert (read[:, :127] == 0).all() and (read[:, 129:] == 255).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode: str, tmp_path: Path) -> None:
    black = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    black.paste((0, 0, 0, 255), (2, 0, 4, 4))
    file = tmp_path / "transparent.png"
    if mode == "P":
        palette = Image.new("P", (4, 4), 0)
        palette.paste(1, (2, 0, 4, 4))
        palette.putpalette([0, 0, 0, 0, 0, 0])
        palette.save(file, transparency=0)
    else:
        black.convert(mode).save(file)
    read = np.asarray(photographs.read_image(file))
    assert (read[:, :2] == 255).all() and (read[:, 2:] == 0).all()


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.array([[0.0, 255.0]], np.float32), r"mode F must be within 0 \.\. 1, got 0.0 \.\. 255"),
        (np.array([[-0.5, 0.5]], np.float32), r"got -0.5 \.\. 0.5"),
        (np.array([[0.0, np.nan]], np.float32), r"got nan \.\. nan"),
        (np.array([[0, 65536]], np.int32), r"mode I must be within 0 \.\. 65535, got 0 \.\. 65536"),
        (np.array([[-1, 0]], np.int32), r"got -1 \.\. 0"),
    ],
)
def test_what_has_no_known_white_is_named(pixels, message: str, tmp_path: Path) -> None:
    Image.fromarray(pixels).save(tmp_path / "odd.tif")
    with pytest.raises(DataError, match=rf"cannot read the image .*odd\.tif: .*{message}"):
        photographs.read_image(tmp_path / "odd.tif")


def oriented(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.XResolution] = 72.0
    return exif.tobytes()


# Where a mark in the upper left corner of the stored pixels is to be seen.
CORNERS = {
    **{1: "upper left", 2: "upper right", 3: "lower right", 4: "lower left"},
    **{5: "upper left", 6: "upper right", 7: "lower right", 8: "lower left"},
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", CORNERS)
def test_photographs_are_upright(orientation: int, suffix: str, tmp_path: Path) -> None:
    stored = np.zeros((32, 48), np.uint8)
    stored[:16, :16] = 255
    file = tmp_path / f"turned.{suffix}"
    Image.fromarray(stored).convert("RGB").save(file, exif=oriented(orientation))
    read = np.asarray(photographs.read_image(file))[..., 0] > 128
    assert read.shape == ((32, 48) if orientation < 5 else (48, 32))
    vertical, horizontal = CORNERS[orientation].split()
    rows = slice(0, 16) if vertical == "upper" else slice(-16, None)
    columns = slice(0, 16) if horizontal == "left" else slice(-16, None)
    assert read.sum() == read[rows, columns].sum() == 256


BROKEN_EXIF = {
    "empty": b"Exif\0\0",
    "torn": oriented(6)[:8],
    "of an unknown kind": oriented(6).replace(b"MM\0*", b"MM\0?"),
    "something else": b"not EXIF",
    # Pillow reads it, but cannot write it; the orientation is good.
    "odd": oriented(6).replace(b"\x01\x1a\0\x05", b"\x01\0\0\x05"),
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("kind", BROKEN_EXIF)
def test_broken_exif_data_do_not_lose_a_photograph(kind: str, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"photograph.{suffix}"
    Image.new("RGB", (8, 4), "red").save(file, exif=BROKEN_EXIF[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own
        read = photographs.read_image(file)
    assert read.getpixel((2, 2))[0] > 250
    assert read.size == ((4, 8) if kind == "odd" else (8, 4))


def test_broken_exif_data_are_told_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    Image.new("RGB", (8, 4)).save(tmp_path / "broken.png", exif=BROKEN_EXIF["torn"])
    for _ in range(2):
        photographs.read_image.cache_clear()
        photographs.read_image(tmp_path / "broken.png")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path / 'broken.png'} may not be upright, its EXIF data ")


@pytest.fixture
def folder(pictures: Path, tmp_path: Path) -> Path:
    """A copy of the pictures, of which the last of each class are held out."""
    for file in pictures.glob("*/*.png"):
        copy = tmp_path / "mine" / file.relative_to(pictures)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    return tmp_path / "mine"


def bomb(file: Path) -> None:
    """A few bytes that claim to be of 40,000 x 40,000 pixels."""
    data = bytearray(file.read_bytes())
    data[16:24] = 2 * (40_000).to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    file.write_bytes(data)


def make_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def make_a_dangling_link(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.with_name("gone.png"))


@pytest.mark.parametrize("name", ["fine/0.png", "fine/2.png"], ids=["training", "held out"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda file: file.write_bytes(b""), "cannot identify"),
        (lambda file: file.write_bytes(b"not a picture"), "cannot identify"),
        (lambda file: file.write_bytes(file.read_bytes()[:-400]), "truncated"),
        (lambda file: file.write_bytes(file.read_bytes()[:30]), "."),
        (bomb, "decompression bomb"),
        (make_a_pipe, "no such file"),
        (make_a_dangling_link, "no such file"),
    ],
    ids=["empty", "text", "cut", "header", "bomb", "pipe", "link"],
)
def test_what_cannot_be_read_is_named_before_training(
    run, folder, capsys, name: str, damage, reason: str
) -> None:
    damage(folder / name)
    (folder / "coarse" / "0.png").write_bytes(b"another one")
    assert run("--data", folder) == 2
    output, error = capsys.readouterr()
    assert "error: 2 of 6 photographs cannot be used" in error
    (line,) = [line for line in error.splitlines() if name in line]
    assert line.startswith(f"  cannot read the image {folder / name}: ") and reason in line
    assert "steps of" not in output


def test_of_many_unusable_photographs_some_are_named(run, folder, capsys, monkeypatch) -> None:
    monkeypatch.setattr(train_classifier, "NAMED", 2)
    for file in folder.glob("*/*.png"):
        file.write_bytes(b"")
    assert run("--data", folder) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and lines[-1] == "  and 4 more"


def test_what_vanishes_while_training_does_not_lose_the_report(
    run, folder, capsys, monkeypatch
) -> None:
    validate = train_classifier.validate

    def lose_some(*arguments: object) -> object:
        photographs.read_image.cache_clear()
        for name in ("0.png", "2.png"):
            (folder / "fine" / name).unlink(missing_ok=True)
        return validate(*arguments)

    monkeypatch.setattr(train_classifier, "validate", lose_some)
    assert run("--data", folder, "--steps", 1, "--blocks", "both") == 0
    output, error = capsys.readouterr()
    (warning,) = error.splitlines()
    assert warning.startswith("warning: left out of the test: ") and "2.png" in warning
    assert "top-1 of 1 held out" in output


def test_hidden_files_are_no_photographs(folder: Path) -> None:
    before = photographs.folder_photographs(folder)
    (folder / "fine" / "._0.png").write_bytes(b"what macOS adds")
    (folder / "fine" / ".thumbnails").mkdir()
    (folder / "fine" / ".thumbnails" / "0.png").write_bytes(b"what viewers add")
    (folder / "fine" / "album.png").mkdir()
    assert photographs.folder_photographs(folder) == before


def test_a_folder_that_cannot_be_read_is_named(run, folder, capsys, monkeypatch) -> None:
    scandir = os.scandir

    def refuse(path: os.PathLike) -> object:
        if Path(path).name == "fine":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert run("--data", folder) == 2
    assert f"--data {folder} cannot be read: [Errno 13]" in capsys.readouterr().err
