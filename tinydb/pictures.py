"""Pictures: opening them, pixels to images and back, grids, and the text that a PNG carries along."""

import hashlib
import json
import re
from collections.abc import Iterable
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from textwrap import wrap

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from tinydb.config import require
from tinydb.storage import written_whole
from tinydb.tokenizer import PLACEHOLDER

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF")  # not EPS, whose content is a program that would run
MOST_PIXELS = 100_000_000  # that are decoded, in about 1.5 GB
HEIC = (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1", b"ftypavif")  # bytes 4 to 12 of what Pillow cannot open
MOST_SHOWN = 40  # pictures on a sheet: a few megapixels at Stable Diffusion's size
VISIBLE = 128  # pixels: pictures smaller than this are enlarged in a grid
CAPTION = 24  # pixels that a line of text has there
SMALLEST = 9  # pixels of a letter that can still be read


def open_picture(path: Path) -> Image.Image:
    """An RGB picture in sRGB, upright, transparency over white; ValueError says why a file is not a picture."""
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]  # not every Pillow has AVIF
    usual, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # the limit below takes its place
    try:
        with Image.open(path, formats=formats) as file:
            if file.width * file.height > MOST_PIXELS:
                file.draft(None, (file.width // 2, file.height // 2))  # a JPEG can be decoded at half its size
            if file.width * file.height > MOST_PIXELS:
                size = f"{file.width}x{file.height}"
                raise Image.DecompressionBombError(f"{size} is more than 100 megapixels; make it smaller first")
            image = ImageOps.exif_transpose(file)  # phones store a turned picture and a note
    except UnidentifiedImageError:
        with path.open("rb") as file:
            heic = file.read(12)[4:] in HEIC or path.suffix.lower() in (".heic", ".heif")
        raise ValueError("a HEIC picture; convert it to JPEG first" if heic else "not a picture") from None
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # whatever the decoder of its format raises
        raise ValueError(f"damaged ({error})") from None
    finally:
        Image.MAX_IMAGE_PIXELS = usual
    if image.mode == "F" or image.mode.startswith("I"):
        image = to_grey(image)
    if image.has_transparency_data:
        image = to_srgb(image.convert("RGBA"))  # convert("RGB") alone shows the colour under the transparency
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return to_srgb(image.convert("RGB") if image.mode in ("1", "P") else image).convert("RGB")


def no_picture_in(option: str, folder: str, remarks: list[str]) -> str:
    """What to say of a folder without one: why not, and in which folders inside to look."""
    inside = [f"{path.name} is a folder: give {option} {path}" for path in sorted(Path(folder).iterdir())
              if path.is_dir()]
    return "; ".join([f"{option} {folder}: no picture in it", "expected JPEG or PNG files", *inside, *remarks])


def to_grey(image: Image.Image) -> Image.Image:
    """Grey values of more than 8 bits -> 8 bits, which convert() would clip. Files do not say what white is: it is the
    first of 1 (in floating point), 8, 12, 16 and 31 bits that no value exceeds."""
    values = np.nan_to_num(np.asarray(image, np.float64))
    whites = [1] * (image.mode == "F") + [255, 4095, 65535, 2**31 - 1]
    white = next((white for white in whites if values.max() <= white), values.max())
    return Image.fromarray((values * 255 // white).clip(0, 255).astype(np.uint8))


def to_srgb(image: Image.Image) -> Image.Image:
    """The colours of a picture with an ICC profile, in sRGB. One without is taken to be in sRGB, and so is one whose
    profile is damaged or for another kind of picture."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    try:
        return ImageCms.profileToProfile(image, BytesIO(profile), ImageCms.createProfile("sRGB"),
                                         outputMode="RGBA" if image.mode == "RGBA" else "RGB")
    except ImageCms.PyCMSError:
        return image


def is_flat(image: Image.Image) -> bool:
    """Whether a picture shows nothing but one colour, more or less."""
    return all(high - low < 8 for low, high in image.getextrema())


def to_pixels(images: Iterable[Image.Image | np.ndarray]) -> Tensor:
    """RGB images of one size -> pixels (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels (B, 3, H, W) in [-1, 1] -> B images; what lies outside is clipped. InputError for what is no number."""
    require(bool(pixels.isfinite().all()),
            "the model drew NaN or infinity, not a picture: its weights are damaged, or too large for --precision fp16")
    pixels = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(np.ascontiguousarray(p)) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def pictures_digest(images: list[Image.Image], captions: list[str] = []) -> str:
    """A short name for what pictures show, and for what is said of them."""
    digest = hashlib.sha256()
    for image, caption in zip_longest(images, captions, fillvalue=""):
        digest.update(image.tobytes())
        digest.update(caption.encode())
    return digest.hexdigest()[:12]


def grid(images: list[Image.Image], columns: int, captions: list[str] | None = None) -> Image.Image:
    """Images of one size, row by row in `columns` columns; small ones are enlarged by a whole factor. `captions`, one
    for each image, stand above it; a long one goes on over the next images whose own are empty, shrinks, takes two
    lines or is cut to what room there is."""
    factor = max(1, -(-VISIBLE // min(images[0].size)))
    width, height = (side * factor for side in images[0].size)
    captions = captions or [""] * len(images)
    lines = [CAPTION if any(captions[i : i + columns]) else 0 for i in range(0, len(images), columns)]  # above each row
    sheet = Image.new("RGB", (columns * width, len(lines) * height + sum(lines)), "white")
    for i, (image, caption) in enumerate(zip(images, captions)):
        row, column = divmod(i, columns)
        left, top = column * width, row * height + sum(lines[: row + 1])
        sheet.paste(image.resize((width, height), Image.Resampling.BICUBIC), (left, top))
        if caption:
            following = captions[i + 1 : (row + 1) * columns]
            room = width * (1 + next((k for k, other in enumerate(following) if other), len(following))) - 8
            size = CAPTION * 0.6
            size = max(size * min(1, room / ImageFont.load_default(size).getlength(caption)), SMALLEST)
            font = ImageFont.load_default(size)
            if font.getlength(caption) > room:  # two lines, cut to about the letters that fit
                letters = max(1, int(0.95 * room * len(caption) / font.getlength(caption)))
                caption = "\n".join(wrap(caption, letters, max_lines=2, placeholder="…"))
            middle = left + 4, top - CAPTION / 2
            ImageDraw.Draw(sheet).text(middle, caption, "black", font, anchor="lm", spacing=0)
    return sheet


def save_png(image: Image.Image, path: Path, parameters: str) -> None:
    """Write a PNG that says how it was made, in the text chunk that A1111 and its successors read."""
    text = PngInfo()
    parameters = parameters.encode(errors="backslashreplace").decode()  # a file's name may hold bytes that are no text
    text.add_text("parameters", parameters)  # a tEXt chunk wherever Latin-1 is enough: ComfyUI misreads iTXt
    with written_whole(path) as temporary:
        image.save(temporary, "PNG", pnginfo=text)


def describe(prompt: str, negative: str, identifier: str, **settings: object) -> str:
    """The A1111 `parameters` text: the prompt, the negative prompt, then "Steps: 30, Seed: 1, ...".

    Other programs take [V] for a weight of V, so it is written out as the identifier; what was typed is the Template.
    """
    typed = {"Template": prompt, "Negative Template": negative}
    settings |= {name: text for name, text in typed.items() if PLACEHOLDER in text}
    prompt, negative = (text.replace(PLACEHOLDER, identifier) for text in (prompt, negative))
    texts = map(str, settings.values())
    quoted = [json.dumps(text, ensure_ascii=False) if re.search(r'[,:"\n]', text) else text for text in texts]
    return f"{prompt}\nNegative prompt: {negative}\n" + ", ".join(
        f"{name}: {text}" for name, text in zip(settings, quoted))


def read_description(image: Image.Image) -> tuple[str, str, dict[str, str]]:
    """What `describe`, A1111 or Forge wrote into a PNG: prompt, negative prompt, settings; ValueError where there is
    nothing of it."""
    texts, found, settings_line = f"\n{image.info.get('parameters', '')}".rpartition("\nSteps:")
    if not found:
        raise ValueError("it does not say how it was made")
    settings = {name: json.loads(value) if value.startswith('"') else value.strip() for name, value in re.findall(
        r'(\w[\w \-/]{0,99}):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)', "Steps:" + settings_line.partition("\n")[0])}
    prompt, _, negative = texts.partition("\nNegative prompt:")
    typed, typed_negative = settings.pop("Template", ""), settings.pop("Negative Template", "")
    return (typed if PLACEHOLDER in typed else prompt.removeprefix("\n"),
            typed_negative if PLACEHOLDER in typed_negative else negative.removeprefix(" "), settings)
