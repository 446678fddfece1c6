"""A folder of images, a sub-folder a class.

Knows nothing of what the rows are for, and of splits.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tasks.findings import EXAMPLES
from tasks.rows import Arrays, DataError
from tasks.table_files import CHUNK_BYTES

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


def images(folder: Path) -> Arrays:
    """Values from 0 to 1, (rows, channels, height, width): one channel where every image is grey, else three."""
    paths = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise DataError(f"{folder} must hold a sub-folder of images for each class, found no image; fill it")
    sizes: dict[Path, tuple[int, int]] = {}
    modes, bad = set(), []
    for path in paths:
        try:
            with Image.open(path) as image:
                image.load()
                sizes[path] = image.size
                modes.add("L" if image.mode in ("1", "L") else "RGB")
        except (OSError, Image.DecompressionBombError, SyntaxError):
            bad.append(path.relative_to(folder).as_posix())
    if bad:
        raise DataError(
            f"{folder}: every image must be readable, found {len(bad)} that are not "
            f"({', '.join(bad[:EXAMPLES])}); replace or delete them"
        )
    (width, height), _ = Counter(sizes.values()).most_common(1)[0]
    odd = [path.relative_to(folder).as_posix() for path, size in sizes.items() if size != (width, height)]
    if odd:
        raise DataError(
            f"{folder}: every image must have the same size, found {len(odd)} that are not {width} by {height} "
            f"({', '.join(odd[:EXAMPLES])}); resize them"
        )
    mode = "RGB" if "RGB" in modes else "L"
    step = max(1, CHUNK_BYTES // (width * height * len(mode)))

    def pairs() -> Iterator[tuple[Any, Any]]:
        for begin in range(0, len(paths), step):
            some = paths[begin : begin + step]
            stacked = np.stack([_pixels(path, mode) for path in some]).astype(np.float32) / np.float32(255)
            yield stacked, np.array([path.parent.name for path in some])

    return pairs


def _pixels(path: Path, mode: str) -> npt.NDArray[np.uint8]:
    """(channels, height, width)."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert(mode))
    return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)
