"""Downloads: interrupted transfers resumed, slow ones given up, sizes checked, new tries and waits limited.

Requests go through the session of huggingface_hub, so that proxies, certificates and ``HF_HUB_OFFLINE`` count here too.
"""

import html
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import get_session
from huggingface_hub.utils import are_progress_bars_disabled
from tqdm import tqdm

__all__ = ["WeightsUnavailableError", "download"]

T = TypeVar("T")
TRIES = 5  # in a row without a new byte
TRIES_UNANSWERED = 2  # in a row if there was no answer at all: no network, no name service, a proxy that refuses
MOST_TRIES = 100  # of a server that sends a few bytes each time
TIMEOUT = float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT") or 0) or 30.0  # seconds at less than LEAST_RATE
LEAST_RATE = 1_000  # bytes a second
MAX_WAIT = 60  # seconds that a server may ask to wait
MAX_BYTES = 2**34  # of a file whose size is not known
MAX_PAGE_BYTES = 2**16  # of a page that is searched


class WeightsUnavailableError(FileNotFoundError):
    """Known weights that are not available; the message says what to do."""


class InterruptedTransferError(Exception):
    """A request that may succeed if tried again.

    Args:
        reason: Reason, or the exception of the HTTP library, which differs from version to version.
        answered: Whether the server answered at all.
        wait: Seconds to wait, if the server states them.
    """

    def __init__(self, reason: str | Exception, answered: bool = True, wait: float | None = None) -> None:
        if isinstance(reason, Exception):
            reason = " ".join(f"{type(reason).__name__}: {reason}".split()).removesuffix(":")
        super().__init__(reason)
        self.answered, self.wait = answered, wait


def download(
    url: str,
    path: Path,
    what: str,
    *,
    params: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
    size: int | None = None,
    refusals: Mapping[int, str] | None = None,
    wait: float = 1.0,
) -> str | None:
    """Download a file, with a progress bar on a terminal.

    Args:
        url: Address, to which redirects may belong; credentials go to its host alone.
        path: File to write; a beginning that is there already is completed.
        what: Beginning of error messages.
        params: Query of the address.
        headers: Further headers.
        size: Size of the file in bytes, if known.
        refusals: Explanations of statuses.
        wait: Seconds before the first new try; doubled each time.

    Returns:
        The HTML page that was sent instead of the file, its beginning if it is long; None if the file was.

    Raises:
        WeightsUnavailableError: If the server refuses, sends too much, or fails several times in a row.
        OSError: If ``path`` cannot be written.
    """
    disable = are_progress_bars_disabled() or None  # those of the Hub's client; None: off a terminal
    with tqdm(unit="B", unit_scale=True, desc=path.name[:40], disable=disable) as bar:

        def transfer() -> str | None:
            return _transfer(url, path, what, params or {}, headers or {}, size, refusals or {}, bar)

        return retry(transfer, what, wait, lambda: _size(path))


def retry(
    attempt: Callable[[], T], what: str, wait: float = 1.0, progress: Callable[[], int] = int, once: bool = False
) -> T:
    """Call ``attempt`` until it is not interrupted, and return its result.

    Args:
        attempt: A request; ``InterruptedTransferError`` asks for another.
        what: Beginning of the error message.
        wait: Seconds before the first new try; doubled each time.
        progress: Number that grows if an interrupted attempt achieved something.
        once: Make no new try.

    Raises:
        WeightsUnavailableError: After several failures in a row, or if the server asks for a long wait.
    """
    failures, reason, answered = 0, "", False
    for _ in range(1 if once else MOST_TRIES):
        before = progress()
        try:
            return attempt()
        except InterruptedTransferError as e:
            answered, reason = answered or e.answered, str(e)
            failures = 1 if progress() > before else failures + 1
            pause = wait * 2 ** (failures - 1) if e.wait is None else e.wait
        if pause > MAX_WAIT:
            raise WeightsUnavailableError(f"{what}: {reason}, and it asks to wait {pause:,.0f} seconds")
        if failures >= (TRIES if answered else TRIES_UNANSWERED):
            break
        if not once:
            time.sleep(pause)
    raise WeightsUnavailableError(f"{what}: {reason}")


def is_transient(status: int) -> bool:
    """Whether a request with this status may succeed later."""
    return status in (408, 429) or status >= 500


def stated_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds of a ``Retry-After`` header; None without one, or with a date."""
    value = headers.get("retry-after", "")
    return float(value) if re.fullmatch(r"\d{1,9}", value) else None


def _transfer(
    url: str,
    path: Path,
    what: str,
    params: Mapping[str, str],
    headers: Mapping[str, str],
    size: int | None,
    refusals: Mapping[int, str],
    bar: Any,
) -> str | None:
    """Append what is missing of the file; return the page if one comes instead."""
    start = _size(path)
    asked = {**headers, "Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with _response(url, params, asked) as response:
        status, sent = response.status_code, response.headers
        if status == 416 and sent.get("content-range") == f"bytes */{start}" and size in (None, start):
            return None  # the file was whole
        part = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", sent.get("content-range", "")) if status == 206 else None
        is_other = bool(bar.total and part and part[2] not in ("*", str(bar.total)))
        if status == 416 or (status == 206 and (not part or int(part[1]) != start or is_other)):
            path.unlink(missing_ok=True)
            bar.total = None
            raise InterruptedTransferError(f"status {status}, and not the part of the file that was asked for")
        if is_transient(status):
            raise InterruptedTransferError(f"status {status}", wait=stated_wait(sent))
        if status not in (200, 206):
            raise WeightsUnavailableError(f"{what}: {refusals.get(status, f'status {status}')}")
        blocks = _blocks(response)
        if sent.get("content-type", "").startswith("text/html"):
            return _beginning(blocks).decode(errors="replace")
        start = start if status == 206 else 0  # 200: the whole file, whatever range was asked for
        length = sent.get("content-length", "")
        total = size if size is not None else start + int(length) if re.fullmatch(r"\d{1,18}", length) else None
        limit = MAX_BYTES if total is None else total
        if limit > MAX_BYTES:
            raise WeightsUnavailableError(f"{what}: {limit:,} bytes are announced, and {MAX_BYTES:,} accepted at most")
        bar.total, bar.n = total, start
        with path.open("ab" if start else "wb") as file:
            for block in blocks:
                if file.tell() + len(block) > limit:
                    raise WeightsUnavailableError(f"{what}: more than {limit:,} bytes are sent")
                file.write(block)
                bar.update(len(block))
    if total is not None and _size(path) != total:
        raise InterruptedTransferError(f"{_size(path):,} of {total:,} bytes arrived")
    return None


@contextmanager
def _response(url: str, params: Mapping[str, str], headers: Mapping[str, str]) -> Iterator[Any]:
    timeout = (min(10.0, TIMEOUT), TIMEOUT, TIMEOUT, TIMEOUT)  # to connect, without a byte, to send, for a connection
    stream: Any = get_session().stream("GET", url, params=dict(params) or None, headers=dict(headers), timeout=timeout)
    try:
        response = stream.__enter__()
    except Exception as e:
        raise InterruptedTransferError(e, answered=False) from None
    try:
        yield response
    finally:
        stream.__exit__(None, None, None)


def _blocks(response: Any) -> Iterator[bytes]:
    blocks = response.iter_bytes()  # as they arrive: blocks of a given size would lose what came of the last one
    since, received = time.monotonic(), 0
    while True:
        try:
            block = next(blocks, None)
        except Exception as e:
            raise InterruptedTransferError(e) from None
        if block is None:
            return
        yield block
        received += len(block)
        if (now := time.monotonic()) - since > TIMEOUT:
            if received < LEAST_RATE * TIMEOUT:
                raise InterruptedTransferError(f"fewer than {LEAST_RATE:,} bytes a second arrive")
            since, received = now, 0


def _beginning(blocks: Iterator[bytes]) -> bytes:
    page = b""
    for block in blocks:
        page += block
        if len(page) > MAX_PAGE_BYTES:
            break
    return page[:MAX_PAGE_BYTES]


def page_title(page: str) -> str:
    """Title of an HTML page in parentheses, after a space; empty without one."""
    title = re.search(r"<title>([^<]*)</title>", page, re.IGNORECASE)
    return f" ({' '.join(html.unescape(title[1]).split())[:80]})" if title else ""


def short_error(error: Exception) -> str:
    """Exception of a network client in one line; those of the Hub's client begin with a line of the status alone."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    status = re.match(r"\d{3} (Client|Server) Error", lines[0])
    return f"{status[0]}: {lines[1]}" if status and len(lines) > 1 else lines[0]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
