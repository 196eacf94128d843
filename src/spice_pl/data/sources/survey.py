"""What a folder of images holds, before its images are decoded.

Shapes: N images.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spice_pl.data.decode import Decoding, quiet_warnings, read_image
from spice_pl.data.left_out import LeftOut
from spice_pl.data.listing import Found, Note, Search, look, scan_files
from spice_pl.data.store import store_folder

TRIED = 32  # evenly spaced images that are decoded to measure the time
LIMIT_S = 4.0  # for them


@dataclass(frozen=True)
class Survey:
    """What a folder holds.

    Attributes:
        found: what a search of the folder found; the data set is opened from it.
        seconds: time that decoding all images will take; 0 if an earlier run has decoded them.
    """

    found: Note | Found
    seconds: float

    @property
    def num_images(self) -> int:
        """N, files that may be images."""
        return self.found.num_images

    @property
    def left_out(self) -> LeftOut:
        """The other files, with reasons."""
        return self.found.left_out


def survey(settings: Mapping[str, Any]) -> Survey | None:
    """List a folder, and decode some of its images to measure the time.

    Args:
        settings: those of the data set `folder`.

    Returns:
        None where the folder or its images are missing, or a table lists them; opening the data
        set says so.
    """
    root, cache = Path(settings["root"]).expanduser(), Path(settings["cache_dir"]).expanduser()
    exclude = settings.get("exclude") or ()
    if settings.get("table") is not None or not os.path.isdir(root) or isinstance(exclude, str):
        return None
    search = Search(root, exclude=exclude, cache_dir=cache)
    found = look(search, str(settings["scan"]))
    if not found.num_images:
        return None
    size = int(settings["image_size"])
    decoding = Decoding(size, settings.get("levels"), settings.get("max_decode_mb"))
    identity = [str(root.resolve()), found.identity, decoding.levels]
    place = store_folder(identity, size, str(cache))
    if (place / "index.json").is_file():
        return Survey(found, 0.0)
    if isinstance(found, Note):
        found = scan_files(search)
    tried = [root / path for path in found.paths[:: -(-found.num_images // TRIED)]]

    def load(path: Path) -> None:
        with suppress(OSError, MemoryError):  # opening the data set says what is wrong
            if path.is_file():
                read_image(path, decoding)

    workers, done, begun = os.cpu_count() or 1, 0, time.monotonic()
    with quiet_warnings(), ThreadPoolExecutor(workers) as pool:
        for first in range(0, len(tried), workers):
            part = tried[first : first + workers]
            done += len(list(pool.map(load, part)))
            if time.monotonic() - begun > LIMIT_S:
                break
    return Survey(found, (time.monotonic() - begun) / done * found.num_images)
