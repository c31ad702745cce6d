"""真的浏览器里的测试共用的：系统里的 Chromium 或 Chrome，与本机上的一个静态网站。"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


class _Quiet(SimpleHTTPRequestHandler):
    """不往终端写每一个请求。"""

    def log_message(self, *_):
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """文件夹 ``folder`` 成为一个网站，给出它的地址，以 ``/`` 结尾。"""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def launched() -> Iterator:
    """开着的浏览器；没有 playwright 或没有浏览器，就跳过并说原因。"""
    playwright = pytest.importorskip("playwright.sync_api", reason="没有装 playwright（pip install playwright），浏览器里的一半没有测")
    build_site = pytest.importorskip("build_site", reason="造网站的包没有装", exc_type=ImportError)
    if not (program := build_site.chrome()):
        pytest.skip("这台机器上没有 Chromium 或 Chrome，浏览器里的一半没有测")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()
