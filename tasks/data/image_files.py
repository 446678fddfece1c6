"""A folder of images, a sub-folder a class: what is in it is read as a photographer sees it, or named.

Upright by its EXIF tag, transparent parts over white, 16-bit grey in its full range. Hidden folders and files, and
those that systems leave behind, are passed over. Knows nothing of what the rows are for, and of splits.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from tasks.data.findings import EXAMPLES, Finding, finding
from tasks.data.rows import Arrays, DataError
from tasks.data.table_files import CHUNK_BYTES
from tasks.job import DataConfig

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
# A file is read as what it holds, whatever its suffix: but by none of Pillow's readers that start other programs.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
LEFT_BEHIND = ("__macosx", "@eadir", "thumbs.db", "desktop.ini")
GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")


@dataclass(kw_only=True)
class _Folder:
    """What lies in a folder: the images of all classes, classes without one, and what is not read."""

    images: list[Path] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


def images(data: DataConfig) -> tuple[Arrays, tuple[Finding, ...]]:
    """Values from 0 to 1, (rows, channels, height, width): one channel where every image is grey, else three; and what
    the checks find in the folder. Raises DataError: there is no image, one cannot be read, or they differ in size."""
    root = Path(data.source)
    folder = _look_through(root)
    if not folder.images:
        raise DataError(
            f"{root} must hold a sub-folder of images for each class, found no image but "
            f"{_examples([*folder.empty, *folder.unread]) or 'nothing'}; fill it, or name the folder of the classes"
        )
    sizes: dict[Path, tuple[int, int]] = {}
    modes, several, bad = set(), [], dict[str, str]()
    for path in folder.images:
        name = path.relative_to(root).as_posix()
        try:
            image, frames = _upright(path)
            _values(image)
        except Exception as error:  # noqa: BLE001  (whatever Pillow's readers make of a damaged file)
            is_none = isinstance(error, UnidentifiedImageError)
            bad[name] = "it holds no image" if is_none else str(error) or type(error).__name__
        else:
            sizes[path] = image.size
            modes.add(image.mode)
            several += [name] * (frames > 1)
    if bad:
        raise DataError(
            f"{root}: every image must be readable, found {len(bad)} that are not ({_examples([*bad])}), the first "
            f"because {next(iter(bad.values()))}; replace or delete them"
        )
    (width, height), _ = Counter(sizes.values()).most_common(1)[0]
    odd = [path.relative_to(root).as_posix() for path, size in sizes.items() if size != (width, height)]
    if odd:
        raise DataError(
            f"{root}: every image must have the same size, found {len(odd)} that are not {width} by {height} "
            f"({_examples(odd)}); resize them"
        )
    channels = 1 if modes <= {*GREY} else 3
    step = max(1, CHUNK_BYTES // (width * height * channels))

    def pairs() -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        for begin in range(0, len(folder.images), step):
            some = folder.images[begin : begin + step]
            pixels = [_values(_upright(path)[0]) for path in some]
            stacked = np.stack([np.broadcast_to(values, (channels, height, width)) for values in pixels])
            yield stacked, np.array([path.parent.name for path in some])

    return pairs, tuple(_findings(folder, several, data))


def _look_through(root: Path) -> _Folder:
    folder = _Folder()
    for entry in _entries(root):
        if not entry.is_dir():
            folder.unread.append(entry.name)
            continue
        if not entry.name.isprintable():
            raise DataError(f"{root}: a class's folder must have a printable name, found {entry.name!r}; rename it")
        inside = _entries(entry)
        found = [path for path in inside if path.suffix.lower() in SUFFIXES and (path.is_file() or path.is_symlink())]
        found = [path for path in found if not path.is_dir()]
        folder.images += found
        others = [path.name + "/" * path.is_dir() for path in inside if path not in {*found}]
        if found:
            folder.unread += [f"{entry.name}/{name}" for name in others]
        else:
            folder.empty.append(f"{entry.name}/ ({_examples(others) or 'nothing in it'})")
    return folder


def _entries(folder: Path) -> list[Path]:
    """In the order of their names, without what is hidden or was left there by a system."""
    entries = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in entries if path.name.lower() not in LEFT_BEHIND)


def _examples(names: list[str]) -> str:
    more = len(names) - EXAMPLES
    return ", ".join(names[:EXAMPLES]) + (f" and {more} more" if more > 0 else "")


def _findings(folder: _Folder, several: list[str], data: DataConfig) -> list[Finding]:
    findings: list[Finding] = []
    if folder.empty:
        findings += finding(
            "empty_class", data,
            f"every class's folder must hold an image ({', '.join(SUFFIXES)}), found none in "
            f"{_examples(folder.empty)}; fill or delete it, name the folder of the classes in data.source, or set "
            "data.checks.empty_class: warn to go on without it",
        )  # fmt: skip
    if folder.unread:
        findings += finding(
            "unread_files", data,
            f"every file must be an image ({', '.join(SUFFIXES)}) in its class's folder, found "
            f"{len(folder.unread)} that are left out ({_examples(folder.unread)}); convert, move or delete them",
        )  # fmt: skip
    if several:
        findings += finding(
            "several_frames", data,
            f"every image must be one picture, found {len(several)} of more frames or pages ({_examples(several)}), "
            "of which the first is read; save each as a file of its own",
        )  # fmt: skip
    return findings


def _upright(path: Path) -> tuple[Image.Image, int]:
    """The first frame of an image, turned as its EXIF tag says, and the number of its frames: a camera's second picture
    in a JPEG (a preview, the other eye's) is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is odd in a file that can be read
        # From an open file: of a path Pillow maps a TIFF of grey into memory, and turns it wrongly.
        with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
            frames = getattr(image, "n_frames", 1) if image.format != "MPO" else 1
            image.seek(0)
            image.load()
            if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
                raise ValueError(f"a pixel of its mode {image.mode} has 32 bits, whose range nobody knows")
            return ImageOps.exif_transpose(image), frames


def _values(image: Image.Image) -> npt.NDArray[np.float32]:
    """Values from 0 to 1, (channels, height, width)."""
    if image.mode.startswith("I"):
        return np.asarray(image)[None].astype(np.float32) / np.float32(65535)
    is_grey = image.mode in GREY
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    pixels = np.asarray(image.convert("L" if is_grey else "RGB")).astype(np.float32) / np.float32(255)
    return pixels[None] if is_grey else pixels.transpose(2, 0, 1)
