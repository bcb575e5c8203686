"""Files of a public Google Drive, with its confirm page answered."""

import html
import os
import re
from pathlib import Path

from passreid_models.checkpoints.download import WeightsUnavailableError, download, page_title

__all__ = ["download_drive"]

_ENDPOINT = os.environ.get("PASSREID_DRIVE_ENDPOINT", "https://drive.usercontent.google.com")
FAILED = "the download from Google Drive failed"
REFUSALS = {
    401: "the file is not public",
    403: "Google Drive refuses the download: the file is not public, or was downloaded too often today",
    404: "there is no such file on Google Drive",
}


def download_drive(file_id: str, path: Path, wait: float = 1.0) -> None:
    """Download a file.

    Args:
        file_id: ID of ``https://drive.google.com/file/d/ID/view``.
        path: File to write; a beginning that is there already is completed.
        wait: Seconds before the first new try; doubled each time.

    Raises:
        WeightsUnavailableError: If there is no such file, it is not public, its download quota is used up, or the
            connection fails several times in a row.
        OSError: If ``path`` cannot be written.
    """
    params = {"id": file_id, "export": "download", "confirm": "t"}
    for _ in range(3):
        page = download(f"{_ENDPOINT}/download", path, FAILED, params=params, refusals=REFUSALS, wait=wait)
        if page is None:
            return
        params = _confirmation(page)
    raise WeightsUnavailableError(f"{FAILED}: it asks for a confirmation again and again")


def _confirmation(page: str) -> dict[str, str]:
    """Parameters of the form by which Drive asks whether to download a file that it has not scanned for viruses.

    Raises:
        WeightsUnavailableError: If the page is another one.
    """
    form = re.search(r'<form[^<>]*id="download-form".*?</form>', page, re.DOTALL)
    if form:
        inputs = [dict(re.findall(r'(\w+)="([^"]*)"', tag)) for tag in re.findall(r"<input[^<>]*>", form[0])]
        return {html.unescape(i["name"]): html.unescape(i.get("value", "")) for i in inputs if "name" in i}
    if re.search(r"quota exceeded|too many users have viewed or downloaded", page, re.IGNORECASE):
        raise WeightsUnavailableError(
            f"{FAILED}: the download quota of the file on Google Drive is used up: try again in a day"
        )
    raise WeightsUnavailableError(
        f"{FAILED}: Google Drive sends a page instead of the file{page_title(page)}, which may not be public"
    )
