"""Pictures: every kind is decoded right or refused with a reason; patches equal the processor's byte for byte."""

import io
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from multitap_jax.data import images
from multitap_jax.data.decode import ImageError, decode_image
from multitap_jax.data.images import ImageReader
from multitap_jax.data.layouts import GridLayout, ImagePolicy

SHARED = Path(os.environ.get("MULTITAP_SHARED_DATA", Path(__file__).parents[2].parent / "shared/data"))
RNG = np.random.default_rng(0)
NATIVE = "native:3136:50176"


def noise(height, width, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def pixel(image, x=0, y=0):
    assert image.mode == "RGB"
    return image.getpixel((x, y))


@pytest.mark.parametrize("text", ["square:560", "native:3136:1003520"])
def test_policy_round_trip(text):
    assert str(ImagePolicy.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "560",
        "square",
        "square:",
        "square:0",
        "square:-28",
        "square:1:2",
        "native:5",
        "native:9:5",
        "auto",
        "square:²",
    ],
)
def test_unknown_policies_are_refused(text):
    with pytest.raises(ImageError, match="write square:SIDE"):
        ImagePolicy.parse(text)


def test_a_square_must_fit_the_patches():
    with pytest.raises(ImageError, match=r"multiple of 28 pixels .* nearest are 532 and 560"):
        ImageReader(GridLayout("square:550"))
    assert ImageReader(GridLayout("square:32", 8, 2))(noise(5, 5)).grid == (4, 4)


# Sizes around every branch of the size rule: rounding half to even, too large, too small, very long.
SIZES = [
    (28, 28),
    (56, 56),
    (42, 70),
    (98, 126),
    (10, 10),
    (1, 1),
    (300, 500),
    (513, 200),
    (1000, 30),
    (8, 1600),
    (223, 225),
]


@pytest.mark.parametrize("policy", [NATIVE, "native:784:7840", "native:100352:200704"])
def test_native_patches_equal_the_processor(policy):
    low, high = ImagePolicy.parse(policy).numbers
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": low, "longest_edge": high})
    reader = ImageReader(GridLayout(policy))
    for height, width in SIZES:
        image = Image.fromarray(noise(height, width))
        raw = processor(image, do_rescale=False, do_normalize=False)
        frames = raw["pixel_values"].reshape(-1, 3, 2, 196)
        result = reader(image)
        assert result.patches.dtype == np.uint8
        assert (1, *result.grid) == tuple(raw["image_grid_thw"][0])
        assert reader.grid_of(image) == result.grid
        for frame in range(2):
            np.testing.assert_array_equal(result.patches, frames[:, :, frame].reshape(-1, 588))
        full = processor(image)["pixel_values"].reshape(-1, 3, 2, 196)[:, :, 0]
        scaled = result.patches.reshape(-1, 3, 196).astype(np.float32) * np.float32(1 / 255)
        mean = np.asarray(processor.image_mean, np.float32)[None, :, None]
        std = np.asarray(processor.image_std, np.float32)[None, :, None]
        np.testing.assert_allclose((scaled - mean) / std, full, atol=1e-6, rtol=0)


def test_square_patches_equal_the_official_resize_and_the_processor():
    image = Image.fromarray(noise(100, 37))
    official = image.convert("RGB").resize((112, 112))
    processor = Qwen2VLImageProcessorPil()
    raw = processor(official, do_rescale=False, do_normalize=False)
    result = ImageReader(GridLayout("square:112"))(image)
    assert result.grid == (8, 8)
    np.testing.assert_array_equal(result.patches, raw["pixel_values"].reshape(-1, 3, 2, 196)[:, :, 0].reshape(-1, 588))


def test_patch_order_is_block_major():
    tall = np.zeros((56, 84, 3), np.uint8)
    for row in range(4):
        for column in range(6):
            tall[row * 14 : row * 14 + 14, column * 14 : column * 14 + 14] = row * 10 + column
    patches = ImageReader(GridLayout(NATIVE))(tall).patches
    assert (patches == patches[:, :1]).all()
    assert patches[:8, 0].tolist() == [0, 1, 10, 11, 2, 3, 12, 13]
    assert patches[12:16, 0].tolist() == [20, 21, 30, 31]


def test_the_key_follows_content(tmp_path):
    pixels = noise(40, 60)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "b.bmp")
    reader = ImageReader(GridLayout(NATIVE))
    first = reader(tmp_path / "a.png")
    assert first.key == reader(str(tmp_path / "b.bmp")).key == reader(pixels).key == reader(Image.fromarray(pixels)).key
    assert reader(pixels.transpose(1, 0, 2)).key != first.key
    assert reader(np.zeros((56, 112, 3), np.uint8)).key != reader(np.zeros((112, 56, 3), np.uint8)).key
    changed = pixels.copy()
    changed[0, 0, 0] ^= 255
    assert reader(changed).key != first.key


# Kinds of pictures. Each is decoded from a file and from the PIL image it was made of.


def test_transparency_lies_on_white(tmp_path):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:, 2:] = (10, 20, 30, 255)
    rgba[0, 0] = (0, 0, 0, 128)
    grey = np.zeros((4, 4, 2), np.uint8)
    grey[:, 2:] = (10, 255)
    for name, image in {"rgba": Image.fromarray(rgba), "la": Image.fromarray(grey, "LA")}.items():
        image.save(tmp_path / f"{name}.png")
        for source in (image, tmp_path / f"{name}.png"):
            decoded = decode_image(source)
            assert pixel(decoded, 1, 1) == (255, 255, 255)
            assert pixel(decoded, 3, 3) == ((10, 20, 30) if name == "rgba" else (10, 10, 10))
    assert pixel(decode_image(rgba)) == (127, 127, 127)
    assert pixel(decode_image(Image.fromarray(grey, "LA").convert("La")), 1, 1) == (255, 255, 255)


def test_palettes(tmp_path):
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([200, 0, 0, 0, 200, 0])
    palette.putpixel((3, 3), 1)
    palette.save(tmp_path / "plain.png")
    palette.save(tmp_path / "clear.png", transparency=0)
    palette.save(tmp_path / "bytes.png", transparency=bytes([0, 255]))
    palette.save(tmp_path / "clear.gif", transparency=0)
    assert pixel(decode_image(tmp_path / "plain.png")) == (200, 0, 0)
    for name in ("clear.png", "bytes.png", "clear.gif"):
        decoded = decode_image(tmp_path / name)
        assert (pixel(decoded), pixel(decoded, 3, 3)) == ((255, 255, 255), (0, 200, 0))
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "key.png", transparency=(1, 2, 3))
    assert pixel(decode_image(tmp_path / "key.png")) == (255, 255, 255)


@pytest.mark.parametrize("name", ["g.png", "g.tiff", "g.ppm"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, name):
    values = np.array([[0, 128, 257, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    decoded = np.asarray(decode_image(tmp_path / name))[0, :, 0]
    assert decoded.tolist() == [0, 0, 1, 128, 255]


def test_other_modes(tmp_path):
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=95)
    red, green, blue = pixel(decode_image(tmp_path / "cmyk.jpg"))
    assert red > 240
    assert max(green, blue) < 15
    assert pixel(decode_image(Image.new("1", (3, 3), 1))) == (255, 255, 255)
    assert pixel(decode_image(Image.new("L", (3, 3), 7))) == (7, 7, 7)
    assert pixel(decode_image(Image.new("I", (3, 3), 65535))) == (255, 255, 255)
    assert pixel(decode_image(Image.new("F", (3, 3), 1.0))) == (255, 255, 255)
    with pytest.raises(ImageError, match="outside 16 bits"):
        decode_image(Image.new("I", (3, 3), 70000))
    with pytest.raises(ImageError, match="divide by 255"):
        decode_image(Image.new("F", (3, 3), 200.0))
    assert pixel(decode_image(Image.new("HSV", (3, 3), (0, 255, 255)))) == (255, 0, 0)


def test_animations_give_their_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime")]
    for name in ("a.gif", "a.webp", "a.png", "a.tiff"):
        frames[0].save(
            tmp_path / name, save_all=True, append_images=frames[1:], **({"lossless": True} if "webp" in name else {})
        )
        assert pixel(decode_image(tmp_path / name)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, kind, orientation):
    upright = np.zeros((32, 64, 3), np.uint8)
    upright[:16, :32] = (250, 0, 0)
    upright[16:, 32:] = (0, 0, 250)
    stored = Image.fromarray(upright)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "webp" else {"quality": 95} if kind == "jpg" else {}
    path = tmp_path / f"o.{kind}"
    stored.save(path, exif=exif, **options)
    decoded = decode_image(path)
    assert decoded.size == (64, 32)
    assert np.abs(np.asarray(decoded).astype(int) - upright).mean() < 3
    reader = ImageReader(GridLayout("native:784:2048"))
    assert reader.grid_of(path) == reader(path).grid == (2, 4)
    with Image.open(path) as image:
        assert decode_image(image).size == (64, 32)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow mentions the damage; the picture itself is whole
def test_damaged_exif_counts_as_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(8, 16)).save(tmp_path / "a.jpg", exif=exif.tobytes()[:20] + b"\xff" * 9)
    assert decode_image(tmp_path / "a.jpg").size == (16, 8)


def png(width, height, body=b""):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def damaged():
    buffer = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    buffer = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(buffer, "PNG")
    whole = buffer.getvalue()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    return {
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "truncated.png": (whole[: len(whole) // 2], "truncated"),
        "header only.png": (whole[:20], "not a picture|cannot be decoded|truncated"),
        "corrupt.png": (bytes(flipped), "cannot be decoded"),
        "empty.png": (b"", "not a picture of a known format"),
        "text.jpg": (b"<html>not found</html>", "not a picture of a known format"),
        "vector.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture of a known format"),
        "bomb.png": (png(50_000, 50_000), "decompression bomb"),
        "large.png": (png(9_000, 9_000), "truncated|cannot be decoded"),
        "thin.png": (png(0, 10), "cannot be decoded|not a picture|nothing to see"),
    }


@pytest.mark.parametrize("name", damaged())
def test_damaged_files_are_refused_by_name(tmp_path, name):
    data, reason = damaged()[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ImageError, match=reason) as caught:
        decode_image(path)
    assert str(path) in str(caught.value)


def test_pixel_limit_holds_before_decoding(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(png(200, 100))  # no pixel data: decoding it would say "truncated"
    for call in (
        lambda: decode_image(path, max_pixels=19_999),
        lambda: ImageReader(GridLayout(NATIVE), max_pixels=19_999).grid_of(path),
    ):
        with pytest.raises(ImageError, match="200 x 100 pixels is more than the limit of 19,999"):
            call()
    assert ImageReader(GridLayout(NATIVE), max_pixels=20_000).grid_of(path) == (8, 14)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15_000)  # Pillow warns above it; a warning is an error in the tests
    with pytest.raises(ImageError, match="decompression bomb"):
        decode_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)  # and refuses above twice of it
    with pytest.raises(ImageError, match="decompression bomb"):
        decode_image(path)


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, reason in [
        (tmp_path / "none.png", "file not found"),
        (tmp_path, "not a regular"),
        (tmp_path / "pipe", "not a reg"),
    ]:
        with pytest.raises(ImageError, match=reason):
            decode_image(path)
        with pytest.raises(ImageError, match=reason):
            ImageReader(GridLayout(NATIVE))(path)
    with pytest.raises(ImageError, match="null"):
        ImageReader(GridLayout(NATIVE))("a\0b")


def test_arrays():
    pixels = noise(5, 6)
    np.testing.assert_array_equal(np.asarray(decode_image(pixels)), pixels)
    for dtype in (np.float32, np.float64):
        np.testing.assert_array_equal(np.asarray(decode_image((pixels / 255).astype(dtype))), pixels)
    np.testing.assert_array_equal(np.asarray(decode_image(pixels[..., 0]))[..., 2], pixels[..., 0])
    assert decode_image(np.float16([[0.5]])).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize(
    "array, reason",
    [
        (np.zeros((3, 5, 6), np.uint8), "shape 3x5x6.*channels last"),
        (np.zeros(5, np.uint8), "shape 5"),
        (np.zeros((2, 5, 5, 3), np.uint8), "shape 2x5x5x3"),
        (np.zeros((0, 5, 3), np.uint8), "nothing to see"),
        (np.zeros((5, 5), np.int32), "dtype int32"),
        (np.zeros((5, 5), bool), "dtype bool"),
        (np.full((5, 5), np.nan), "NaN"),
        (np.full((5, 5), 1.5), r"\[0, 1\]; divide by 255"),
        (np.full((5, 5), -0.1), r"floats from -0.1"),
    ],
)
def test_other_arrays_are_refused(array, reason):
    with pytest.raises(ImageError, match=reason):
        decode_image(array)
    with pytest.raises(ImageError, match=reason):
        ImageReader(GridLayout(NATIVE)).grid_of(array)


def test_empty_and_extreme_shapes():
    with pytest.raises(ImageError, match="nothing to see"):
        decode_image(Image.new("RGB", (0, 5)))
    for policy in (NATIVE, "square:56"):
        reader = ImageReader(GridLayout(policy))
        assert reader(noise(1, 200)).grid == reader.grid_of(noise(1, 200))
        for call in (reader, reader.grid_of):
            with pytest.raises(ImageError, match="201 x 1 pixels is more than 200 times"):
                call(noise(1, 201))


def test_the_callers_picture_is_left_alone():
    image = Image.fromarray(noise(8, 8))
    decoded = decode_image(image)
    decoded.putpixel((0, 0), (0, 0, 0))
    pixels = noise(8, 8)
    before = pixels.copy()
    assert decode_image(image).tobytes() == image.tobytes()
    ImageReader(GridLayout(NATIVE))(pixels)
    np.testing.assert_array_equal(pixels, before)


def test_cache_reads_once_notices_changes_and_forgets_the_oldest(tmp_path, monkeypatch):
    decoded = []
    plain = decode_image
    monkeypatch.setattr(
        images, "decode_image", lambda source, **options: decoded.append(source) or plain(source, **options)
    )
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path in paths:
        Image.fromarray(noise(56, 56)).save(path)
    reader = ImageReader(GridLayout("square:56"), cache_bytes=2 * 56 * 56 * 3)
    first = reader(paths[0])
    with pytest.raises(ValueError, match="read-only"):
        first.patches[0, 0] = 1
    (tmp_path / "link.png").symlink_to(paths[0])
    assert reader(str(paths[0])) is reader(tmp_path / "link.png") is first
    assert len(decoded) == 1
    reader(paths[1])
    reader(paths[0])  # now 1 is the oldest
    reader(paths[2])
    assert reader(paths[0]) is first
    assert len(decoded) == 3
    reader(paths[1])
    assert len(decoded) == 4
    Image.fromarray(noise(57, 57)).save(paths[1])
    assert reader(paths[1]).key != first.key
    assert len(decoded) == 5
    uncached = ImageReader(GridLayout("square:56"), cache_bytes=0)
    assert uncached(paths[0]).key == uncached(paths[0]).key == first.key
    assert len(decoded) == 7


def test_many_threads_read_the_same(tmp_path):
    paths = [tmp_path / f"{i}.jpg" for i in range(6)]
    for path in paths:
        Image.fromarray(noise(70, 90)).save(path)
    expected = {path: ImageReader(GridLayout(NATIVE))(path).key for path in paths}
    reader = ImageReader(GridLayout(NATIVE), cache_bytes=3 * 56 * 84 * 3)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda path: (path, reader(path).key), paths * 20))
    assert all(expected[path] == key for path, key in results)
    assert reader._held == sum(entry.patches.nbytes for entry in reader._cache.values()) <= reader._cache_bytes


@pytest.mark.skipif(not (SHARED / "avt_ai_images").is_dir(), reason="real pictures are not at hand")
def test_real_pictures_equal_the_processor():
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 50176})
    reader = ImageReader(GridLayout(NATIVE))
    paths = sorted((SHARED / "avt_ai_images" / "images").glob("*.jpg"))[::9]
    assert len(paths) == 12
    for path in paths:
        with Image.open(path) as image:
            raw = processor(image, do_rescale=False, do_normalize=False)
        result = reader(path)
        assert reader.grid_of(path) == result.grid
        np.testing.assert_array_equal(
            result.patches, raw["pixel_values"].reshape(-1, 3, 2, 196)[:, :, 0].reshape(-1, 588)
        )
