"""3-D persons on disk in the Market-1501 layout: drawn in parallel, resumable, independent of the number of processes.

ROOT/synthetic3d.json                                     the recipe, and whether all images are written
ROOT/bounding_box_train|query|bounding_box_test/*.jpg     complete images; incomplete files are hidden (.NAME.*)
"""

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any

from filelock import Timeout
from PIL import Image
from tqdm import tqdm

from passreid_models.data.layouts import MARKER_3D, MAX_LIST_BYTES
from passreid_models.runtime import atomic_buffer, check_workers, lock, num_cores, read_bytes, write_json
from passreid_models.synthetic.attributes import stream
from passreid_models.synthetic.dataset import FOLDERS, OF_FILE_MANAGERS, at_least, market1501_file
from passreid_synth3d.fabrics import PATTERN_FAMILIES
from passreid_synth3d.place import PLACES
from passreid_synth3d.workers import one_thread, run_here, run_in_processes

__all__ = ["GENERATOR", "make_data", "write_market1501"]

SITE = 24  # the random stream
GENERATOR = 2  # raise it when a recipe gives other images: folders of an older generator are not continued
TRAIN, QUERY, GALLERY = FOLDERS
LEFTOVER = re.compile(r"\.(synthetic3d\.json|\d+_c\ds\d+_\d+_01\.jpg)\.\w+")  # atomic_file's, after a kill

Draw = Callable[..., Image.Image]


@dataclass
class _Recipe:
    """Arguments that determine the images, together with the versions of the libraries."""

    num_ids: int
    images_per_id: int
    cameras: int
    sites: int
    seed: int
    size: tuple[int, int]
    train_ids: int
    patterns: str
    place: str
    first_id: int
    quality: int
    generator: int = GENERATOR

    def __post_init__(self) -> None:
        for name in ("num_ids", "images_per_id", "cameras", "sites", "quality"):
            setattr(self, name, _integer(name, getattr(self, name), 1))
        for name in ("seed", "train_ids", "first_id"):
            setattr(self, name, _integer(name, getattr(self, name), 0))
        if not isinstance(self.size, Sequence) or len(self.size) != 2 or min(self.size) < 16:
            raise ValueError(f"size must be (height, width) of at least 16 pixels each, got {self.size!r}")
        self.size = (_integer("size", self.size[0], 16), _integer("size", self.size[1], 16))
        if self.patterns not in PATTERN_FAMILIES:
            raise ValueError(f"patterns must be one of {', '.join(PATTERN_FAMILIES)}, got {self.patterns!r}")
        if self.place not in PLACES:
            raise ValueError(f"place must be one of {', '.join(PLACES)}, got {self.place!r}")
        if self.quality > 100:
            raise ValueError(f"quality must be between 1 and 100, got {self.quality}")
        if self.train_ids > self.num_ids:
            raise ValueError(f"train_ids must be between 0 and num_ids = {self.num_ids}, got {self.train_ids}")
        minimum = self.cameras + (2 if self.train_ids < self.num_ids else 0)
        if not 2 <= self.cameras <= 9 or self.images_per_id < minimum:
            raise ValueError(
                "the Market-1501 layout takes 2 to 9 cameras and images_per_id of at least cameras + 2 (queries and a"
                " gallery of two cameras), or of at least cameras where all identities train, got"
                f" cameras={self.cameras} and images_per_id={self.images_per_id}"
            )

    @property
    def pids(self) -> range:
        return range(self.first_id, self.first_id + self.num_ids)

    def images(self, pid: int) -> Iterator[tuple[int, int, str]]:
        """Yield (camid in the world, k, file) of each image of an identity; each of its cameras is of a random site."""
        for i in range(self.images_per_id):
            k, camid = divmod(i, self.cameras)
            site = int(stream(self.seed, SITE, pid, camid).integers(self.sites))
            folder = TRAIN if pid - self.first_id < self.train_ids else GALLERY if k else QUERY
            yield site * self.cameras + camid, k, market1501_file(folder, pid, camid, k, site)

    def files(self) -> set[str]:
        return {file for pid in self.pids for _, _, file in self.images(pid)}

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "size": list(self.size)}


def write_market1501(
    root: str | PathLike[str], num_ids: int, images_per_id: int, *, cameras: int = 8, sites: int = 1, seed: int = 0,
    size: tuple[int, int] = (256, 128), train_ids: int | None = None, patterns: str = "train", place: str = "street",
    first_id: int = 0, workers: int | None = None, quality: int = 92, progress: bool = True, draw: Draw | None = None,
) -> Path:  # fmt: skip
    """Write 3-D persons as JPEG files in the layout of Market-1501, and return the folder.

    Names are `PPPP_cCsS_FFFFFF_NN.jpg`, with PPPP the pid + 1, C the camid + 1 and S the site. Each test identity has
    one query image per camera, its other images are the gallery; folders that would be empty are not made. Repeating
    the call in the same folder draws the images that are missing, after an interruption or a deletion.

    Args:
        root: A folder that is new, empty, or was begun with the same arguments.
        num_ids: Number of identities; their pids are `first_id` to `first_id + num_ids - 1`.
        images_per_id: Images of each identity, assigned to the cameras in turn.
        cameras: Number of cameras that see each identity, 2 to 9.
        sites: Number of groups of `cameras` cameras each. The c-th camera of an identity is the c-th of a random site,
            drawn for each c, so that a place says nothing about the identity. Images of one camid and different sites
            are of different cameras; readers of the layout cannot tell.
        seed: Seed of the world: the same pid or camid with another seed is another person or place.
        size: (height, width) of the images in pixels.
        train_ids: Number of identities, the first ones, for training; the others test. Default: half.
        patterns: Families of garment patterns and prints: `train`, or `held-out`, which shares none of them. Plain
            cloth, denim and side stripes are in both.
        place: `street` (streets, squares, parks, halls and garages) or `studio` (gray surroundings and one exposure for
            all cameras, whose viewpoints differ).
        first_id: The first pid, for identities that no other folder of the same seed holds.
        workers: Number of processes, by default one per core, 1.2 GB each; 0 draws in this process. The images are the
            same. With workers, a script must make the call under ``if __name__ == "__main__":``.
        quality: JPEG quality.
        progress: Show a progress bar if stderr is a terminal.
        draw: Private, for tests: replaces `picture.draw`; with workers, a function of a module.

    Raises:
        ValueError: If some queries would have no match in another camera, an argument is out of range, anny is not
            installed, or another process draws in the folder.
        FileExistsError: If the folder holds other files or images of another recipe; the message names them.
        ChildProcessError: If a worker process died; the images it wrote stay.
    """
    train_ids = _integer("num_ids", num_ids, 1) // 2 if train_ids is None else train_ids
    recipe = _Recipe(num_ids, images_per_id, cameras, sites, seed, size, train_ids, patterns, place, first_id, quality)
    workers = num_cores() if workers is None else check_workers(_integer("workers", workers, 0))
    root, files = Path(root), recipe.files()
    if _present(root, recipe, files) == files and _marker(root)["complete"]:
        return root
    draw = draw or _find_draw()
    try:
        acquired = lock(root / "synth").acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{root}: another process draws in it") from None
    with acquired:
        _sweep(root)
        present = _present(root, recipe, files)  # again, under the lock
        _check_libraries(root)
        _mark(root, recipe, complete=False)
        for folder in {file.partition("/")[0] for file in files}:
            (root / folder).mkdir(exist_ok=True)
        jobs = [pid for pid in recipe.pids if any(file not in present for _, _, file in recipe.images(pid))]
        draw_person = partial(_draw_person, draw, recipe, root)
        bar = tqdm(total=len(files), initial=len(present), unit="img", disable=None if progress else True)
        try:
            with bar:
                run = partial(run_in_processes, workers=workers) if workers else run_here
                run(draw_person, jobs, done=bar.update)
        finally:
            _sweep(root)
        _mark(root, recipe, complete=True)
    return root


def make_data(root: str | PathLike[str], num_ids: int, images_per_id: int, **options: Any) -> str:
    """Call `write_market1501` and describe the result.

    Args:
        root: The folder.
        num_ids: Number of identities.
        images_per_id: Images of each identity.
        **options: Options of `write_market1501`.

    Returns:
        A sentence with the folder's number of images, persons and cameras, and the speed of drawing.
    """
    before, start = _count(Path(root)), time.monotonic()
    count = _count(write_market1501(root, num_ids, images_per_id, **options))
    new = count - before
    speed = f"{new / max(time.monotonic() - start, 1e-9):.1f} images/s" if new else "all were there"
    present = f", {before:,} were there" if new and before else ""
    marker = _marker(Path(root))
    cameras = f"{marker['cameras']} cameras" + (f" at each of {marker['sites']} sites" if marker["sites"] > 1 else "")
    return f"{count:,} images of {num_ids:,} 3-D persons under {cameras} -> {root} ({speed}{present})"


def _draw_person(draw: Draw, recipe: _Recipe, root: Path, pid: int) -> int:
    """Draw the missing images of an identity, in one process since the body is computed once; return their number."""
    missing = [(camid, k, root / file) for camid, k, file in recipe.images(pid) if not (root / file).exists()]
    for camid, k, path in missing:
        image = draw(recipe.seed, pid, camid, k, recipe.size, recipe.patterns, recipe.place)
        with atomic_buffer(path) as buffer:
            image.save(buffer, quality=recipe.quality)
    return len(missing)


def _find_draw() -> Draw:
    """Import the renderer; build anny's model and warp's kernels here, once, instead of in every worker process.

    Raises:
        ValueError: If anny or warp is not installed.
    """
    try:
        from anny.paths import get_anny_cache_path

        from passreid_synth3d.body import body
        from passreid_synth3d.picture import draw
    except ModuleNotFoundError as e:
        if e.name is None or e.name.startswith("passreid_models"):
            raise
        raise ValueError(
            f'3-D persons need {e.name.partition(".")[0]}: pip install ".[synth3d]" in a clone of passreid-models'
        ) from None
    if not any(path.is_file() for path in get_anny_cache_path().rglob("*")):
        print("building anny's body model, once on this machine: two to three minutes", file=sys.stderr, flush=True)
    with one_thread():
        body()
        draw(0, 0, 0, 0)
    return draw


# ---- The folder


def _present(root: Path, recipe: _Recipe, files: set[str]) -> set[str]:
    """Return the images of the recipe that are written already.

    Raises:
        FileExistsError: If the folder holds other files or persons of another recipe.
    """
    if root.exists() and not root.is_dir():
        raise FileExistsError(f"{root} is a file; give a folder that is new, empty or was begun by this command")
    begun = (root / MARKER_3D).is_file()
    if begun:
        marker, request = _marker(root), recipe.to_dict()
        if keys := [key for key in request if marker.get(key) != request[key]]:
            raise FileExistsError(
                f"{root} was begun with {_format(marker, keys)}, and now {_format(request, keys)} is asked for; give"
                " the same again, or a new or an empty folder"
            )
    names = {path.relative_to(root).as_posix() for folder in ("", *FOLDERS) for path in (root / folder).glob("*")}
    expected = {MARKER_3D, *FOLDERS, *files} if begun else set()
    ours = {".synth.lock", *OF_FILE_MANAGERS}
    strays = [
        n for n in names - expected if (last := n.rpartition("/")[2]) not in ours and not LEFTOVER.fullmatch(last)
    ]
    if strays:
        raise FileExistsError(
            f"{root} holds {min(strays)}, which this command did not write; give a new or an empty folder"
        )
    return names & files


def _marker(root: Path) -> dict[str, Any]:
    """Read the marker.

    Raises:
        FileExistsError: If it is damaged.
    """
    try:
        marker = {"complete": False, "libraries": None, **json.loads(read_bytes(root / MARKER_3D, MAX_LIST_BYTES))}
        return {**marker, "libraries": marker["libraries"] and dict(marker["libraries"])}
    except (ValueError, TypeError, RecursionError):
        raise FileExistsError(f"{root / MARKER_3D} is damaged; give a new or an empty folder") from None


def _mark(root: Path, recipe: _Recipe, complete: bool) -> None:
    write_json(root / MARKER_3D, {**recipe.to_dict(), "libraries": _libraries(), "complete": complete})


def _libraries() -> dict[str, str | None]:
    """Versions of the libraries that the images depend on."""
    versions: dict[str, str | None] = {}
    for name in ("anny", "warp-lang"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def _check_libraries(root: Path) -> None:
    """Refuse to mix images of different versions of the libraries.

    Raises:
        FileExistsError: If the folder was begun with other versions.
    """
    recorded = _marker(root).get("libraries") if (root / MARKER_3D).is_file() else None
    installed = _libraries()
    if recorded is not None and recorded != installed:
        names = list(installed)
        raise FileExistsError(
            f"{root} was begun with {_format(recorded, names)}, and {_format(installed, names)} would draw other bodies"
            " of the same persons: install the former, or give a new folder"
        )


def _sweep(root: Path) -> None:
    """Remove temporary folders that a kill left."""
    for folder in ("", *FOLDERS):
        for path in (root / folder).glob(".*"):
            if LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)


def _format(values: dict[str, Any], keys: list[str]) -> str:
    selected = {key: values.get(key, "nothing") for key in keys}
    return ", ".join(f"{k}={'x'.join(map(str, v)) if isinstance(v, list) else v}" for k, v in selected.items())


def _count(root: Path) -> int:
    return sum(1 for folder in FOLDERS for _ in (root / folder).glob("*.jpg"))


def _integer(name: str, value: Any, lowest: int) -> int:
    at_least(lowest, **{name: value})
    return int(value)
