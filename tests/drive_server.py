"""A Google Drive on 127.0.0.1, as far as downloading goes: files, the confirm page, the quota page, and accidents."""

import contextlib
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

CONFIRM = """<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body>
<p>Google Drive can't scan this file for viruses.</p>
<form id="download-form" action="https://elsewhere.invalid/download" method="get">
<input type="submit" id="uc-download-link" value="Download anyway"/>
<input type="hidden" name="id" value="{id}"><input type="hidden" name="export" value="download">
<input type="hidden" name="confirm" value="t"><input type="hidden" name="uuid" value="a&amp;b"></form></body></html>"""
QUOTA = """<html><head><title>Google Drive - Quota exceeded</title></head><body>
<p>Sorry, you can't view or download this file at this time. Too many users have viewed or downloaded this file
recently.</p></body></html>"""
LOGIN = "<html><head><title>Sign in - Google&nbsp;Accounts</title></head><body></body></html>"

ACCIDENTS = ("cut", "cut-always", "whole-again", "reset", "stall", "trickle", "other-part", "changed")


class DriveServer:
    """Serves ``content`` under ids that say how: ``file``, ``confirm``, ``quota``, ``login``, ``cut`` (half, once),
    ``cut-always``, ``whole-again`` (half, then no ranges), ``slow``, ``busy`` (503 twice), ``denied``, ``loop``,
    ``reset`` and ``stall`` (half, once), ``trickle`` (a few bytes, once), ``other-part`` (half, then the wrong range,
    once), ``changed`` (half, then a range of a longer file, once), ``endless``, ``page`` (a long one), ``private``
    (401), ``wait`` (429 once, 3 s), ``wait-long`` (429, a day), ``elsewhere`` (redirect to ``self.elsewhere``),
    ``nowhere`` (416); other ids are not there. ``kinds`` says it for other ids; with ``kind`` every id is served in
    that way."""

    def __init__(
        self, content: bytes, kinds: Mapping[str, str] | None = None, kind: str = "", port: int = 0, elsewhere: str = ""
    ) -> None:
        self.content, self.kinds, self.kind, self.elsewhere = content, kinds or {}, kind, elsewhere
        self.requests: list[tuple[str, str | None]] = []
        """Id and Range header of each."""
        self.credentials: set[str | None] = set()
        self.closing = threading.Event()
        self.count: Counter[str] = Counter()
        drive = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None: ...

            def do_GET(self) -> None:
                drive.answer(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> "DriveServer":
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        query = {k: v[0] for k, v in parse_qs(urlsplit(request.path).query).items()}
        file_id, wanted = query.get("id", ""), request.headers.get("Range")
        kind = self.kind or self.kinds.get(file_id, file_id)
        self.requests.append((file_id, wanted))
        self.credentials.add(request.headers.get("Authorization"))
        self.count[file_id] += 1
        nth = self.count[file_id]
        if kind == "quota":
            return self._page(request, QUOTA)
        if kind == "login":
            return self._page(request, LOGIN)
        if kind == "loop" or (kind == "confirm" and query.get("uuid") != "a&b"):
            return self._page(request, CONFIRM.format(id=file_id))
        if kind == "denied":
            return self._page(request, "", 403)
        if kind == "busy" and nth <= 2:
            return self._page(request, "", 503)
        if kind == "page":
            return self._page(request, LOGIN + "<form" * 1_000_000)
        if kind == "private":
            return self._page(request, "", 401)
        if kind == "nowhere":
            return self._page(request, "", 416)
        if kind == "wait-long" or (kind == "wait" and nth == 1):
            return self._page(request, "", 429, Retry_After="86400" if kind == "wait-long" else "3")
        if kind == "elsewhere":
            return self._page(request, "", 302, Location=f"{self.elsewhere}/download?id=file")
        if kind not in ("file", "confirm", "slow", "busy", "wait", "endless", *ACCIDENTS):
            return self._page(request, "", 404)
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and kind != "whole-again" else 0
        body = self.content[start:]
        if kind == "endless":
            return self._endless(request)
        if start >= len(self.content):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(self.content)}")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return None
        request.send_response(206 if start else 200)
        request.send_header("Content-Type", "application/octet-stream")
        request.send_header("Content-Length", str(len(body)))
        if start:
            first = start - 1 if kind == "other-part" and nth == 2 else start
            size = len(self.content) + (kind == "changed" and nth == 2)
            request.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
        request.end_headers()
        if (kind in ACCIDENTS and nth == 1) or kind == "cut-always":
            part = {"cut-always": 0, "trickle": 100}.get(kind, len(body) // 2)
            request.wfile.write(body[:part])
            if kind == "stall":
                self.closing.wait(5)
            if kind == "trickle":
                with contextlib.suppress(OSError):
                    while not self.closing.wait(0.1):
                        request.wfile.write(body[part : (part := part + 10)])
            if kind == "reset":
                request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                socket.close(request.connection.detach())
            request.close_connection = True
            return None
        if kind == "slow":
            for i in range(0, len(body), 1 + len(body) // 8):
                request.wfile.write(body[i : i + 1 + len(body) // 8])
                request.wfile.flush()
                time.sleep(0.05)
            return None
        request.wfile.write(body)
        return None

    def _endless(self, request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Type", "application/octet-stream")
        request.end_headers()
        with contextlib.suppress(OSError):  # until the client has had enough
            while not self.closing.is_set():
                request.wfile.write(bytes(65536))
        request.close_connection = True

    def _page(self, request: BaseHTTPRequestHandler, text: str, status: int = 200, **headers: str) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.send_header("Content-Type", "text/html; charset=utf-8")
        request.send_header("Content-Length", str(len(text.encode())))
        request.end_headers()
        with contextlib.suppress(OSError):  # the client reads only the beginning
            request.wfile.write(text.encode())
