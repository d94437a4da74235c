"""The built book as a reader gets it: every page of the table of contents in headless Chromium.

Needs `make book`, Chromium and chromedriver; skips without them, or fails where WDA_REQUIRE_BROWSER is set.
"""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

ROOT = Path(__file__).parents[1]
HTML = ROOT / "_build" / "html"

FLAGS = (
    "--headless=new",
    "--no-sandbox",  # Chromium's sandbox refuses to start as root, the usual user in a container
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--no-first-run",
    "--hide-scrollbars",  # as on a phone, where they take no width
    # Chromium's own traffic, which is not the page's; and whatever a page asks for finds no other host
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)

# Answers once the page is complete: mathematics typeset, every image decoded or known to be broken.
INSPECT = r"""
const done = arguments[0];
const settled = async () => {
  const formulas = document.querySelectorAll("span.math, div.math");
  if (formulas.length) {
    while (!window.MathJax?.startup?.promise) await new Promise(r => setTimeout(r, 50));
    await MathJax.startup.promise;
  }
  const broken = [];
  await Promise.all([...document.images].map(image => {
    image.loading = "eager";
    return image.decode().catch(() => broken.push(image.src));
  }));
  const raw = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const node = texts.currentNode;
    if (node.parentElement.closest("pre, code, script, style, noscript, template")) continue;
    if (/\$|\\[()[\]]|\\begin\{/.test(node.data)) raw.push(node.data.trim());
  }
  return {
    status: performance.getEntriesByType("navigation")[0].responseStatus,
    titles: document.querySelectorAll("article h1").length,
    formulas: formulas.length,
    untypeset: [...formulas].filter(f => !f.querySelector("mjx-container")).map(f => f.textContent),
    // MathJax marks what it cannot parse as merror, and sets an unknown macro in red
    misprints: [...document.querySelectorAll("mjx-merror, mjx-mtext[style*='color: red']")]
      .map(e => e.closest("span.math, div.math")?.textContent ?? e.textContent),
    raw, broken,
  };
};
settled().then(done, error => done({error: String(error)}));
"""

# The outermost things that stick out of a narrow page and that no scrolling container of their own holds.
OVERFLOW = r"""
const width = document.documentElement.clientWidth;
const held = element => {
  for (let e = element; e && e !== document.body; e = e.parentElement)
    if (["auto", "scroll"].includes(getComputedStyle(e).overflowX)
        && e.getBoundingClientRect().right <= width + 1) return true;
  return false;
};
const wide = [...document.querySelectorAll("article *")].filter(
  e => e.getBoundingClientRect().right > width + 1 && !held(e));
return {
  page: Math.max(document.documentElement.scrollWidth, document.body.scrollWidth), width,
  wide: wide.slice(0, 5).map(e => e.outerHTML.slice(0, 120)),
};
"""


def pages() -> list[str]:
    """The pages that the table of contents promises, built or not."""

    def walk(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from (node[key] for key in ("root", "file") if key in node)
            for value in node.values():
                yield from walk(value)
        elif isinstance(node, list):
            for value in node:
                yield from walk(value)

    return ["index.html", *(f"{name}.html" for name in walk(yaml.safe_load((ROOT / "_toc.yml").read_text())))]


def unavailable(reason: str) -> NoReturn:
    if os.environ.get("WDA_REQUIRE_BROWSER"):
        pytest.fail(f"{reason}, and WDA_REQUIRE_BROWSER is set")
    pytest.skip(reason)


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    if not (HTML / "index.html").is_file():
        unavailable("no built book: run 'make book'")
    handler = functools.partial(Handler, directory=str(HTML))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    driver = os.environ.get("CHROMEDRIVER") or shutil.which("chromedriver")
    if not (chromium and driver):
        unavailable("no browser: install chromium and chromedriver (Debian: chromium chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium  # both paths are given, so Selenium looks for no driver on the network
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    chrome.set_script_timeout(600)
    yield chrome
    chrome.quit()


def open_page(browser: Any, url: str, width: int) -> Any:
    """Load a page in a window of that width, wait until it is complete and return what INSPECT found."""
    for log in ("browser", "performance"):
        browser.get_log(log)  # what is left of the page before
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    browser.get(url)
    if url.endswith("/index.html"):  # forwards to the welcome page
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(browser, 10).until(lambda b: b.find_elements("css selector", "article h1"))
    return browser.execute_async_script(INSPECT)


def requested(browser: Any) -> set[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return {
        message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"
    }


@pytest.mark.browser
@pytest.mark.parametrize("page", pages())
def test_page(site: str, browser: Any, page: str) -> None:
    state = open_page(browser, f"{site}/{page}", width=1280)
    assert "error" not in state, state
    assert state["status"] == 200
    assert state["titles"] == 1
    assert not state["untypeset"], "formulas that MathJax left alone"
    assert not state["misprints"], "formulas that MathJax could not read"
    assert not state["raw"], "TeX source in the text"
    assert not state["broken"], "images that do not load"
    console = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    if page == "index.html":  # it names no icon, and some browsers have asked for one before they are forwarded
        console = [entry for entry in console if "/favicon.ico" not in entry["message"]]
    assert not console
    away = {url for url in requested(browser) if not url.startswith((f"{site}/", "data:", "blob:", "chrome"))}
    assert not away, "requests that leave the machine"


@pytest.mark.browser
@pytest.mark.parametrize("page", pages())
def test_page_fits_a_phone(site: str, browser: Any, page: str) -> None:
    open_page(browser, f"{site}/{page}", width=390)
    state = browser.execute_script(OVERFLOW)
    assert state["width"] == 390
    assert state["page"] <= 390, state["wide"]
    assert not state["wide"], "elements cut off at the right edge"
