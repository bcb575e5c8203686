"""The generator as a map-style dataset, in memory or on disk in the Market-1501 layout."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from passreid_models.runtime import buffered, check_workers, read_bytes
from passreid_models.synthetic.scene import PLACES, draw

MARKER = "synthetic_persons.json"
FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
OF_FILE_MANAGERS = {".DS_Store", "Thumbs.db", "desktop.ini", "@eaDir"}
MAX_MARKER_BYTES = 2**16


def market1501_file(folder: str, pid: int, camid: int, k: int, site: int = 0) -> str:
    """Where the k-th image of an identity in a camera is, below the dataset's folder."""
    return f"{folder}/{pid + 1:04d}_c{camid + 1}s{site + 1}_{k:06d}_01.jpg"


def at_least(lowest: int, **given: int) -> None:
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < lowest:
            raise ValueError(f"{name} must be an integer of at least {lowest}, got {value!r}")


class SyntheticPersons:
    """A map-style dataset of `(image, pid, camid)`: a PIL RGB image and two labels that count from 0.

    Args:
        num_ids: Number of identities; their pids are `first_id` to `first_id + num_ids - 1`.
        images_per_id: Images of each identity, spread over the cameras in turn.
        cameras: Number of cameras.
        seed: Chooses the world: the same pid or camid with another seed is someone or somewhere else.
        size: (height, width) of the images in pixels.
        first_id: The first pid, to get identities that no other part of the world holds.
        place: `street`, where each camera has surroundings and an exposure of its own; `studio`, where all have a gray
            backdrop and the same exposure, and their own viewpoints and light; or `summer`, a street in warm light
            where bright clothes are common, to adapt from or to.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, num_ids: int, images_per_id: int = 8, cameras: int = 4, seed: int = 0,
                 size: tuple[int, int] = (256, 128), first_id: int = 0, place: str = "street") -> None:  # fmt: skip
        at_least(1, num_ids=num_ids, images_per_id=images_per_id, cameras=cameras)
        at_least(0, seed=seed, first_id=first_id)
        if num_ids * images_per_id >= 2**31:
            raise ValueError(f"num_ids x images_per_id must be less than 2^31, got {num_ids:,} x {images_per_id:,}")
        if not isinstance(size, Sequence) or len(size) != 2 or min(size) < 16:
            raise ValueError(f"size must be (height, width) of at least 16 pixels each, got {size!r}")
        if place not in PLACES:
            raise ValueError(f"place must be one of {', '.join(PLACES)}, got {place!r}")
        self.place = place
        self.num_ids, self.images_per_id, self.cameras = int(num_ids), int(images_per_id), int(cameras)
        self.seed, self.first_id, self.size = int(seed), int(first_id), (int(size[0]), int(size[1]))

    def __len__(self) -> int:
        return self.num_ids * self.images_per_id

    def _key(self, index: int) -> tuple[int, int, int]:
        who, nth = divmod(index, self.images_per_id)
        return self.first_id + who, nth % self.cameras, nth // self.cameras  # pid, camid, k

    @property
    def pids(self) -> list[int]:
        """The identity of every image."""
        return [self._key(i)[0] for i in range(len(self))]

    @property
    def camids(self) -> list[int]:
        """The camera of every image."""
        return [self._key(i)[1] for i in range(len(self))]

    def __getitem__(self, index: int) -> tuple[Image.Image, int, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        pid, camid, k = self._key(int(index) % len(self))
        return draw(self.seed, pid, camid, k, self.size, self.place), pid, camid

    def write_market1501(self, root: str | os.PathLike[str], train_ids: int | None = None, distractors: int = 0,
                         workers: int = 0) -> Path:  # fmt: skip
        """Write the images as JPEG files in the layout of Market-1501, and return the folder.

        Names are `PPPP_cCsS_FFFFFF_NN.jpg`, with PPPP the pid + 1 and C the camid + 1. Each test identity has one query
        image a camera, its other images are the gallery. The folder appears at once, complete.

        Args:
            root: A folder that does not exist, is empty, or holds only what this method wrote (it is replaced).
            train_ids: The first so many identities train, the others test; by default half.
            distractors: Gallery images of people who are in no query, with pid 0000.
            workers: Processes that draw; 0 draws in this one. Where processes are not forked (Windows, macOS, Python
                3.14), a script must make the call under ``if __name__ == "__main__":``.

        Raises:
            ValueError: If some queries would have no match in another camera, or an argument is out of range.
            FileExistsError: If the folder holds anything else, at any depth; the message names it.
            ChildProcessError: If a process that draws died.
        """
        train_ids = self.num_ids // 2 if train_ids is None else train_ids
        at_least(0, train_ids=train_ids, distractors=distractors, workers=workers)
        check_workers(workers)
        if train_ids > self.num_ids:
            raise ValueError(f"train_ids must be between 0 and num_ids = {self.num_ids}, got {train_ids}")
        if not 2 <= self.cameras <= 9 or self.images_per_id < self.cameras + 2:
            raise ValueError(
                "the Market-1501 layout takes 2 to 9 cameras and images_per_id of at least cameras + 2 (queries and a"
                f" gallery of two cameras), got cameras={self.cameras} and images_per_id={self.images_per_id}"
            )
        root = Path(root)
        _check_own(root)
        jobs = list(self._jobs(train_ids, distractors))
        root.parent.mkdir(parents=True, exist_ok=True)
        unfinished, old = (root.parent / f".{root.name}.{os.getpid()}.{state}" for state in ("unfinished", "old"))
        try:
            for folder in FOLDERS:
                (unfinished / folder).mkdir(parents=True)
            save = partial(_save, self.seed, self.size, self.place, unfinished)
            if workers > 0:
                try:
                    with ProcessPoolExecutor(workers) as pool:
                        list(pool.map(save, jobs, chunksize=16))
                except BrokenProcessPool:
                    raise ChildProcessError(
                        f"{root}: a process that draws died: if memory ran out, use fewer"
                    ) from None
            else:
                list(map(save, jobs))
            recipe = {**vars(self), "train_ids": train_ids, "distractors": distractors, "images": len(jobs)}
            (unfinished / MARKER).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
            _check_own(root)  # again: images may have been added meanwhile
            if root.exists():
                root.rename(old)
            unfinished.rename(root)
        except OSError as e:
            if e.filename or not e.strerror:
                raise
            raise OSError(f"{root} could not be written: {e.strerror}") from None
        finally:
            for leftover in (unfinished, old):
                shutil.rmtree(leftover, ignore_errors=True)
        return root

    def _jobs(self, train_ids: int, distractors: int) -> Iterator[tuple[int, int, int, str]]:
        """(pid, camid, k, file) of every image to write."""
        for i in range(len(self)):
            pid, camid, k = self._key(i)
            folder = (
                "bounding_box_train" if pid - self.first_id < train_ids else ("bounding_box_test" if k else "query")
            )
            yield pid, camid, k, market1501_file(folder, pid, camid, k)
        for i in range(distractors):
            camid = i % self.cameras
            yield (1 << 42) + i, camid, 0, f"bounding_box_test/0000_c{camid + 1}s1_{i:06d}_01.jpg"


def _check_own(root: Path) -> None:
    """Refuse a folder that is to be replaced and holds anything that its recipe does not write.

    What file managers and storage devices leave in the folders they show counts as nothing.

    Raises:
        FileExistsError: If it does, or the recipe is damaged.
    """
    if root.exists() and not root.is_dir():
        raise FileExistsError(f"{root} is a file; give a folder that is new, empty or was written by this method")
    paths = [path.relative_to(root) for path in root.rglob("*")]
    strays = {path.as_posix() for path in paths if OF_FILE_MANAGERS.isdisjoint(path.parts)}
    if MARKER in strays:
        try:
            recipe = json.loads(read_bytes(root / MARKER, MAX_MARKER_BYTES))
            train_ids, distractors, _ = (recipe.pop(key) for key in ("train_ids", "distractors", "images"))
            strays.difference_update(job[-1] for job in SyntheticPersons(**recipe)._jobs(train_ids, distractors))
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            raise FileExistsError(f"{root / MARKER} is damaged; give a new or an empty folder") from None
        strays -= {MARKER, *FOLDERS}
    if strays:
        raise FileExistsError(
            f"{root} holds {min(strays)}, which this command did not write; give a new or an empty folder"
        )


def _save(seed: int, size: tuple[int, int], place: str, root: Path, job: tuple[int, int, int, str]) -> None:
    pid, camid, k, file = job
    with buffered(root / file) as buffer:
        draw(seed, pid, camid, k, size, place).save(buffer, quality=92)


def contact_sheet(images: Sequence[Image.Image], columns: int = 8) -> Image.Image:
    """Paste images of one size, row by row, into one picture to look at."""
    if not images or columns < 1:
        raise ValueError(f"contact_sheet takes at least one image and one column, got {len(images)} and {columns}")
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + 2) - 2, rows * (height + 2) - 2), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (width + 2), i // columns * (height + 2)))
    return sheet
