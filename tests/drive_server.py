"""A Google Drive on 127.0.0.1, as far as downloading goes: files, the confirm page, the quota page, and accidents."""

import re
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


class DriveServer:
    """Serves ``content`` under ids that say how: ``file``, ``confirm``, ``quota``, ``login``, ``cut`` (half, once),
    ``cut-always``, ``whole-again`` (half, then no ranges), ``slow``, ``busy`` (503 twice), ``denied``, ``loop``; other
    ids are not there. ``kinds`` says it for other ids; with ``kind`` every id is served in that way."""

    def __init__(self, content: bytes, kinds: Mapping[str, str] | None = None, kind: str = "") -> None:
        self.content, self.kinds, self.kind = content, kinds or {}, kind
        self.requests: list[tuple[str, str | None]] = []
        """Id and Range header of each."""
        self.count: Counter[str] = Counter()
        drive = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None: ...

            def do_GET(self) -> None:
                drive.answer(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> "DriveServer":
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        query = {k: v[0] for k, v in parse_qs(urlsplit(request.path).query).items()}
        file_id, wanted = query.get("id", ""), request.headers.get("Range")
        kind = self.kind or self.kinds.get(file_id, file_id)
        self.requests.append((file_id, wanted))
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
        if kind not in ("file", "confirm", "cut", "cut-always", "whole-again", "slow", "busy"):
            return self._page(request, "", 404)
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and kind != "whole-again" else 0
        body = self.content[start:]
        if start >= len(self.content):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(self.content)}")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return None
        request.send_response(206 if start else 200)
        request.send_header("Content-Type", "application/octet-stream")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if (kind in ("cut", "whole-again") and nth == 1) or kind == "cut-always":
            request.wfile.write(b"" if kind == "cut-always" else body[: len(body) // 2])
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

    def _page(self, request: BaseHTTPRequestHandler, text: str, status: int = 200) -> None:
        request.send_response(status)
        request.send_header("Content-Type", "text/html; charset=utf-8")
        request.send_header("Content-Length", str(len(text.encode())))
        request.end_headers()
        request.wfile.write(text.encode())
