"""Files of a public Google Drive: confirm page answered, interrupted transfers resumed, size checked.

Requests go through the session of huggingface_hub, so that proxies, certificates and ``HF_HUB_OFFLINE`` count here too.
"""

import html
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.utils import are_progress_bars_disabled
from tqdm import tqdm

__all__ = ["DriveError", "download_drive"]

_ENDPOINT = os.environ.get("PASSREID_DRIVE_ENDPOINT", "https://drive.usercontent.google.com")
TRIES = 5  # in a row without a new byte
TRIES_UNANSWERED = 2  # in a row if there was no answer at all: no network, no name service, a proxy that refuses
TIMEOUT = (10.0, 30.0, 30.0, 30.0)  # seconds to connect, without a byte, to send, to get a connection
REFUSALS = {
    401: "the file is not public",
    403: "Google Drive refuses the download: the file is not public, or was downloaded too often today",
    404: "there is no such file on Google Drive",
}


class DriveError(OSError):
    """Google Drive does not give the file; the message says why, in one sentence."""


class _InterruptedError(Exception):
    """A transfer that may succeed if tried again; ``answered`` if Drive answered at all."""

    def __init__(self, reason: str | Exception, answered: bool = True) -> None:
        if isinstance(reason, Exception):  # of the Hub client's HTTP library, which differs from version to version
            reason = " ".join(f"{type(reason).__name__}: {reason}".split()).removesuffix(":")
        super().__init__(reason)
        self.answered = answered


def download_drive(file_id: str, path: Path, wait: float = 1.0) -> None:
    """Download a file, with a progress bar on a terminal.

    Args:
        file_id: ID of ``https://drive.google.com/file/d/ID/view``.
        path: File to write; a beginning that is there already is completed.
        wait: Seconds before the first new try; doubled each time.

    Raises:
        DriveError: If there is no such file, it is not public, its download quota is used up, or the connection fails
            several times in a row.
        OSError: If ``path`` cannot be written.
    """
    params = {"id": file_id, "export": "download", "confirm": "t"}
    tries, reason, answered = 0, "", False
    disable = are_progress_bars_disabled() or None  # those of the Hub's client; None: off a terminal
    with tqdm(unit="B", unit_scale=True, desc="Google Drive", disable=disable) as bar:
        while tries < (TRIES if answered else TRIES_UNANSWERED):
            if tries:
                time.sleep(wait * 2 ** (tries - 1))
            start = _size(path)
            try:
                page = _transfer(params, path, bar)
            except _InterruptedError as e:
                answered = answered or e.answered
                reason, tries = str(e), 1 if _size(path) > start else tries + 1
                continue
            if page is None:
                return
            answered = True
            params, tries, reason = _confirmation(page), tries + 1, "it asks for a confirmation again and again"
    raise DriveError(f"the download from Google Drive failed: {reason}")


def _transfer(params: dict[str, str], path: Path, bar: Any) -> str | None:
    """Append what is missing of the file; return the page if Drive sends one instead."""
    start = _size(path)
    with _response(params, start) as response:
        status, headers = response.status_code, response.headers
        if status == 416 and headers.get("content-range") == f"bytes */{start}":
            return None  # the file was whole
        if status in (408, 416, 429) or status >= 500:
            if status == 416:
                path.unlink()
            raise _InterruptedError(f"status {status}")
        if status not in (200, 206):
            raise DriveError(REFUSALS.get(status, f"Google Drive answers with status {status}"))
        blocks = _blocks(response)
        if headers.get("content-type", "").startswith("text/html"):
            return b"".join(blocks).decode(errors="replace")
        start = start if status == 206 else 0  # 200: the whole file, whatever range was asked for
        length = headers.get("content-length")
        bar.total, bar.n = start + int(length) if length else None, start
        with path.open("ab" if start else "wb") as file:
            for block in blocks:
                file.write(block)
                bar.update(len(block))
    if length and _size(path) != start + int(length):
        raise _InterruptedError(f"{_size(path):,} of {start + int(length):,} bytes arrived")
    return None


@contextmanager
def _response(params: dict[str, str], start: int) -> Iterator[Any]:
    from huggingface_hub import get_session

    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    stream = get_session().stream("GET", f"{_ENDPOINT}/download", params=params, headers=headers, timeout=TIMEOUT)
    try:
        response = stream.__enter__()
    except Exception as e:
        raise _InterruptedError(e, answered=False) from None
    try:
        yield response
    finally:
        stream.__exit__(None, None, None)


def _blocks(response: Any) -> Iterator[bytes]:
    blocks = response.iter_bytes()  # as they arrive: blocks of a given size would lose what came of the last one
    while True:
        try:
            block = next(blocks, None)
        except Exception as e:
            raise _InterruptedError(e) from None
        if block is None:
            return
        yield block


def _confirmation(page: str) -> dict[str, str]:
    """Parameters of the form by which Drive asks whether to download a file that it has not scanned for viruses.

    Raises:
        DriveError: If the page is another one.
    """
    form = re.search(r'<form[^>]*id="download-form".*?</form>', page, re.DOTALL)
    if form:
        inputs = [dict(re.findall(r'(\w+)="([^"]*)"', tag)) for tag in re.findall(r"<input[^>]*>", form[0])]
        return {html.unescape(i["name"]): html.unescape(i.get("value", "")) for i in inputs if "name" in i}
    if re.search(r"quota exceeded|too many users have viewed or downloaded", page, re.IGNORECASE):
        raise DriveError("the download quota of the file on Google Drive is used up: try again in a day")
    title = re.search(r"<title>(.*?)</title>", page, re.DOTALL | re.IGNORECASE)
    name = f" ({' '.join(html.unescape(title[1]).split())})" if title else ""
    raise DriveError(f"Google Drive sends a page instead of the file{name}, which may not be public")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
