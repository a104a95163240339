from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rcnn_svm.datasets.images import IMAGE_SUFFIXES, image_size, read_image
from rcnn_svm.errors import DataError

PIXELS = np.random.default_rng(3).integers(0, 256, (20, 30, 3), dtype=np.uint8)
TURNED_BACK = {
    2: PIXELS[:, ::-1],
    3: PIXELS[::-1, ::-1],
    4: PIXELS[::-1],
    5: PIXELS.transpose(1, 0, 2),
    6: np.rot90(PIXELS, 1),
    7: PIXELS.transpose(1, 0, 2)[::-1, ::-1],
    8: np.rot90(PIXELS, -1),
}


def save_turned(path: Path, orientation: int, stored: np.ndarray) -> Path:
    image = Image.fromarray(np.ascontiguousarray(stored))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)
    return path


def test_content_decides_not_the_name(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.fromarray(PIXELS).save(path, format="PNG")
    image = read_image(path)
    assert image.dtype == np.uint8
    assert image.flags.writeable
    assert image.flags.c_contiguous
    np.testing.assert_array_equal(image, PIXELS)
    assert image_size(path) == (20, 30)


def test_transparency_is_laid_on_white(tmp_path):
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[0, :, :3], rgba[..., 3] = (255, 0, 0), (255, 0, 0)[0]
    rgba[1, :, 3] = 0  # black under nothing
    rgba[0, 2, 3] = 127  # half red
    Image.fromarray(rgba).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(image[0, 0], (255, 0, 0))
    np.testing.assert_array_equal(image[1], 255)
    np.testing.assert_array_equal(image[0, 2], (255, 128, 128))


def test_grey_palette_bits_and_cmyk(tmp_path):
    grey = PIXELS[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey > 127).save(tmp_path / "bits.png")
    Image.fromarray(PIXELS // 64 * 64).quantize(64).save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, 2))
    np.testing.assert_array_equal(read_image(tmp_path / "bits.png")[..., 1], np.where(grey > 127, 255, 0))
    expected = np.asarray(Image.open(tmp_path / "palette.png").convert("RGB"))
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png"), expected)
    Image.new("CMYK", (30, 20), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    red = read_image(tmp_path / "cmyk.jpg")
    assert red.shape == (20, 30, 3)
    assert red[5, 5, 0] > 240
    assert red[5, 5, 1:].max() < 15


def test_transparent_palette_is_laid_on_white(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((1, 1), 1)
    image.save(tmp_path / "a.gif", transparency=0)
    read = read_image(tmp_path / "a.gif")
    np.testing.assert_array_equal(read[1, 1], (10, 20, 30))
    np.testing.assert_array_equal(read[0, 0], (255, 255, 255))


def test_sixteen_bits_keep_their_upper_half(tmp_path):
    wide = np.array([[0, 255, 256], [32768, 65535, 300]], np.uint16)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    expected = np.array([[0, 0, 1], [128, 255, 1]], np.uint8)
    np.testing.assert_array_equal(read_image(tmp_path / "wide.png")[..., 2], expected)


def test_floating_point_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(np.ones((4, 4), np.float32)).save(path)
    with pytest.raises(DataError) as caught:
        read_image(path)
    assert str(caught.value) == (
        f"{path}: must have 8 or 16 bits per channel, got floating point. Convert it to PNG or JPEG."
    )


@pytest.mark.parametrize("orientation", TURNED_BACK)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_every_orientation_is_made_upright(tmp_path, orientation, suffix):
    path = save_turned(tmp_path / f"a.{suffix}", orientation, TURNED_BACK[orientation])
    assert image_size(path) == (20, 30)
    np.testing.assert_array_equal(read_image(path), PIXELS)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_plain_tiffs_are_made_upright(tmp_path, orientation, mode):
    image = Image.fromarray(np.ascontiguousarray(TURNED_BACK[orientation])).convert(mode)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.tif", exif=exif)
    assert image_size(tmp_path / "a.tif") == (20, 30)
    expected = np.asarray(Image.fromarray(PIXELS).convert(mode).convert("RGB"))
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), expected)


def test_no_other_program_is_started(tmp_path, monkeypatch):
    started = tmp_path / "started"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {started}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    path = tmp_path / "a.jpg"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    for read in (read_image, image_size):
        with pytest.raises(DataError, match="its content is none that is known"):
            read(path)
    assert not started.exists()


def test_more_pixels_than_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"must have at most 0 megapixels, has 0\. Make it smaller"):
        image_size(tmp_path / "a.png")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(DataError, match="must be a regular file"):
        image_size(tmp_path / "a.jpg")


def test_names_that_no_file_can_have():
    for name in ("a\0.jpg", "\ud800.jpg", "a" * 5000):
        with pytest.raises(DataError):
            image_size(Path(name))


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES - {".pbm", ".avif"}))
def test_every_listed_suffix_is_read(tmp_path, suffix):
    Image.fromarray(PIXELS).save(tmp_path / f"a{suffix}", None if suffix not in (".pgm", ".apng") else "PNG")
    assert image_size(tmp_path / f"a{suffix}") == (20, 30)


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_invalid_orientation_means_none(tmp_path, orientation):
    path = save_turned(tmp_path / "a.png", orientation, PIXELS)
    assert image_size(path) == (20, 30)
    np.testing.assert_array_equal(read_image(path), PIXELS)


def test_labels_of_the_stored_pixels_keep_them_unturned(tmp_path):
    path = save_turned(tmp_path / "a.png", 6, TURNED_BACK[6])
    np.testing.assert_array_equal(read_image(path, labelled_size=(30, 20)), TURNED_BACK[6])
    np.testing.assert_array_equal(read_image(path, labelled_size=(20, 30)), PIXELS)
    np.testing.assert_array_equal(read_image(path, labelled_size=(7, 7)), PIXELS)


def test_missing_foreign_and_truncated_files(tmp_path):
    missing, text, cut = tmp_path / "no.jpg", tmp_path / "text.jpg", tmp_path / "cut.jpg"
    text.write_text("not an image")
    Image.fromarray(np.tile(PIXELS, (9, 9, 1))).save(cut)
    cut.write_bytes(cut.read_bytes()[:4000])
    for read in (read_image, image_size):
        with pytest.raises(DataError) as caught:
            read(missing)
        assert str(caught.value) == f"{missing}: no such image file."
        with pytest.raises(DataError) as caught:
            read(text)
        assert (
            str(caught.value) == f"{text}: must be an image, its content is none that is known. Replace it."
        )
    with pytest.raises(DataError) as caught:
        read_image(cut)
    assert str(caught.value).startswith(f"{cut}: is a damaged image (image file is truncated")
    assert str(caught.value).endswith("). Replace it.")
    with pytest.raises(DataError) as caught:
        read_image(tmp_path)
    assert str(caught.value) == f"{tmp_path}: cannot be read (Is a directory)."


@pytest.mark.parametrize("kept", [9, 30, 60, 200, 600])
@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "webp", "bmp", "tif"])
def test_every_truncation_is_a_data_error(tmp_path, kind, kept):
    path = tmp_path / f"a.{kind}"
    Image.fromarray(PIXELS).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: min(kept, len(content) // 2)])
    with pytest.raises(DataError, match=r"Replace it|cannot be read"):
        read_image(path)
