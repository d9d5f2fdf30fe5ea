"""A headless Chromium, driven by chromedriver over the WebDriver protocol, for tests of pages."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = None if CHROMIUM and DRIVER else "needs Chromium and chromedriver (Debian: chromium, chromium-driver)"
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's key of an element's reference
KEYS = {"Tab": "\ue004", "Enter": "\ue007", "Control": "\ue009", "Right": "\ue014", "Down": "\ue015"}
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]


class Browser:
    """One window. Elements are named by CSS selectors."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client
        options = {"binary": CHROMIUM, "args": FLAGS}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self._send("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.path = f"/session/{session['sessionId']}"

    def open(self, url: str, width: int = 1280, height: int = 1000, **media: str) -> None:
        """Show a page; `media` as prefers_color_scheme="dark"."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._cdp("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self._cdp("Emulation.setEmulatedMedia", {"features": features})
        self._send("POST", f"{self.path}/url", {"url": url})

    def script(self, code: str, *arguments: Any) -> Any:
        """What the JavaScript function body returns."""
        return self._send("POST", f"{self.path}/execute/sync", {"script": code, "args": list(arguments)})

    def text(self, selector: str) -> str:
        """The element's textContent, shown or not."""
        return self.script("return document.querySelector(arguments[0]).textContent", selector)

    def click(self, selector: str) -> None:
        """As a user does: an element that cannot be clicked is an error."""
        found = self._send("POST", f"{self.path}/element", {"using": "css selector", "value": selector})
        self._send("POST", f"{self.path}/element/{found[ELEMENT]}/click", {})

    def press(self, *keys: str) -> None:
        """Keys, or text, one after another, wherever the focus is; "Control+Enter" is pressed together."""
        actions: list[dict[str, str]] = []
        for key in keys:
            together = key.split("+") if key.partition("+")[0] in KEYS else list(key) if key not in KEYS else [key]
            values = [KEYS.get(part, part) for part in together]
            if "+" in key:
                actions += [{"type": "keyDown", "value": value} for value in values]
                actions += [{"type": "keyUp", "value": value} for value in reversed(values)]
            else:
                actions += [{"type": kind, "value": value} for value in values for kind in ("keyDown", "keyUp")]
        self._send("POST", f"{self.path}/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def wait(self, code: str, seconds: float = 30) -> Any:
        """What the JavaScript expression is, once it is true. AssertionError if it stays false."""
        deadline = time.monotonic() + seconds
        while not (found := self.script(f"return {code}")):
            assert time.monotonic() < deadline, f"not within {seconds} s: {code}"
            time.sleep(0.05)
        return found

    def console(self) -> list[str]:
        """Messages of the page's console since the last call: errors, and what the page's policy blocked."""
        return [entry["message"] for entry in self._send("POST", f"{self.path}/se/log", {"type": "browser"})]

    def screenshot(self) -> bytes:
        """A PNG of the window."""
        return base64.b64decode(self._send("GET", f"{self.path}/screenshot"))

    def close(self) -> None:
        self._send("DELETE", self.path)

    def _cdp(self, command: str, parameters: dict[str, Any]) -> None:
        self._send("POST", f"{self.path}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        found = self.client.request(method, path, json=body)
        value = found.json()["value"]
        assert found.status_code == 200, f"{method} {path}: {value}"
        return value


@contextmanager
def browsing() -> Iterator[Browser]:
    """A browser that ends with the block."""
    assert DRIVER is not None
    with subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as driver:
        try:
            assert driver.stdout is not None
            port = next(found[1] for line in driver.stdout if (found := re.search(r"successfully on port (\d+)", line)))
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
                browser = Browser(client)
                try:
                    yield browser
                finally:
                    browser.close()
        finally:
            driver.terminate()
