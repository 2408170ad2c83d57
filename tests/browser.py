"""Load pages in a real browser engine, Qt WebEngine (Chromium), without a display.

    python tests/browser.py WIDTH PAGE …

prints one JSON object for each page; `load_pages` calls it. A script of the page that runs would set `window.executed`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

PROBE = """
(() => {
  const elements = [...document.querySelectorAll('*')];
  const width = document.documentElement.clientWidth, links = [...document.querySelectorAll('a[href^="#"]')];
  const filters = [];  // what each choice of the explorer shows, and what it says
  for (const select of document.querySelectorAll('.explorer select')) {
    for (const option of select.options) {
      select.value = option.value;
      select.dispatchEvent(new Event('change'));
      const box = select.closest('.explorer'), shown = [...box.querySelectorAll('.item')].filter(e => e.offsetHeight);
      filters.push([select.name, option.value, shown.length, Number(box.querySelector('output').textContent)]);
    }
    select.value = '';
    select.dispatchEvent(new Event('change'));
  }
  return {
    filters,
    title: document.title,
    executed: typeof window.executed !== 'undefined',
    scripts: document.querySelectorAll('script, img, iframe, object, embed').length,
    handlers: elements.flatMap(e => [...e.attributes]).filter(a => /^on/.test(a.name)).length,
    overflow: document.documentElement.scrollWidth - width,
    brokenLinks: links.filter(a => !document.getElementById(a.getAttribute('href').slice(1))).length,
    figures: [...document.querySelectorAll('svg')].map(e => Math.round(e.getBoundingClientRect().width)),
    text: document.body.innerText,
  };
})()
"""


def load_pages(paths: Sequence[Path], width: int) -> list[dict[str, Any]]:
    """Load pages at a width; return what the probe found, with `requests` and `messages` of each.

    Skips the test where PyQt6-WebEngine is not installed.
    """
    pytest.importorskip("PyQt6.QtWebEngineCore", reason="the browser tests need PyQt6-WebEngine")
    variables = {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_DISABLE_SANDBOX": "1"}
    variables["QTWEBENGINE_CHROMIUM_FLAGS"] = "--disable-gpu --log-level=3"
    command = [sys.executable, __file__, str(width), *map(str, paths)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    from PyQt6.QtCore import QTimer, QUrl
    from PyQt6.QtWebEngineCore import QWebEnginePage, QWebEngineUrlRequestInterceptor
    from PyQt6.QtWebEngineWidgets import QWebEngineView
    from PyQt6.QtWidgets import QApplication

    application = QApplication(sys.argv[:1])
    requests: list[str] = []
    messages: list[str] = []

    class Interceptor(QWebEngineUrlRequestInterceptor):
        def interceptRequest(self, info):
            requests.append(info.requestUrl().toString())

    class QuietPage(QWebEnginePage):
        def javaScriptConsoleMessage(self, level, message, line, source):
            messages.append(message)

        def javaScriptAlert(self, origin, message):
            messages.append(f"alert: {message}")

    view, interceptor, paths = QWebEngineView(), Interceptor(), iter(sys.argv[2:])
    view.setPage(QuietPage(view))
    view.page().setUrlRequestInterceptor(interceptor)
    view.resize(int(sys.argv[1]), 900)
    view.show()

    def load_next(*_: object) -> None:
        path = next(paths, None)
        if path is None:
            application.quit()
            return
        requests.clear()
        messages.clear()
        view.setUrl(QUrl.fromLocalFile(path))

    def report(found: dict[str, Any]) -> None:
        print(json.dumps({**found, "requests": list(requests), "messages": list(messages)}), flush=True)
        load_next()

    view.loadFinished.connect(lambda _: QTimer.singleShot(300, lambda: view.page().runJavaScript(PROBE, report)))
    QTimer.singleShot(0, load_next)
    application.exec()


if __name__ == "__main__":
    main()
