"""Downloads from Google Drive, against a server that plays it, with the real client of huggingface_hub."""

import pytest

from passreid_models.checkpoints import download, drive
from passreid_models.checkpoints.download import WeightsUnavailableError
from passreid_models.checkpoints.drive import download_drive
from tests.drive_server import DriveServer

CONTENT = bytes(range(256)) * 20_000


@pytest.fixture(scope="module")
def server():
    with DriveServer(CONTENT) as server:
        yield server


@pytest.fixture(autouse=True)
def endpoint(server, monkeypatch):
    monkeypatch.setattr(drive, "_ENDPOINT", server.endpoint)
    monkeypatch.setattr(download, "TIMEOUT", 0.5)
    server.requests.clear()
    server.count.clear()


@pytest.mark.parametrize(
    "kind",
    ["file", "confirm", "cut", "whole-again", "slow", "busy", "reset", "stall", "trickle", "other-part", "changed"],
)
def test_the_file_arrives_whole(server, tmp_path, kind):
    download_drive(kind, tmp_path / "file.pth", wait=0.01)
    assert (tmp_path / "file.pth").read_bytes() == CONTENT


def test_an_interrupted_transfer_goes_on_where_it_broke_off(server, tmp_path):
    download_drive("cut", tmp_path / "file.pth", wait=0.01)
    (_, first), (_, second) = server.requests
    assert first is None
    assert second == f"bytes={len(CONTENT) // 2}-"


@pytest.mark.parametrize("kind", ["reset", "stall"])
def test_a_connection_lost_in_mid_file_is_resumed(server, tmp_path, kind):
    download_drive(kind, tmp_path / "file.pth", wait=0.01)
    (_, first), (_, second) = server.requests
    assert first is None
    assert 0 < int(second.removeprefix("bytes=").removesuffix("-")) <= len(CONTENT) // 2


def test_the_wait_that_drive_asks_for_is_kept_if_it_is_short(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    download_drive("wait", tmp_path / "file.pth")
    assert waits == [3]
    assert (tmp_path / "file.pth").read_bytes() == CONTENT


def test_a_redirect_to_another_host_is_followed_without_credentials(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with DriveServer(CONTENT) as other, DriveServer(b"", elsewhere=other.endpoint) as first:
        monkeypatch.setattr(drive, "_ENDPOINT", first.endpoint)
        download_drive("elsewhere", tmp_path / "file.pth")
        assert first.credentials == other.credentials == {None}
    assert (tmp_path / "file.pth").read_bytes() == CONTENT


def test_a_file_without_end_is_given_up_at_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MAX_BYTES", 10**6)
    with pytest.raises(WeightsUnavailableError, match="more than 1,000,000 bytes are sent"):
        download_drive("endless", tmp_path / "file.pth")
    with pytest.raises(WeightsUnavailableError, match="5,120,000 bytes are announced, and 1,000,000 accepted at most"):
        download_drive("file", tmp_path / "new.pth")
    assert not (tmp_path / "new.pth").exists()


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
        ("private", "the file is not public"),
        ("page", r"sends a page instead of the file \(Sign in - Google Accounts\)"),
        ("wait-long", "status 429, and it asks to wait 86,400 seconds"),
        ("nowhere", "status 416, and not the part of the file that was asked for"),
        ("loop", "it asks for a confirmation again and again"),
    ],
)
def test_what_cannot_be_downloaded_says_why_and_leaves_no_file_that_looks_whole(tmp_path, kind, message):
    with pytest.raises(WeightsUnavailableError, match=message):
        download_drive(kind, tmp_path / "file.pth", wait=0.001)
    assert not (tmp_path / "file.pth").is_file() or (tmp_path / "file.pth").stat().st_size == 0


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://drive.invalid"])
def test_without_a_network_the_reason_is_told_after_one_new_try(tmp_path, monkeypatch, endpoint):
    monkeypatch.setattr(drive, "_ENDPOINT", endpoint)
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    with pytest.raises(WeightsUnavailableError, match=r"failed: ConnectError: .+"):
        download_drive("file", tmp_path / "file.pth")
    assert waits == [1]


def test_a_network_lost_during_the_download_is_waited_for(tmp_path, monkeypatch):
    servers, waits = [DriveServer(CONTENT)], []
    port = int(servers[0].endpoint.rpartition(":")[2])

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 1:
            servers[0].close()
        if len(waits) == 4:
            servers.append(DriveServer(CONTENT, port=port, kind="file"))

    monkeypatch.setattr(drive, "_ENDPOINT", servers[0].endpoint)
    monkeypatch.setattr(download.time, "sleep", sleep)
    download_drive("cut", tmp_path / "file.pth")
    servers[-1].close()
    assert waits == [1, 2, 4, 8]
    assert (tmp_path / "file.pth").read_bytes() == CONTENT
