"""What predict.py is made of: options, labels, crops, decoding ahead of the model, the journal."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="the example needs Pillow")

import predict
import prediction_images
from photographs import DataError
from PIL import Image
from prediction_images import decoded_batches, image_names, prepared, state_of
from prediction_journal import Journal, JournalError, Record, opened_journal
from prediction_labels import read_labels
from prediction_model import chosen, known_labels

import moat_kernels
from moat_kernels.checkpoints import save_safetensors

TAGS = 'tag_id,name,category,count\n1,general,9,5\n2,1girl,0,4\n3,"a, b",0,3\n'


@pytest.mark.parametrize(
    ("name", "text", "labels"),
    [
        (
            "names.txt",
            "ant\n bee \n\u00e9lan \u2028vital\n\n",
            ["ant", "bee", "\u00e9lan \u2028vital"],
        ),
        ("names", "ant\r\nbee", ["ant", "bee"]),
        ("selected_tags.csv", TAGS, ["general", "1girl", "a, b"]),
        ("NAMES.CSV", "\ufeffname\nant\n", ["ant"]),
        ("names.json", '["ant", "crane", "crane"]', ["ant", "crane", "crane"]),
    ],
)
def test_labels_are_read(name: str, text: str, labels: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert read_labels(tmp_path / name) == labels


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("gone.txt", None, "No such file"),
        ("names.txt", b"", "has no names"),
        ("names.txt", b"ant\n\nbee\n", "name 2 is empty"),
        ("names.txt", b"\xff", "cannot be read: 'utf-8'"),
        ("names.csv", b"tag_id,tag\n1,ant\n", r"no column 'name', but \['tag_id', 'tag'\]"),
        ("names.csv", b"", "no column 'name', but none"),
        ("names.csv", b"id,name\n1,ant\n2\n", "name 2 is empty"),
        ("names.json", b'{"0": "ant"}', "must be a list of names"),
        ("names.json", b"[1, 2]", "must be a list of names"),
        ("names.json", b"[", "Expecting value"),
    ],
)
def test_what_has_no_labels_is_named(
    name: str, data: bytes | None, message: str, tmp_path: Path
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=f"--labels .*{name}.*{message}"):
        read_labels(tmp_path / name)


@pytest.mark.parametrize("classes", ["[]", "[1, 2]", "6", "{", '{"ant": 0}', '["ant"]'])
def test_only_a_list_of_names_in_a_checkpoint_is_one(classes: str, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_safetensors({"x": torch.zeros(1)}, path, {"classes": classes})
    assert known_labels(None, path) == (["ant"] if classes == '["ant"]' else None)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--images", "x"],
        ["--model", "moat_9", "--images", "x"],
        ["--model", "moat_0"],
        ["--model", "moat_0", "--images", "x", "--top", "0"],
        ["--model", "moat_0", "--images", "x", "--threshold", "1"],
        ["--model", "moat_0", "--images", "x", "--threshold", "0.5", "--top", "3"],
    ],
    ids=" ".join,
)
def test_wrong_options_are_an_error_not_images_left_out(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        predict.main(wrong)
    assert ended.value.code == predict.FAILED


def preprocessing(**changes: object) -> moat_kernels.variants.Preprocessing:
    return dataclasses.replace(moat_kernels.get_preprocessing("tiny_moat_0"), **changes)


def striped(width: int, height: int) -> Image.Image:
    """Red columns, from left to right, of 0 .. 200; blue rows, from top to bottom."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 200, width)[None]
    pixels[..., 2] = np.linspace(0, 200, height)[:, None]
    return Image.fromarray(pixels)


def test_the_middle_of_a_photograph() -> None:
    """As timm has it: the shorter side resized to 16 / 0.5, then the middle 16 pixels."""
    found = prepared(striped(96, 64), preprocessing(resolution=16, crop_pct=0.5))
    whole = np.asarray(striped(96, 64).resize((48, 32), Image.Resampling.BICUBIC))
    expected = whole[8:24, 16:32].transpose(2, 0, 1)
    assert found.dtype == torch.uint8
    assert abs(found.numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("width", "height"), [(40, 24), (24, 40), (41, 24), (32, 32)])
def test_a_photograph_with_a_white_border(width: int, height: int, interpolation: str) -> None:
    options = preprocessing(resolution=16, crop_mode="border", interpolation=interpolation)
    found = prepared(striped(width, height), options).permute(1, 2, 0).numpy()
    square = np.full((max(width, height),) * 2 + (3,), 255, np.uint8)
    top, left = (len(square) - height) // 2, (len(square) - width) // 2
    square[top : top + height, left : left + width] = striped(width, height)
    method = Image.Resampling[interpolation.upper()]
    assert (found == np.asarray(Image.fromarray(square).resize((16, 16), method))).all()


def test_colours_in_the_order_of_the_weights() -> None:
    rgb = prepared(striped(40, 24), preprocessing(resolution=16))
    bgr = prepared(striped(40, 24), preprocessing(resolution=16, channel_order="bgr"))
    assert (rgb[0] != rgb[2]).any() and (bgr == rgb[[2, 1, 0]]).all()


def test_a_square_that_would_be_too_large_is_refused() -> None:
    panorama = Image.new("RGB", (20_000, 10))
    with pytest.raises(DataError, match="20000 x 10 pixels on a square of 20000 x 20000"):
        prepared(panorama, preprocessing(crop_mode="border"))
    assert prepared(panorama, preprocessing(resolution=8)).shape == (3, 8, 8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Grey images of as many levels."""
    for grey in range(24):
        (tmp_path / f"{grey % 3}").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (grey,) * 3).save(tmp_path / f"{grey % 3}" / f"{grey:02}.png")
    return tmp_path


@pytest.mark.parametrize("workers", [1, 5])
def test_images_are_decoded_in_order_and_not_too_far_ahead(
    folder: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, lock, decoded = prediction_images.decode_image, threading.Lock(), []

    def slowly(path: Path) -> Image.Image:
        time.sleep(0.002 * (int(path.stem) % 4))  # the later ones of a batch are done earlier
        with lock:
            decoded.append(path)
        return decode(path)

    monkeypatch.setattr(prediction_images, "decode_image", slowly)
    names = image_names(folder)
    batches = [names[:1], names[1:5], *(names[i : i + 4] for i in range(5, 24, 4))]
    taken = 0
    for batch, expected in zip(
        decoded_batches(folder, batches, preprocessing(resolution=4), workers), batches, strict=True
    ):
        assert [one.name for one in batch] == expected
        assert [int(one.pixels[0, 0, 0]) for one in batch] == [int(Path(n).stem) for n in expected]
        taken += len(batch)
        time.sleep(0.05 if taken == 1 else 0)
        assert len(decoded) - taken <= 4 * (2 + -(-2 * workers // 4))
    assert taken == 24


def test_softmax_chooses_the_best_and_sigmoid_all_above_a_threshold() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [-9.0, -8.0, 0.0]])
    total = 1 + math.exp(2) + math.exp(1)
    (indices, scores), _ = chosen(logits, 2, None)
    assert indices == [1, 2]
    assert scores == pytest.approx([math.exp(2) / total, math.exp(1) / total], rel=1e-5)
    first, second = chosen(logits, None, 0.5)
    assert first[0] == [1, 2] and second == ([], [])  # 0.5 itself is not above it
    assert first[1] == pytest.approx([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))], rel=1e-5)


def test_who_stops_early_does_not_wait_for_the_rest(folder: Path) -> None:
    names = image_names(folder)
    threads = threading.active_count()
    batches = decoded_batches(folder, [names[:2], names[2:]], preprocessing(resolution=4), 3)
    next(batches)
    batches.close()
    assert threading.active_count() == threads


def test_folders_without_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        image_names(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"has no images \(of type \.bmp"):
        image_names(tmp_path)


BATCHES = [
    [Record("a.png", (1, 2), ["x", "y"], [0.75, 0.125]), Record("b \u00e9\n.png", (3, 4))],
    [Record("c.png", (0, 0), error="why"), Record("a.png", (1, 5), ["y"], [0.5])],
]


def known(journal: Journal) -> list[Record]:
    return [journal.read(name) for name in (*journal.predicted(), *journal.failed())]


def plain(record: Record) -> Record:
    return dataclasses.replace(
        record, labels=list(record.labels), scores=list(record.scores), state=tuple(record.state)
    )


def test_of_records_of_one_image_the_last_counts(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with opened_journal(path) as journal:
        for batch in BATCHES:
            journal.append(batch)
        before = known(journal)
    with opened_journal(path) as journal:
        assert (
            known(journal)
            == before
            == [plain(one) for one in (BATCHES[1][1], BATCHES[0][1], BATCHES[1][0])]
        )
        assert journal.is_predicted("a.png", (1, 5)) and not journal.is_predicted("a.png", (1, 2))
        assert not journal.is_predicted("c.png", (0, 0))
        journal.append([Record("a.png", (6, 6), error="broken now")])
        assert journal.failed() == ["a.png", "c.png"]


def test_a_journal_that_is_cut_anywhere_has_whole_batches(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    ends = [0]
    with opened_journal(path) as journal:
        for batch in BATCHES:
            journal.append(batch)
            ends.append(path.stat().st_size)
    data = path.read_bytes()
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        whole = sum(size >= end for end in ends) - 1
        with opened_journal(path) as journal:
            assert (len(journal), journal.torn) == ([0, 2, 3][whole], size - ends[whole])
            for batch in BATCHES[whole:]:
                journal.append(batch)
        assert path.read_bytes() == data


@pytest.mark.parametrize(
    "rest", [bytes(40), bytes(40) + b"\n", b"3\n", b'{"image": "z"}\n', b"[]\n", b"\xff\n"]
)
def test_what_is_no_record_is_cut_off(rest: bytes, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with opened_journal(path) as journal:
        journal.append(BATCHES[0])
    data = path.read_bytes()
    path.write_bytes(data + rest)
    with opened_journal(path) as journal:
        assert (len(journal), journal.torn) == (2, len(rest))
    assert path.read_bytes() == data


def test_a_journal_is_for_one_run_at_a_time(tmp_path: Path) -> None:
    with (
        opened_journal(tmp_path / "journal.jsonl"),
        pytest.raises(JournalError, match=f"another run is writing to {tmp_path}"),
        opened_journal(tmp_path / "journal.jsonl"),
    ):
        pass


def test_state_tells_changed_files_apart(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"1")
    before = state_of(file)
    assert state_of(file) == before == tuple(json.loads(json.dumps(before)))
    file.write_bytes(b"22")
    assert state_of(file) != before
