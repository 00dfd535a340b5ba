"""Pictures as they come from cameras, scanners and broken downloads."""

from __future__ import annotations

import io
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fcos_deploy.core.enums import Orientation
from fcos_deploy.core.errors import ConfigError, ImageError
from fcos_deploy.core.image import MAX_PIXELS_VARIABLE, list_images, read_image, windows

COLORS = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)


def save(path: Path, pixels: np.ndarray, **options: object) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".ppm", ".webp"])
def test_lossless_formats_are_read_as_rgb(suffix: str, tmp_path: Path) -> None:
    path = save(tmp_path / f"a{suffix}", COLORS, **({"lossless": True} if suffix == ".webp" else {}))
    image = read_image(path)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, COLORS)


def test_jpeg_has_the_pixels_that_pillow_gives(golden_dir: Path) -> None:
    path = golden_dir / "images" / "BloodImage_00000.jpg"
    with Image.open(path) as reference:
        expected = np.asarray(reference).astype(int)
    difference = np.abs(read_image(path) - expected)
    assert expected.shape == (480, 640, 3)
    assert difference.max() <= 2  # decoders are free to differ by this much; here they are the same library


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_grayscale_is_repeated(suffix: str, tmp_path: Path) -> None:
    gray = np.full((6, 4), 130, np.uint8)
    image = read_image(save(tmp_path / f"gray{suffix}", gray))
    np.testing.assert_array_equal(image, np.full((6, 4, 3), 130))


def test_black_and_white_is_0_and_255(tmp_path: Path) -> None:
    Image.fromarray(np.eye(4, dtype=np.uint8) * 255).convert("1").save(tmp_path / "bits.png")
    np.testing.assert_array_equal(read_image(tmp_path / "bits.png")[:, :, 1], np.eye(4) * 255)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_gray_keeps_its_upper_8(suffix: str, tmp_path: Path) -> None:
    deep = np.uint16([[0, 255, 256], [0x1234, 0xABCD, 0xFFFF]])
    path = save(tmp_path / f"deep{suffix}", deep)
    np.testing.assert_array_equal(read_image(path)[:, :, 2], deep >> 8)


def test_16_bit_color_keeps_its_upper_8(tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (5, 6, 3), dtype=np.uint16)
    assert cv2.imwrite(str(tmp_path / "deep.png"), deep[:, :, ::-1])
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png"), deep >> 8)


@pytest.mark.parametrize(
    ("name", "pixels", "message"),
    [
        ("float.tif", np.float32([[0.0, 0.5], [1.0, 0.2]]), "has floating-point pixels, and nothing in it says which"),
        ("float255.tiff", np.float32([[0, 128], [255, 3]]), "has floating-point pixels"),
        ("deep.tif", np.int32([[0, 70000], [1 << 30, 5]]), "has integer pixels of 32 bits"),
        ("12-bit.tif", np.uint16([[0, 4095], [2000, 5]]), "its largest value is 4095"),
        ("12-bit.png", np.uint16([[0, 4095], [2000, 5]]), "its largest value is 4095"),
        ("14-bit.png", np.uint16([[0, 16383], [2000, 5]]), "its largest value is 16383"),
        ("colour.png", np.full((4, 4, 3), 4095, np.uint16), "has 16 bits a value"),
        ("colour.tif", np.full((4, 4, 3), 4095, np.uint16), "has 16 bits a value"),
    ],
)
def test_pixels_that_would_be_read_as_black_are_refused_by_name(
    name: str, pixels: np.ndarray, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    assert cv2.imwrite(str(path), pixels)
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert message in caught.value.message
    assert name in caught.value.message
    assert "65535" in caught.value.hint


def test_a_black_16_bit_image_is_black(tmp_path: Path) -> None:
    assert cv2.imwrite(str(tmp_path / "black.png"), np.zeros((4, 4), np.uint16))
    assert read_image(tmp_path / "black.png").max() == 0


def _tiff(pixels: np.ndarray, *, sample_format: int, photometric: int) -> bytes:
    """Of one strip of gray pixels."""
    data, (height, width) = pixels.tobytes(), pixels.shape
    tags = {256: width, 257: height, 258: 8 * pixels.itemsize, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height}
    tags |= {279: len(data), 339: sample_format}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = struct.pack("<4sI", b"II*\0", 8 + len(data))
    return head + data + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("dtype", ["u1", "<u2"])
@pytest.mark.parametrize("photometric", [0, 1], ids=["white is 0", "black is 0"])
def test_zero_is_white_where_a_tiff_says_so(dtype: str, photometric: int, tmp_path: Path) -> None:
    gray = np.uint8([[0, 7, 200], [255, 128, 1]])
    stored = (gray * np.uint16(257)).astype(dtype) if dtype == "<u2" else gray
    (tmp_path / "gray.tif").write_bytes(_tiff(stored, sample_format=1, photometric=photometric))
    np.testing.assert_array_equal(read_image(tmp_path / "gray.tif")[:, :, 0], gray if photometric else 255 - gray)


def test_signed_pixels_are_refused(tmp_path: Path) -> None:
    (tmp_path / "signed.tif").write_bytes(_tiff(np.ones((2, 3), "i1"), sample_format=2, photometric=1))
    with pytest.raises(ImageError, match=r"'.*signed\.tif' has signed pixels"):
        read_image(tmp_path / "signed.tif")


def test_alpha_is_dropped(tmp_path: Path) -> None:
    alpha = np.linspace(0, 255, 35, dtype=np.uint8).reshape(5, 7, 1)
    path = save(tmp_path / "alpha.png", np.concatenate((COLORS, alpha), axis=2))
    np.testing.assert_array_equal(read_image(path), COLORS)


@pytest.mark.parametrize("transparency", [None, 0, bytes([0, 128, 255])])
def test_palette_is_looked_up(transparency: int | bytes | None, tmp_path: Path) -> None:
    indexed = Image.fromarray(np.uint8([[0, 1], [2, 0]])).convert("P")
    indexed.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    options = {} if transparency is None else {"transparency": transparency}
    indexed.save(tmp_path / "palette.png", **options)
    expected = [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 0, 0]]]
    assert read_image(tmp_path / "palette.png").tolist() == expected


def test_cmyk_jpeg_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    red, green, blue = read_image(tmp_path / "print.jpg")[4, 4].tolist()
    assert red > 200
    assert max(green, blue) < 60


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(suffix: str, orientation: int, tmp_path: Path) -> None:
    upright = np.zeros((24, 40, 3), np.uint8)
    upright[:12, :20] = (250, 20, 20)
    upright[12:, 20:] = (20, 20, 250)
    # Stored pixels such that the orientation makes them upright again (EXIF: 0th row and column of the scene).
    undo = {1: "", 2: "x", 3: "xy", 4: "y", 5: "t", 6: "tx", 7: "txy", 8: "ty"}[orientation]
    stored = upright.transpose(1, 0, 2) if "t" in undo else upright
    if orientation == 6:
        stored = upright.transpose(1, 0, 2)[::-1]
    elif orientation == 8:
        stored = upright.transpose(1, 0, 2)[:, ::-1]
    elif orientation == 7:
        stored = upright.transpose(1, 0, 2)[::-1, ::-1]
    elif orientation in (2, 3, 4):
        stored = upright[:: -1 if "y" in undo else 1, :: -1 if "x" in undo else 1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"turned{suffix}", np.ascontiguousarray(stored), exif=exif)
    image = read_image(path)
    assert image.shape == upright.shape
    assert np.abs(image.astype(int) - upright).mean() < 12  # JPEG blurs the edges
    as_stored = read_image(path, orientation=Orientation.STORED)
    expected = upright if suffix == ".tif" else stored  # PIL turns TIFF files, and so did the training.
    assert as_stored.shape == expected.shape
    assert np.abs(as_stored.astype(int) - expected).mean() < 12


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1)])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_extreme_shapes(size: tuple[int, int], suffix: str, tmp_path: Path) -> None:
    image = read_image(save(tmp_path / f"thin{suffix}", np.full((*size, 3), 90, np.uint8)))
    assert image.shape == (*size, 3)
    assert (image == 90).all()


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"nothing\.jpg.*No such file") as refused:
        read_image(tmp_path / "nothing.jpg")
    assert refused.value.hint == "give images, folders of images or videos"
    with pytest.raises(ImageError, match="Cannot read image"):
        read_image(tmp_path)
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(ImageError, match=r"empty\.jpg' is empty"):
        read_image(tmp_path / "empty.jpg")


def test_text_is_not_an_image(tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    with pytest.raises(ImageError, match=r"page\.jpg' is not an image"):
        read_image(tmp_path / "page.jpg")


def test_an_image_starts_no_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    marker = tmp_path / "ran"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {marker}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    Image.fromarray(COLORS).save(tmp_path / "a.jpg", "EPS")
    with pytest.raises(ImageError, match="not an image in a supported format"):
        read_image(tmp_path / "a.jpg")
    assert not marker.exists()


def test_pipes_and_devices_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "zero.png"):
        with pytest.raises(ImageError, match="not a regular file"):
            read_image(tmp_path / name)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".tif", ".webp"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.97])
def test_cut_off_files_are_errors_not_gray_areas(suffix: str, share: float, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    path = save(tmp_path / f"cut{suffix}", noise)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ImageError, match=f"cut{suffix}"):
        read_image(path)


@pytest.mark.parametrize("form", ["plain", "optimize", "progressive", "restarts", "gray"])
@pytest.mark.parametrize("damage", ["none", "cut", "hole", "part gone"])
def test_a_jpeg_with_damaged_data_is_an_error_not_a_gray_area(form: str, damage: str, tmp_path: Path) -> None:
    """Closed by an end marker, or with a hole that a broken disk or download left."""
    rows, columns = np.mgrid[0:240, 0:320]
    rng = np.random.default_rng(0)
    pixels = 128 + 60 * np.sin(rows / 9)[..., None] * np.cos(columns / 11)[..., None] + rng.normal(0, 9, (240, 320, 3))
    pixels = pixels.clip(0, 255).astype(np.uint8)
    path = tmp_path / "a.jpg"
    if form == "restarts":
        assert cv2.imwrite(str(path), pixels, [cv2.IMWRITE_JPEG_RST_INTERVAL, 20])
    else:
        save(path, pixels[..., 0] if form == "gray" else pixels, **({} if form in ("plain", "gray") else {form: True}))
    content = path.read_bytes()
    start = content.index(b"\xff\xda")
    # A progressive file sends the finest bits last: not every gap in its last scans shows, but every cut does.
    early = form == "progressive" and damage != "cut"
    middle = start + (len(content) - start) // (20 if early else 2)
    changed = {
        "none": content,
        "cut": content[:middle] + b"\xff\xd9",
        "hole": content[:middle] + bytes(600) + content[middle + 600 :],
        "part gone": content[:middle] + content[middle + 1200 :],
    }
    path.write_bytes(changed[damage])
    if damage == "none":
        assert read_image(path).shape == (240, 320, 3)
        return
    with pytest.raises(ImageError, match=r"a\.jpg' is damaged: "):
        read_image(path)


@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"progressive": True}])
@pytest.mark.parametrize("gray", [0, 128, 255])
def test_flat_jpegs_are_whole(gray: int, options: dict[str, bool], tmp_path: Path) -> None:
    """Their data has long runs of equal bytes, and may end gray."""
    assert read_image(save(tmp_path / "flat.jpg", np.full((400, 600, 3), gray, np.uint8), **options)).mean() == gray


def test_jpeg_with_something_behind_it_is_whole(tmp_path: Path) -> None:
    """Phones append videos; the bytes of an end marker may occur there or not."""
    path = save(tmp_path / "motion.jpg", np.full((16, 16, 3), 60, np.uint8))
    path.write_bytes(path.read_bytes() + b"\x00\xff\xdavideo" * 50)
    assert (read_image(path) == 60).all()


def test_cut_off_jpeg_with_a_whole_preview_is_an_error(tmp_path: Path) -> None:
    preview = io.BytesIO()
    Image.new("RGB", (8, 8)).save(preview, "JPEG")
    segment = b"\xff\xe2" + (len(preview.getvalue()) + 2).to_bytes(2, "big") + preview.getvalue()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = save(tmp_path / "whole.jpg", noise).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[:2] + segment + content[2 : len(content) // 2])
    with pytest.raises(ImageError, match="damaged"):
        read_image(tmp_path / "cut.jpg")


def _png_header(width: int, height: int) -> bytes:
    import struct
    import zlib

    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + b"\0\0\0\7IDAT"


@pytest.mark.parametrize("size", [(60_000, 60_000), (20_000, 9_000), (10_000, 10_000)])
def test_decompression_bombs_are_refused_by_their_header(size: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(_png_header(*size))
    with pytest.raises(ImageError, match=r"bomb\.png' has more than 64000000 pixels"):
        read_image(tmp_path / "bomb.png")


def test_bound_holds_where_pillows_own_is_switched_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, "34")
    with pytest.raises(ImageError, match="more than 34 pixels: it has 7x5"):
        read_image(save(tmp_path / "a.png", COLORS))
    for wrong in ("-1", "0", "many", "1" * 5000):
        monkeypatch.setenv(MAX_PIXELS_VARIABLE, wrong)
        with pytest.raises(ConfigError, match=MAX_PIXELS_VARIABLE):
            read_image(tmp_path / "a.png")


def test_large_pictures_below_the_bound_do_not_warn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """100 megapixels: above the size at which Pillow warns. The header alone is not a whole picture."""
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, "100000000")
    (tmp_path / "large.png").write_bytes(_png_header(10_000, 10_000))
    with pytest.raises(ImageError, match="damaged"):
        read_image(tmp_path / "large.png")


def test_threads_read_the_same(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{i}.png", np.full((20, 20, 3), i, np.uint8)) for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        for i, image in enumerate(pool.map(read_image, paths)):
            assert (image == i).all()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of metadata that Pillow cannot read and does not need
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), suffix=st.sampled_from([".jpg", ".png", ".bmp", ".tif", ".gif", ".ppm", ".webp"]))
def test_damaged_files_are_read_or_refused(data: st.DataObject, suffix: str, tmp_path: Path) -> None:
    """Whatever bytes change: an image, or an ImageError."""
    content = bytearray(save(tmp_path / f"x{suffix}", np.repeat(COLORS, 4, axis=0)).read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(bytes(content))
    try:
        image = read_image(path)
    except ImageError:
        return
    assert image.dtype == np.uint8
    assert image.ndim == 3


def test_images_of_a_folder_are_sorted_and_hidden_ones_left_out(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "sub/c.jpeg", "notes.txt", "._b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [str(p.relative_to(tmp_path)) for p in list_images(tmp_path)] == ["a.png", "b.JPG", "sub/c.jpeg"]


def test_folder_without_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(ImageError, match="holds no images"):
        list_images(tmp_path)
    with pytest.raises(ImageError, match="is not a folder"):
        list_images(tmp_path / "a.txt")


def test_windows_are_bounded_in_number_and_bytes() -> None:
    small, large = np.zeros((8, 8, 3), np.uint8), np.zeros((6000, 10_000, 3), np.uint8)  # 172 MiB
    groups = list(windows([*((i, small) for i in range(20)), (20, large), (21, large), (22, small)]))
    assert [[key for key, _ in group] for group in groups] == [[*range(16)], [16, 17, 18, 19, 20], [21, 22]]
