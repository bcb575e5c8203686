"""Images of pre-training, without labels: folders, lists of files, tar files, and the synthetic generator.

A source can be pickled and holds no open file, so that forked and spawned workers read the same images.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image

from passreid_models.data.images import ImageError, check_bytes, count, open_image, reason
from passreid_models.data.listing import Listing, Names, list_images
from passreid_models.runtime import cache_dir, not_found

__all__ = ["FileSource", "ListSource", "Source", "SyntheticSource", "TarSource", "open_source"]

LISTS = (".txt", ".lst")
MAX_PATH_BYTES = 2**16
EXPECTED = f"a folder of images, a list of paths ({' or '.join(LISTS)}), a .tar file, or synthetic:ids=1000"


class Source(Protocol):
    """Images by index, without labels."""

    description: str
    """One line for the provenance, without the folders above."""

    fingerprint: str
    """Hash of the list of images; the same on every machine."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Name of the image in messages, such as its path."""

    def load(self, index: int) -> Image.Image:
        """Load an image in RGB, decoded and upright.

        Raises:
            ImageError: If it cannot be read; the message gives its name and the reason.
        """


def open_source(data: str | Path, cache: Path | None = None) -> Source:
    """Open the images of ``data``.

        open_source("crops/")                images below a folder
        open_source("lup.txt")               one path per line, absolute or below the list's folder; # begins a comment
        open_source("lup.tar")               images in a tar file
        open_source("shards/")               a folder of tar files, if it has no images
        open_source("synthetic:ids=1000")    drawn on the fly; also images=, cameras=, seed=,
                                             size=HEIGHTxWIDTH, place=studio

    Args:
        data: A folder, a list, a tar file or ``synthetic:``.
        cache: Folder that keeps the listing of a folder or tar file; by default the package's cache.

    Raises:
        FileNotFoundError: If ``data`` does not exist, or has no image.
        ValueError: If ``data`` is of an unknown kind, or damaged.
    """
    if not str(data):
        raise ValueError(f"data: no images are named; expected {EXPECTED}")
    if str(data).startswith("synthetic:"):
        return SyntheticSource(str(data))
    path = Path(os.path.abspath(data))
    if not os.path.exists(path):
        raise not_found(data, EXPECTED)
    if path.suffix.lower() in LISTS and path.is_file():
        return ListSource(path)
    if not path.is_dir() and path.suffix.lower() != ".tar":
        raise ValueError(f"{data}: images cannot come from this kind of file; expected {EXPECTED}")
    listing = list_images(path, cache or cache_dir())
    return TarSource(path, listing) if listing.tars else FileSource(path, listing.names)


class FileSource:
    """Image files below a folder."""

    def __init__(self, root: Path, names: Names) -> None:
        """
        Args:
            root: Folder that the names are relative to.
            names: Paths of the images.
        """
        self.root, self.names = str(root), names
        self.description = f"{root.name}/: {count(len(names), 'image')}"
        self.fingerprint = names.fingerprint()

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])

    def load(self, index: int) -> Image.Image:
        name = self.name(index)
        try:
            return open_image(self._file(index))
        except Exception as e:  # Pillow's decoders raise OSError, SyntaxError, struct.error ...
            raise ImageError(f"{name}: {reason(e)}") from e

    def shared(self, paths: Sequence[str | Path]) -> int:
        """Number of the images that are among these files, by their paths; links are followed."""
        named, real = [os.path.abspath(path) for path in paths], [os.path.realpath(path) for path in paths]
        wanted: set[str] = set()
        for root, files in ((self.root, named), (os.path.realpath(self.root), real)):
            for file in files:
                name = os.path.relpath(file, root)
                wanted |= {file, name, f"./{name}"}
        return self.names.count(set(map(os.fsencode, wanted)))

    def _file(self, index: int) -> str | bytes:
        return self.name(index)


class ListSource(FileSource):
    """Image files listed in a text file; a missing one is an error when it is read."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: The list: one path per line, absolute or relative to the list's folder.

        Raises:
            FileNotFoundError: If the list is empty.
            ValueError: If the list is not text.
        """
        names = Names()
        with path.open("rb") as file:
            while line := file.readline(MAX_PATH_BYTES):
                if len(line) == MAX_PATH_BYTES:
                    raise ValueError(f"{path}: a line of {MAX_PATH_BYTES:,} bytes or more; expected one path per line")
                if b"\0" in line:
                    raise ValueError(f"{path}: a list of images is text in UTF-8, this is UTF-16 or no text")
                line = line.removeprefix(b"\xef\xbb\xbf").strip()  # Windows marks UTF-8 at the beginning
                if line and not line.startswith(b"#"):
                    names.append(line)
        if not names:
            raise FileNotFoundError(
                f"{path}: the list is empty; expected one image path per line, absolute or relative to {path.parent}"
            )
        super().__init__(path.parent, names)
        self.description = f"{path.name}: {count(len(names), 'image')}"


class TarSource(FileSource):
    """Images in tar files, read in place."""

    def __init__(self, root: Path, listing: Listing) -> None:
        """
        Args:
            root: The tar file, or the folder of several.
            listing: Listing of ``root``.
        """
        super().__init__(root, listing.names)
        self.tars, self.members = listing.tars, listing.members
        self.description = f"{root.name}{'/*.tar' if root.is_dir() else ''}: {count(len(self.names), 'image')}"

    def _file(self, index: int) -> bytes:
        tar, start, size = self.members[3 * index : 3 * index + 3]
        if size < 0:
            raise ValueError("a link that leads to no file in the tar (tar -h stores files instead of links)")
        with open(self.tars[tar], "rb", buffering=0) as file:  # for each image: workers must not share its position
            file.seek(start)
            return file.read(check_bytes(size))


class SyntheticSource:
    """Persons of the synthetic generator, drawn when they are loaded."""

    def __init__(self, text: str) -> None:
        """
        Args:
            text: ``synthetic:`` and any of ``ids=``, ``images=`` (of each), ``cameras=``, ``seed=``, ``size=`` as
                height x width, and ``place=``, with commas between.

        Raises:
            ValueError: If a key is unknown or given twice, or a value is invalid.
        """
        from passreid_models.synthetic.recipe import read_recipe

        recipe = read_recipe(text)
        self.recipe, self.persons = recipe.text, recipe.persons
        self.description = f"{self.recipe}: {count(len(self.persons), 'image')}"
        self.fingerprint = Names([self.recipe.encode()]).fingerprint()

    def __len__(self) -> int:
        return len(self.persons)

    def name(self, index: int) -> str:
        return f"image {index} of {self.recipe}"

    def load(self, index: int) -> Image.Image:
        return self.persons[index][0]
