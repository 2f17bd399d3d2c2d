"""Photographs of every kind to pixels and latents, the batch of a training step, and pictures for people."""

import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import difference, refusal
from PIL import Image, ImageCms, features
from PIL.PngImagePlugin import iTXt
from torch import Tensor

import tinydb.pictures
from tinydb.data import ENCODE_BATCH, Examples, Latents, fit, random_batch, read_pictures
from tinydb.pictures import describe, grid, open_picture, read_description, save_png, to_images, to_pixels

ORIENTATION = 0x0112  # the EXIF tag
TURNS = {  # how a camera that notes this orientation has stored an upright picture
    1: [], 2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180],
    4: [Image.Transpose.FLIP_TOP_BOTTOM], 5: [Image.Transpose.TRANSPOSE], 6: [Image.Transpose.ROTATE_90],
    7: [Image.Transpose.TRANSVERSE], 8: [Image.Transpose.ROTATE_270]}


def picture(width: int = 40, height: int = 30) -> Image.Image:
    """A smooth picture without any symmetry."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


# --------------------------------------------------------------------------------- files to pictures


@pytest.mark.parametrize("suffix, tolerance", [("png", 0), ("jpg", 12)])
@pytest.mark.parametrize("orientation", TURNS)
def test_photograph_is_upright(tmp_path, orientation, suffix, tolerance):
    stored, exif = picture(), Image.Exif()
    for turn in TURNS[orientation]:
        stored = stored.transpose(turn)
    exif[ORIENTATION] = orientation
    stored.save(tmp_path / f"turned.{suffix}", exif=exif, quality=98, subsampling=0)
    assert difference([open_picture(tmp_path / f"turned.{suffix}")], [picture()]) <= tolerance


def translucent(mode: str) -> Image.Image:
    """2x1 pixels: red, or grey where there is no colour; opaque at the left and hidden at the right."""
    image = Image.new(mode, (2, 1), (200, 0, 0, 255) if mode == "RGBA" else (200, 255))
    image.putpixel((1, 0), (200, 0, 0, 0) if mode == "RGBA" else (200, 0))
    return image


def palette() -> Image.Image:
    """2x1 pixels of two colours."""
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 90, 0])
    image.putpixel((1, 0), 1)
    return image


def sixteen_bits(*values: int) -> Image.Image:
    return Image.fromarray(np.array([values], dtype=np.uint16))


def floats(*values: float) -> Image.Image:
    return Image.fromarray(np.array([values], dtype=np.float32))


@pytest.mark.parametrize("name, image, options, expected", [
    ("RGBA.png", translucent("RGBA"), {}, [(200, 0, 0), (255, 255, 255)]),
    ("LA.png", translucent("LA"), {}, [(200, 200, 200), (255, 255, 255)]),
    ("P.png", palette(), {}, [(200, 0, 0), (0, 90, 0)]),
    ("P-transparent.png", palette(), {"transparency": 1}, [(200, 0, 0), (255, 255, 255)]),
    ("P-translucent.png", palette(), {"transparency": bytes([255, 128])}, [(200, 0, 0), (127, 172, 127)]),
    ("P-transparent.gif", palette(), {"transparency": 1}, [(200, 0, 0), (255, 255, 255)]),
    ("RGB-transparent.png", Image.new("RGB", (2, 1), (9, 8, 7)), {"transparency": (9, 8, 7)},
     [(255, 255, 255)] * 2),
    ("L.png", Image.new("L", (2, 1), 77), {}, [(77, 77, 77)] * 2),
    ("1.png", Image.new("1", (2, 1), 1), {}, [(255, 255, 255)] * 2),
    ("I;16.png", sixteen_bits(0x8080, 0xFFFF), {}, [(128, 128, 128), (255, 255, 255)]),
    ("I;16.tiff", sixteen_bits(0, 0x4040), {}, [(0, 0, 0), (64, 64, 64)]),
    ("12-bits.tiff", sixteen_bits(0, 0xFFF), {}, [(0, 0, 0), (255, 255, 255)]),
    ("8-bits.png", sixteen_bits(100, 200), {}, [(100, 100, 100), (200, 200, 200)]),
    ("float-to-1.tiff", floats(0.5, 1), {}, [(127, 127, 127), (255, 255, 255)]),
    ("float-to-255.tiff", floats(2, 200), {}, [(2, 2, 2), (200, 200, 200)]),
    ("float-to-65535.tiff", floats(0x8080, 300), {}, [(128, 128, 128), (1, 1, 1)]),
    ("float-nan.tiff", floats(float("nan"), 0.5), {}, [(0, 0, 0), (127, 127, 127)]),
    ("I.tiff", Image.new("I", (2, 1), 2**30), {}, [(127, 127, 127)] * 2),
    ("CMYK.tiff", Image.new("CMYK", (2, 1), (0, 255, 255, 0)), {}, [(255, 0, 0)] * 2),
    ("RGB.bmp", Image.new("RGB", (2, 1), (1, 2, 3)), {}, [(1, 2, 3)] * 2),
    ("RGB.webp", Image.new("RGB", (2, 1), (1, 2, 3)), {"lossless": True}, [(1, 2, 3)] * 2),
], ids=lambda value: value if isinstance(value, str) else "")
def test_every_mode_becomes_the_rgb_that_one_sees(tmp_path, name, image, options, expected):
    """Transparency is white, whatever colour it hides; 16 bits keep their greys."""
    image.save(tmp_path / name, **options)
    opened = open_picture(tmp_path / name)
    assert opened.mode == "RGB" and opened.size == (2, 1)
    assert [opened.getpixel((x, 0)) for x in range(2)] == expected


def test_multi_picture_jpeg_gives_its_first_picture(tmp_path):
    """What many phones and cameras write into a .jpg."""
    second = Image.new("RGB", (40, 30))
    picture().save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second], quality=98)
    assert Image.open(tmp_path / "a.jpg").format == "MPO"
    assert difference([open_picture(tmp_path / "a.jpg")], [picture()]) < 40


def profile(**primaries: tuple[float, float, float]) -> bytes:
    """An ICC profile like sRGB's, but for what it says red, green and blue are (X, Y, Z; D50)."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for i in range(struct.unpack_from(">I", content, 128)[0]):
        tag, offset, _ = struct.unpack_from(">4sII", content, 132 + 12 * i)
        if values := primaries.get(tag.decode()):
            struct.pack_into(">3i", content, offset + 8, *(round(value * 65536) for value in values))
    return bytes(content)


DISPLAY_P3 = profile(rXYZ=(0.51512, 0.24120, -0.00105), gXYZ=(0.29198, 0.69225, 0.04189),
                     bXYZ=(0.15710, 0.06657, 0.78407))
BLUE_AS_GREEN = profile(gXYZ=(0.14307, 0.06061, 0.71410), bXYZ=(0.38515, 0.71687, 0.09708))


@pytest.mark.parametrize("name, colours, expected", [
    ("p3.png", (200, 100, 50), (215, 93, 31)), ("p3.jpg", (200, 100, 50), (215, 93, 31)),
    ("p3.webp", (90, 200, 120), (0, 203, 111)), ("swapped.tiff", (200, 10, 60), (200, 60, 10)),
    ("swapped-RGBA.png", (200, 10, 60), (200, 60, 10)), ("swapped-P.png", (200, 10, 60), (200, 60, 10)),
    ("damaged.png", (200, 10, 60), (200, 10, 60)),
])
def test_colours_are_those_of_the_embedded_profile(tmp_path, name, colours, expected):
    """In sRGB. The numbers of Display P3 are by its matrices and the transfer curve, which is sRGB's."""
    image = Image.new("RGB", (16, 16), colours)
    if "-" in name:
        image = image.quantize(2) if "-P" in name else image.convert("RGBA")
    icc = b"none" if "damaged" in name else DISPLAY_P3 if "p3" in name else BLUE_AS_GREEN
    image.save(tmp_path / name, icc_profile=icc, **({"quality": 100} if "p3" in name else {}))
    found = open_picture(tmp_path / name)
    assert np.abs(np.subtract(found.getpixel((8, 8)), expected)).max() <= 2


def test_flat_pictures_are_said_aloud(tmp_path):
    Image.new("RGB", (40, 40), "black").save(tmp_path / "black.png")
    Image.new("L", (40, 40), 128).save(tmp_path / "grey.jpg")
    picture().save(tmp_path / "rex.png")
    pictures, remarks = read_pictures(tmp_path, 16)
    assert len(pictures) == 3 and [remark.split(" is ")[0] for remark in remarks] == ["black.png", "grey.jpg"]
    assert all("one flat colour" in remark for remark in remarks)


@pytest.mark.parametrize("name, content", [
    ("loop.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{ } loop\n"),
    ("a.ppm", b"P6 1 1 255\n\1\2\3"), ("IMG_1.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"),
], ids=str)
def test_other_formats_are_never_decoded(tmp_path, name, content):
    """Whatever they are called: PostScript would run, and each decoder is one more way in."""
    (tmp_path / name).write_bytes(content)
    started = time.monotonic()
    with pytest.raises(ValueError, match="HEIC" if "IMG" in name else "not a picture"):
        open_picture(tmp_path / name)
    assert time.monotonic() - started < 5


def test_large_photographs_are_shrunk_and_larger_pictures_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tinydb.pictures, "MOST_PIXELS", 1000)
    sizes = {"small.png": (40, 25), "photo.jpg": (80, 50), "huge.jpg": (90, 60), "huge.png": (41, 25)}
    for name, size in sizes.items():
        picture(*size).save(tmp_path / name)
    pictures, remarks = read_pictures(tmp_path, 16)
    assert list(pictures) == ["photo.jpg", "small.png"] and open_picture(tmp_path / "photo.jpg").size == (40, 25)
    assert ["megapixels; make it smaller" in remark and "damaged" not in remark for remark in remarks] == [True, True]
    assert Image.MAX_IMAGE_PIXELS is not None


def fill_with_junk(folder: Path) -> None:
    """What folders of photographs hold besides photographs."""
    picture(400, 300).save(folder / "whole.jpg")
    (folder / "truncated.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:2000])
    (folder / "empty.png").touch()
    (folder / "notes.txt").write_text("rex on his birthday")
    (folder / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder / "more").mkdir()
    picture().save(folder / "more" / "b.png")


def test_junk_is_skipped_with_one_line_each(tmp_path):
    fill_with_junk(tmp_path)
    pictures, remarks = read_pictures(tmp_path, 16)
    assert list(pictures) == ["whole.jpg"]
    reasons = dict(line.split(" is skipped: ", 1) for line in remarks)
    assert reasons.keys() == {"truncated.jpg", "empty.png", "notes.txt", "IMG_1.HEIC"}
    assert reasons["empty.png"] == reasons["notes.txt"] == "not a picture"
    assert "convert it to JPEG" in reasons["IMG_1.HEIC"]
    assert "damaged" in reasons["truncated.jpg"] and "\n" not in reasons["truncated.jpg"]


def test_turned_picture_with_a_damaged_note_is_skipped(tmp_path):
    """The note says that the picture lies on its side, and has a word where its width should stand."""
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x010E] = 6, "abc"
    Image.new("RGB", (32, 24)).save(tmp_path / "0.jpg", exif=exif)
    content = (tmp_path / "0.jpg").read_bytes()
    (tmp_path / "0.jpg").write_bytes(content.replace(b"\x01\x0e\x00\x02", b"\x01\x00\x00\x02"))
    pictures, [remark] = read_pictures(tmp_path, 16)
    assert not pictures and remark.startswith("0.jpg is skipped: damaged")


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_damaged_avif_is_skipped(tmp_path):
    """Pillow raises another kind of error for it."""
    picture().save(tmp_path / "a.avif")
    content = (tmp_path / "a.avif").read_bytes()
    start = content.index(b"mdat") + 4
    (tmp_path / "a.avif").write_bytes(content[:start] + b"\xff" * 20 + content[start + 20:])
    pictures, remarks = read_pictures(tmp_path, 16)
    assert not pictures and remarks[0].startswith("a.avif is skipped: damaged")


def test_pictures_come_in_the_order_of_their_names(tmp_path):
    """Which say nothing about contents."""
    for name in ("c.png", "a.heic", "b.png"):
        picture().save(tmp_path / name, "PNG")
    assert list(read_pictures(tmp_path, 16)[0]) == ["a.heic", "b.png", "c.png"]


@pytest.mark.parametrize("size, remarked", [(16, False), (45, False), (46, True), (512, True)])
def test_small_pictures_are_enlarged_and_named(tmp_path, size, remarked):
    """From one and a half times on."""
    picture(40, 30).save(tmp_path / "a.png")
    pictures, remarks = read_pictures(tmp_path, size)
    assert pictures["a.png"].size == (size, size)
    assert ["a.png is only 40x30" in remark for remark in remarks] == [True] * remarked


@pytest.mark.parametrize("make", [lambda path: None, Path.touch], ids=["nothing", "file"])
def test_no_such_folder(tmp_path, make: Callable[[Path], None]):
    make(tmp_path / "dogs")
    assert "dogs: not a folder" in refusal(read_pictures, tmp_path / "dogs", 16)


# -------------------------------------------------------------------------- pictures to latents and back


@pytest.mark.parametrize("width, height, box", [(40, 30, (5, 0, 35, 30)), (30, 40, (0, 5, 30, 35)),
                                                (64, 64, (0, 0, 64, 64)), (6, 8, (0, 1, 6, 7))])
def test_fit_is_the_centre_square_in_lanczos(width, height, box):
    image = picture(width, height)
    assert difference([fit(image, 16)], [image.resize((16, 16), Image.Resampling.LANCZOS, box)]) == 0


def test_pixels_and_back():
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    pixels = to_pixels([image, Image.new("RGB", (8, 8), (0, 127, 255))])
    assert pixels.shape == (2, 3, 8, 8) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[1, :, 3, 5], torch.tensor([-1, 127 / 127.5 - 1, 1]))
    assert difference(to_images(pixels)[:1], [image]) == 0


def test_pixels_out_of_range_are_clipped():
    assert to_images(torch.tensor([-3.0, -1, 3]).view(1, 3, 1, 1))[0].getpixel((0, 0)) == (0, 0, 255)


def test_latents_are_those_of_each_picture(pairs):
    """As diffusers' VAE encodes it, and in the order of the pictures, however many are encoded together."""
    pair = pairs("nano")
    images = [picture(16 + i, 16).crop((i, 0, 16 + i, 16)) for i in range(ENCODE_BATCH + 2)]
    latents = Latents.of(images, pair.sd.vae, torch.device("cpu"))
    with torch.no_grad():
        expected = pair.reference.vae.encode(to_pixels(images)).latent_dist
    scale = pair.reference.vae.config.scaling_factor
    torch.testing.assert_close(latents.mean, expected.mean * scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(latents.std, expected.std * scale, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------- everything random in a step


def numbered(count: int, start: int = 0, std: float = 0.0) -> Latents:
    """Latents that tell which picture they are."""
    mean = torch.arange(start, start + count).float().view(-1, 1, 1, 1).expand(-1, 4, 8, 8)
    return Latents(mean, torch.full_like(mean, std))


def batch_of(count: int, classes: int = 0, *, seed: int = 0, step: int = 0) -> list[Examples]:
    """The batch of a step on three instance and five class images, as many of each or another number of these."""
    return random_batch([numbered(3), numbered(5, start=10)], [count, classes or count], 1000, seed, step)


def test_a_batch_depends_on_seed_and_step_alone():
    """And leaves the global generator alone."""
    def drawn(seed: int, step: int) -> list[Tensor]:
        return [tensor for examples in batch_of(4, seed=seed, step=step)
                for tensor in (examples.noise, examples.timesteps)]

    torch.manual_seed(1)
    first, following = drawn(3, 7), torch.rand(3)
    assert all(torch.equal(*pair) for pair in zip(first, drawn(3, 7)))
    for other in (drawn(3, 8), drawn(4, 7), drawn(7, 3)):
        assert not any(torch.equal(*pair) for pair in zip(first, other))
    torch.manual_seed(1)
    assert torch.equal(following, torch.rand(3))


def test_no_picture_comes_twice_before_each_came_once():
    instance, classes = (examples.indices.tolist() for examples in batch_of(7))
    assert sorted(instance[:3]) == sorted(instance[3:6]) == [0, 1, 2]
    assert sorted(classes[:5]) == [0, 1, 2, 3, 4]


def test_order_differs_from_step_to_step():
    assert len({tuple(batch_of(3, step=step)[0].indices.tolist()) for step in range(30)}) == 6


def test_a_batch_knows_its_pictures_and_gives_its_parts():
    batch = batch_of(12, 6)
    for start, share, examples in zip((0, 10), (4, 2), batch):
        assert torch.equal(examples.latents[:, 0, 0, 0], examples.indices + start)
        parts = [examples.part(i, 3) for i in range(3)]
        assert [len(part.timesteps) for part in parts] == [share] * 3
        for name in ("indices", "latents", "noise", "timesteps"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(examples, name))


def test_every_example_has_noise_of_its_own():
    noise = torch.cat([examples.noise for examples in batch_of(700, 300)])
    assert noise.shape == (1000, 4, 8, 8)
    assert len(noise.flatten(1).unique(dim=0)) == 1000
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


def test_every_timestep_comes_equally_often():
    batch = random_batch([numbered(1), numbered(1)], [5000, 5000], 10, seed=0, step=0)
    instance, classes = (examples.timesteps for examples in batch)
    counts = torch.cat([instance, classes]).bincount().tolist()
    assert len(counts) == 10 and all(900 < count < 1100 for count in counts) and not torch.equal(instance, classes)


def test_latents_are_drawn_from_the_posterior():
    """Their noise has nothing to do with the noise that is added."""
    [examples] = random_batch([numbered(1, start=3, std=0.5)], [300], 1000, seed=0, step=0)
    latents, noise = examples.latents, examples.noise
    assert abs(latents.mean() - 3) < 0.01 and abs(latents.std() - 0.5) < 0.01
    assert abs(torch.corrcoef(torch.stack([latents.flatten(), noise.flatten()]))[0, 1]) < 0.05


# ------------------------------------------------------------------------------------ pictures for people


def test_grid_goes_row_by_row():
    images = [Image.new("RGB", (200, 130), (i, 0, 0)) for i in (10, 20, 30)]
    sheet = grid(images, 2)
    assert sheet.size == (400, 260)
    assert [sheet.getpixel(xy)[0] for xy in [(50, 50), (250, 50), (50, 200), (250, 200)]] == [10, 20, 30, 255]


def test_caption_has_the_room_above_its_row():
    """Up to the next caption, however long it is; a row without any has no line for it."""
    images = [Image.new("RGB", (200, 130), "red")] * 6
    assert grid(images, 3).size == (600, 260)
    sheet = np.asarray(grid(images, 3, ["long " * 60, "b", "", "", "", ""]).convert("L"))
    line = len(sheet) - 260
    dark = (sheet[:line] < 128).any(axis=0)
    assert dark[100:196].any() and not dark[197:203].any() and dark[203:220].any() and not dark[220:].any()
    assert (sheet[line:] < 128).all()  # no text on the pictures


def test_small_pictures_are_enlarged_in_a_grid():
    assert grid([picture(16, 20)] * 2, 2).size == (256, 160)


@pytest.mark.parametrize("prompt, negative, settings, text", [
    ("a dög, 犬", "blurry", {"Seed": 1, "Model": "a, b"},
     'a dög, 犬\nNegative prompt: blurry\nSteps: 3, Seed: 1, Model: "a, b"'),
    ("[V] dog", "", {"Size": "8x8", "Model": "C:/dog"},
     'a dog\nNegative prompt: \nSteps: 3, Size: 8x8, Model: "C:/dog", Template: [V] dog'),
    ('a "red" dog, [V]', "[V], bad", {},
     'a "red" dog, a\nNegative prompt: a, bad\n'
     'Steps: 3, Template: "a \\"red\\" dog, [V]", Negative Template: "[V], bad"'),
    ("", "", {}, "\nNegative prompt: \nSteps: 3"),
], ids=["letters", "identifier", "quotes", "empty"])
def test_png_carries_its_text(tmp_path, prompt, negative, settings, text):
    """As A1111 and ComfyUI take it over, which know no [V]; and read back as it was typed."""
    assert describe(prompt, negative, "a", Steps=3, **settings) == text
    save_png(picture(), tmp_path / "new" / "a.png", text)
    image = Image.open(tmp_path / "new" / "a.png")
    assert image.text == {"parameters": text} and isinstance(image.text["parameters"], iTXt) == ("犬" in text)
    assert read_description(image) == (prompt, negative, {"Steps": "3", **{k: str(v) for k, v in settings.items()}})


@pytest.mark.parametrize("text, expected", [
    ("a dog\nNegative prompt: cat, \nhat\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, "
     'Size: 512x768, Lora hashes: "a: 1, b: 2", Version: v1.10.1\n',
     ("a dog", "cat, \nhat", {"Steps": "20", "Sampler": "DPM++ 2M", "Schedule type": "Karras", "CFG scale": "7",
                              "Size": "512x768", "Lora hashes": "a: 1, b: 2", "Version": "v1.10.1"})),
    ("Negative prompt: cat\nSteps: 5,Seed: 1", ("", "cat", {"Steps": "5", "Seed": "1"})),
    ("a {red|blue} dog\nSteps: 5\nTemplate: a", ("a {red|blue} dog", "", {"Steps": "5"})),
    ('a dog\nNegative prompt:\nSteps: 5, Template: "{a|b} dog"', ("a dog", "", {"Steps": "5"})),
], ids=["A1111", "without a prompt", "without a negative one", "template of another program"])
def test_text_of_other_programs_is_read(text, expected):
    image = picture()
    image.info["parameters"] = text
    assert read_description(image) == expected
