"""A headless Chromium, driven through its debugging pipe: what a person with a mouse would see of a page."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
"""Where one is installed; None if none is."""
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--hide-scrollbars", "--remote-debugging-pipe"),
)


class Page:
    """The only page of a browser."""

    def __init__(self, to_browser: Any, from_browser: Any) -> None:
        self._out, self._in, self._count, self._session = to_browser, from_browser, 0, None
        self._events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command of the Chrome DevTools Protocol."""
        self._count += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._count, "method": method, "params": parameters} | session
        self._out.write(json.dumps(message).encode() + b"\0")
        self._out.flush()
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]
            self._events.append(answer)

    def open(self, path: Path) -> list[str]:
        """Load a file; the URLs that were asked for on the way."""
        self._events.clear()
        self.call("Page.navigate", url=path.absolute().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self._events):
            self._events.append(self._next())
        asked = [event["params"] for event in self._events if event.get("method") == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in asked]

    def problems(self) -> list[str]:
        """What the browser has logged, and exceptions of scripts."""
        self.value("0")
        kinds = (
            "Log.entryAdded",
            "Runtime.exceptionThrown",
            "Runtime.consoleAPICalled",
            "Page.javascriptDialogOpening",
        )
        return [json.dumps(event) for event in self._events if event.get("method") in kinds]

    def look(self, width: int, height: int, dark: bool = False) -> None:
        """The size of the window, and what the person prefers."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript comes to on the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def point_at(self, selector: str) -> None:
        """Move the mouse onto the first element of a CSS selector."""
        self.value(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        box = self.value(
            f"(box => [box.x + box.width / 2, box.y + box.height / 2])"
            f"(document.querySelector({selector!r}).getClientRects()[0])"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])

    def leave(self) -> None:
        """Move the mouse into the corner."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=0, y=0)

    def press_tab_to(self, selector: str) -> None:
        """What a finger or the keyboard does: the first element of a CSS selector has the focus."""
        self.value(f"document.querySelector({selector!r}).focus()")

    def screenshot(self, path: Path) -> None:
        """What is in the window, as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def _next(self) -> dict[str, Any]:
        message = bytearray()
        while (byte := self._in.read(1)) != b"\0":
            assert byte, "the browser has ended"
            message += byte
        return json.loads(message)


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A page of a browser that keeps its files in `profile` and ends with the block."""
    assert CHROMIUM is not None
    (read_there, write_here), (read_here, write_there) = os.pipe(), os.pipe()
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
    pipes = f'exec "$0" "$@" 3<&{read_there} 4>&{write_there}'  # the descriptors that the browser expects
    process = subprocess.Popen(
        ["bash", "-c", pipes, *command],
        pass_fds=(read_there, write_there),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"HOME": str(profile)},
    )
    os.close(read_there)
    os.close(write_there)
    with os.fdopen(write_here, "wb") as to_browser, os.fdopen(read_here, "rb") as from_browser:
        try:
            page = Page(to_browser, from_browser)
            yield page
            page._session = None
            page.call("Browser.close")
        except BaseException:
            process.kill()
            raise
        finally:
            process.wait(60)
