"""A headless Chromium, driven through the pipe of its DevTools protocol."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from select import select
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TIMEOUT = 240  # seconds for one answer; the machine may be busy


class Browser:
    """One page of a browser: ``events`` are those since it was opened."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM
        (to_read, self.to), (self.read_end, from_write) = os.pipe(), os.pipe()
        os.set_inheritable(to_read, True)
        os.set_inheritable(from_write, True)
        # the browser reads from 3 and writes to 4; moved up first, since the pipes may be at 3 and 4 themselves
        shell = f'exec 8<&{to_read} 9>&{from_write} 3<&8 4>&9 8<&- 9>&-; exec "$@"'
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                 "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]  # fmt: skip
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", CHROMIUM, *flags], close_fds=False, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read)
        os.close(from_write)
        self.events: list[dict[str, Any]] = []
        self.number, self.rest, self.session = 0, b"", ""
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        os.close(self.to)
        os.close(self.read_end)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            assert select([self.read_end], [], [], TIMEOUT)[0], "no answer from the browser"
            block = os.read(self.read_end, 1 << 20)
            assert block, "the browser has ended"
            self.rest += block
        line, _, self.rest = self.rest.partition(b"\0")
        return json.loads(line)

    def open(self, file: Path, width: int, height: int, phone: bool = False) -> None:
        """Open a file in a window of this size, and wait until it is loaded."""
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        self.events.clear()
        self.call("Page.navigate", url=file.as_uri())
        self.wait(f"location.protocol === 'file:' && document.readyState === 'complete' && innerWidth === {width}")

    def evaluate(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression: str) -> None:
        end = time.monotonic() + TIMEOUT
        while not self.evaluate(expression):
            assert time.monotonic() < end, expression
            time.sleep(0.05)

    def mouse(self, kind: str, x: float, y: float, **options: Any) -> None:
        self.call("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **options)

    def click(self, x: float, y: float) -> None:
        for kind in ("Pressed", "Released"):
            self.mouse(kind, x, y, button="left", clickCount=1)

    def tap(self, x: float, y: float) -> None:
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def key(self, name: str, text: str = "", code: int = 0) -> None:
        options = {"key": name, "windowsVirtualKeyCode": code, **({"text": text} if text else {})}
        for kind in ("keyDown" if text else "rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **options)

    @property
    def faults(self) -> list[Any]:
        """Exceptions, messages of errors and warnings, and requests besides the file itself and what it holds."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        faults: list[Any] = [event["params"] for event in self.events if event["method"] in kinds]
        urls = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return faults + [url for url in urls[1:] if not url.startswith("data:")]
