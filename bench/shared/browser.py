"""A headless Chromium that a test or a benchmark drives by the DevTools protocol, over two pipes."""

import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe",
)  # fmt: skip


class Browser:
    """One page. `requests`: the addresses that it asked for; `errors`: what its console and scripts complained of."""

    def __init__(self, folder: Path, width: int = 1200, height: int = 900) -> None:
        ours, theirs_out = os.pipe()
        theirs_in, self._to = os.pipe()
        self._from = os.fdopen(ours, "rb", buffering=0)
        # The protocol reads from descriptor 3 and writes to 4.
        command = 'exec "$0" "$@" 3<&%d 4>&%d' % (theirs_in, theirs_out)  # noqa: UP031
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", command, str(BROWSER), *FLAGS, f"--user-data-dir={folder / 'profile'}",
             f"--window-size={width},{height}", "about:blank"],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._numbers, self._buffer = itertools.count(1), b""
        self.requests: list[str] = []
        self.errors: list[str] = []
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        attached = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})
        self._session: str | None = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable", {})
        sizes = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", sizes)

    _session: str | None = None

    def open(self, address: str) -> None:
        self._call("Page.navigate", {"url": address})
        self.wait("document.readyState === 'complete'")

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        result = self._call("Runtime.evaluate", {"expression": script, "returnByValue": True, "awaitPromise": True})
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Wait until a JavaScript expression is true, also on the page that follows this one."""
        deadline = time.monotonic() + seconds
        while not self._is_true(condition):
            assert time.monotonic() < deadline, f"waited {seconds} s for {condition}"
            time.sleep(0.02)

    def _is_true(self, condition: str) -> bool:
        try:
            return bool(self.evaluate(condition))
        except AssertionError as error:
            # The protocol's words where the page is left for another while the expression is evaluated.
            if "navigated or closed" in str(error) or "context was destroyed" in str(error):
                return False
            raise

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", {"type": kind, "key": key, "code": key})

    def screenshot(self, path: Path) -> None:
        import base64

        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", {})["data"]))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        self._from.close()

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _call(self, method: str, parameters: dict[str, Any]) -> Any:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self) -> Any:
        while b"\0" not in self._buffer:
            part = self._from.read(1 << 16)
            assert part, "the browser has ended"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(parameters["entry"]["text"])
        return message
