"""Files of the Hugging Face Hub, verified, in the cache of its client.

The client asks for the metadata; the transfer is that of ``download.py``. The client itself takes the ETag for a file
name wherever that leads, compares only sizes, begins again after a reset connection and waits as long as a server asks.
"""

import hashlib
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers

from passreid_models.checkpoints.download import (
    MAX_BYTES,
    InterruptedTransferError,
    WeightsUnavailableError,
    download,
    is_transient,
    page_title,
    retry,
    short_error,
    stated_wait,
)
from passreid_models.checkpoints.read import CheckpointError
from passreid_models.runtime import atomic_file, lock, sha256

__all__ = ["check_cached", "download_hub"]

_COMMIT, _SHA256 = "[0-9a-f]{40}", "[0-9a-f]{64}"


def download_hub(hub_id: str, filename: str = "model.safetensors", cache: str | Path | None = None) -> Path:
    """Download a file of a Hub repository, ``org/name`` or ``org/name@revision``, and check it against its ETag.

    The ETag of weights is their SHA-256; that of a small text such as ``config.json`` is the SHA-1 of a git blob. A
    file in the cache is checked too, and serves if the Hub does not answer.

    Raises:
        ValueError: If ``hub_id`` is not a repository with at most one revision, or ``filename`` no relative path.
        WeightsUnavailableError: If the repository or the file is not available.
        CheckpointError: If the file is damaged after a second download too.
    """
    repo_id, revision = _split(hub_id)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", str(filename)):  # config.json can name it
        raise ValueError(f"{hub_id}: expected the name of a file in the repository, got {str(filename)[:80]!r}")
    where = f"{filename} of {hub_id} on the Hub"
    cached = _cached(hub_id, filename, cache)
    if cached and re.fullmatch(_COMMIT, revision) and is_intact(cached):
        return cached
    url = hf_hub_url(repo_id, filename, revision=revision)
    try:
        file = retry(lambda: _metadata(url, where), where, once=cached is not None)
    except WeightsUnavailableError as e:
        if cached is None or isinstance(e.__cause__, EntryNotFoundError | RevisionNotFoundError):
            raise
        if not is_intact(cached):
            raise CheckpointError(f"{cached} is damaged, and cannot be downloaded again: {e}") from None
        return cached
    etag, commit = _check_metadata(file, where, weights=not filename.endswith(".json"))

    storage = Path(cache or constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
    blob, pointer = storage / "blobs" / etag, storage / "snapshots" / commit / filename
    if not (pointer.is_file() and _digest(pointer, etag) == etag):
        with lock(storage.parent / ".locks" / storage.name / etag):
            if not (blob.is_file() and _digest(blob, etag) == etag):
                _fetch(hf_hub_url(repo_id, filename, revision=commit), blob, file.size, where, build_hf_headers())
            _link(blob, pointer)
    ref = storage / "refs" / revision
    if revision != commit and not (ref.is_file() and ref.read_text(encoding="utf-8") == commit):
        with suppress(OSError), atomic_file(ref) as new:  # the cache may be read-only
            new.write_text(commit, encoding="utf-8")
    return pointer


def check_cached(hub_id: str, filename: str, cache: str | Path | None = None) -> Path | None:
    """Check a file that another client put in the cache, and return it if it is there; a damaged one is removed.

    Raises:
        CheckpointError: If its hash is not the one that the Hub stated.
    """
    cached = _cached(hub_id, filename, cache)
    if cached and not is_intact(cached):
        cached.resolve().unlink()
        raise CheckpointError(f"{filename} of {hub_id} was damaged on its way from the Hub, and is removed: load again")
    return cached


def is_intact(path: Path) -> bool:
    """Whether a file in the cache has the hash by which its blob is named; True for a copy, which has another name."""
    name = path.resolve().name
    return not re.fullmatch(f"{_COMMIT}|{_SHA256}", name) or _digest(path, name) == name


def _split(hub_id: str) -> tuple[str, str]:
    """Repository and revision."""
    parts = re.fullmatch(r"((?:[\w.-]+/)?[\w.-]+)(?:@([^@\s/\\][^@\s\\]*))?", hub_id)
    if not parts or ".." in hub_id:
        raise ValueError(f"expected a repository of the Hub, ORG/NAME or ORG/NAME@REVISION, got {hub_id!r}")
    return parts[1], parts[2] or "main"


def _cached(hub_id: str, filename: str, cache: str | Path | None) -> Path | None:
    repo_id, revision = _split(hub_id)
    path = try_to_load_from_cache(repo_id, filename, cache, revision)
    return Path(path) if isinstance(path, str) else None


def _metadata(url: str, where: str) -> Any:
    """Size, ETag and commit of a file, from the Hub's client."""
    try:
        return get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except OfflineModeIsEnabled:
        raise WeightsUnavailableError(f"{where}: HF_HUB_OFFLINE is set and it is not in the cache") from None
    except HfHubHTTPError as e:
        if is_transient(e.response.status_code):
            raise InterruptedTransferError(short_error(e), wait=stated_wait(e.response.headers)) from None
        raise WeightsUnavailableError(f"{where}: {short_error(e)}") from e
    except Exception as e:  # its kind depends on the client's HTTP library
        raise InterruptedTransferError(e, answered=False) from None


def _check_metadata(file: Any, where: str, weights: bool) -> tuple[str, str]:
    """ETag and commit, which become names of files.

    Raises:
        WeightsUnavailableError: If they are not hashes, or the size is missing or too large.
    """
    if not re.fullmatch(_COMMIT, file.commit_hash or ""):
        raise WeightsUnavailableError(f"{where}: the server names no commit, and may be no Hub")
    if not re.fullmatch(_SHA256 if weights else f"{_COMMIT}|{_SHA256}", file.etag or ""):
        expected = "a SHA-256" if weights else "a hash"
        raise WeightsUnavailableError(f"{where}: its ETag is refused: expected {expected}, got {str(file.etag)[:80]!r}")
    if not isinstance(file.size, int) or not 0 <= file.size <= (MAX_BYTES if weights else 2**24):
        raise WeightsUnavailableError(f"{where}: a size of {file.size} bytes is refused")
    return file.etag, file.commit_hash


def _fetch(url: str, blob: Path, size: int, where: str, headers: dict[str, str]) -> None:
    """Write a blob of the cache, whole and verified or not at all."""
    with atomic_file(blob) as new:
        for _ in range(2):
            new.unlink(missing_ok=True)
            page = download(url, new, where, headers=headers, size=size)
            if page is not None:
                raise WeightsUnavailableError(f"{where}: a page comes instead of the file{page_title(page)}")
            if _digest(new, blob.name) == blob.name:
                return
        raise CheckpointError(f"{where} arrives damaged: its hash is not the one that the Hub states")


def _digest(path: Path, expected: str) -> str:
    """Hash of a file of the same kind as ``expected``: SHA-256, or SHA-1 of a git blob."""
    if len(expected) == 64:
        return sha256(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _link(blob: Path, pointer: Path) -> None:
    pointer.parent.mkdir(parents=True, exist_ok=True)
    pointer.unlink(missing_ok=True)
    try:
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    except OSError:  # a system without links
        with atomic_file(pointer) as new:
            shutil.copyfile(blob, new)
