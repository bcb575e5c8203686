"""Downloads from Google Drive, against a server that plays it, with the real client of huggingface_hub."""

import pytest

from passreid_models.checkpoints import drive
from passreid_models.checkpoints.drive import DriveError, download_drive
from tests.drive_server import DriveServer

CONTENT = bytes(range(256)) * 20_000


@pytest.fixture(scope="module")
def server():
    with DriveServer(CONTENT) as server:
        yield server


@pytest.fixture(autouse=True)
def endpoint(server, monkeypatch):
    monkeypatch.setattr(drive, "_ENDPOINT", server.endpoint)
    server.requests.clear()
    server.count.clear()


@pytest.mark.parametrize("kind", ["file", "confirm", "cut", "whole-again", "slow", "busy"])
def test_the_file_arrives_whole(server, tmp_path, kind):
    download_drive(kind, tmp_path / "file.pth", wait=0.01)
    assert (tmp_path / "file.pth").read_bytes() == CONTENT


def test_an_interrupted_transfer_goes_on_where_it_broke_off(server, tmp_path):
    download_drive("cut", tmp_path / "file.pth", wait=0.01)
    (_, first), (_, second) = server.requests
    assert first is None
    assert second == f"bytes={len(CONTENT) // 2}-"


@pytest.mark.parametrize("size", [1000, len(CONTENT)])
def test_a_beginning_that_is_there_is_completed(server, tmp_path, size):
    (tmp_path / "file.pth").write_bytes(CONTENT[:size])
    download_drive("file", tmp_path / "file.pth")
    assert (tmp_path / "file.pth").read_bytes() == CONTENT
    assert server.requests == [("file", f"bytes={size}-")]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("quota", "the download quota of the file on Google Drive is used up: try again in a day"),
        ("login", r"sends a page instead of the file \(Sign in - Google Accounts\), which may not be public"),
        ("denied", "refuses the download: the file is not public"),
        ("none", "there is no such file on Google Drive"),
        ("cut-always", "the download from Google Drive failed: "),
        ("loop", "it asks for a confirmation again and again"),
    ],
)
def test_what_cannot_be_downloaded_says_why_and_leaves_no_file_that_looks_whole(tmp_path, kind, message):
    with pytest.raises(DriveError, match=message):
        download_drive(kind, tmp_path / "file.pth", wait=0.001)
    assert not (tmp_path / "file.pth").is_file() or (tmp_path / "file.pth").stat().st_size == 0


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://drive.invalid"])
def test_without_a_network_the_reason_is_told_after_one_new_try(tmp_path, monkeypatch, endpoint):
    monkeypatch.setattr(drive, "_ENDPOINT", endpoint)
    waits = []
    monkeypatch.setattr(drive.time, "sleep", waits.append)
    with pytest.raises(DriveError, match=r"failed: ConnectError: .+"):
        download_drive("file", tmp_path / "file.pth")
    assert waits == [1]


def test_a_network_lost_during_the_download_is_waited_for(server, tmp_path, monkeypatch):
    waits = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        monkeypatch.setattr(drive, "_ENDPOINT", "http://127.0.0.1:9" if len(waits) < 4 else server.endpoint)

    monkeypatch.setattr(drive.time, "sleep", sleep)
    download_drive("cut", tmp_path / "file.pth")
    assert waits == [1, 2, 4, 8]
    assert (tmp_path / "file.pth").read_bytes() == CONTENT
