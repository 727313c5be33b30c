"""A dashboard as a person starts it, and a real Chromium to look at it with."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from tests.trunkline.pages.cases import url_in

BROWSER_VARIABLE = "TRUNKLINE_TEST_CHROMIUM"
PATIENCE_S = 120.0
_Found = TypeVar("_Found")


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The database in a home of the test's own."""
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path))
    monkeypatch.delenv("TRUNKLINE_DATABASE_URL", raising=False)
    return url_in(tmp_path)


def until(what: str, look: Callable[[], _Found], within_s: float = PATIENCE_S) -> _Found:
    """What `look` answers, once it answers something; the test fails where nothing comes of it in time."""
    deadline = time.monotonic() + within_s
    while not (found := look()):
        assert time.monotonic() < deadline, f"waited for {what} in vain"
        time.sleep(0.1)
    return found


@dataclass
class Dashboard:
    """`trunkline dashboard` in a process of its own; `url` ends in a slash."""

    process: subprocess.Popen[bytes]
    log: Path
    url: str = ""

    @property
    def port(self) -> int:
        return int(self.url.rstrip("/").rpartition(":")[2])

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)

    def said(self) -> str:
        return self.log.read_text()


@pytest.fixture
def dashboard(tmp_path: Path) -> Iterator[Callable[..., Dashboard]]:
    """`dashboard(*arguments, ready=True)`: started on a free port of 127.0.0.1 unless told otherwise."""
    started: list[Dashboard] = []
    # What these tests are told to ignore themselves, the command would ignore too.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def start(*arguments: str, ready: bool = True) -> Dashboard:
        told = arguments if "--listen" in arguments else ("--listen", "127.0.0.1:0", *arguments)
        log = tmp_path / f"dashboard-{len(started)}.log"
        with log.open("wb") as file:
            command = [sys.executable, "-m", "trunkline", "dashboard", *told]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        found = Dashboard(process, log)
        started.append(found)
        if ready:
            until(
                f"a dashboard, which said: {log.read_text()}",
                lambda: "dashboard at" in found.said() or process.poll() is not None,
            )
            assert process.poll() is None, found.said()
            found.url = found.said().partition("dashboard at ")[2].split()[0]
        return found

    yield start
    for one in started:
        one.end(signal.SIGKILL)


@dataclass
class Browser:
    """A headless Chromium. What it asked for and what its console said is kept from one `open` to the next."""

    driver: webdriver.Chrome
    asked: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def open(self, url: str, *, width: int = 1280, dark: bool = False) -> None:
        scheme = "dark" if dark else "light"
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._tell("Emulation.setEmulatedMedia", features=features)
        self._tell("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.driver.get("about:blank")
        self.note()
        self.asked.clear()
        self.complaints.clear()
        self.driver.get(url)

    def note(self) -> None:
        """Take over what the browser logged since."""
        self.complaints += [f"{one['level']}: {one['message']}" for one in self.driver.get_log("browser")]
        for one in self.driver.get_log("performance"):
            event = json.loads(one["message"])["message"]
            if event["method"] == "Network.requestWillBeSent":
                self.asked.append(event["params"]["request"]["url"])

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def picture(self, path: Path, *, height: int | None = None) -> None:
        """The whole page, or its first `height` pixels, as a PNG of 256 colours, which is small."""
        size = self.run("return [document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": size[0], "height": height or size[1], "scale": 1}
        told = self._tell("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        with Image.open(io.BytesIO(base64.b64decode(told["data"]))) as image:
            few = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
            few.save(path, optimize=True)

    def _tell(self, command: str, **parameters: object) -> Any:
        return self.driver.execute_cdp_cmd(command, parameters)


def _programs() -> tuple[str, str]:
    """Chromium and its driver. Where TRUNKLINE_TEST_CHROMIUM names one, as in CI, there must be both."""
    named = os.environ.get(BROWSER_VARIABLE)
    chromium = shutil.which(named or "chromium")
    driver = shutil.which("chromedriver")
    if chromium and driver:
        return chromium, driver
    missing = f"no {'chromedriver' if chromium else named or 'chromium'} here; on Debian: apt-get install chromium "
    missing += "chromium-driver"
    if named:
        pytest.fail(f"{BROWSER_VARIABLE} is {named}, but there is {missing}")
    pytest.skip(missing)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    binary, driver = _programs()
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    profile = tmp_path_factory.mktemp("chromium")
    flags = [
        "--headless=new",
        "--disable-gpu",
        "--hide-scrollbars",
        "--no-first-run",
        "--disable-component-update",
        f"--user-data-dir={profile}",
    ]
    if os.geteuid() == 0:
        flags.append("--no-sandbox")  # Chromium's own sandbox refuses root, as containers have it
    flags.append("--disable-dev-shm-usage")
    for flag in flags:
        options.add_argument(flag)
    started = webdriver.Chrome(options=options, service=Service(driver))
    started.set_page_load_timeout(PATIENCE_S)
    started.set_script_timeout(PATIENCE_S)
    yield started
    started.quit()


@pytest.fixture
def browser(chromium: webdriver.Chrome) -> Browser:
    return Browser(chromium)
