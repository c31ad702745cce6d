"""在真的浏览器里：每一页打开没有错误，搜索找得到，手机宽度不溢出，明暗两色都够清楚；JupyterLab 里全部运行。

用系统里的 Chromium 或 Chrome；没有就跳过。
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from browsing import launched, served
from test_site import WORDS

from conftest import ROOT

pytest.importorskip("playwright.sync_api", reason="没有 playwright")
build_site = pytest.importorskip("build_site", reason="造网站的包没有装", exc_type=ImportError)
pytestmark = pytest.mark.skipif(not build_site.chrome(), reason="这台机器上没有 Chromium 或 Chrome")

CLIPPED = """() => {
  const bad = [];
  for (const box of document.querySelectorAll("body *")) {
    if (!box.checkVisibility() || box.closest(".katex, svg")) continue;
    const style = getComputedStyle(box);
    const cut = (style.overflowX === "hidden" || style.overflowX === "clip") && box.scrollWidth > box.clientWidth + 1;
    let outside = box.getBoundingClientRect().right > innerWidth + 1;
    for (let up = box; outside && up; up = up.parentElement) outside = !["auto", "scroll"].includes(getComputedStyle(up).overflowX);
    const low = box.matches(".math.display") && box.scrollHeight > box.clientHeight + 3;
    const number = box.matches(".math") && box.querySelector(".katex-tag");
    const over = number && number.previousElementSibling.getBoundingClientRect().right > number.getBoundingClientRect().left;
    if (cut || low || over || outside) bad.push(box.outerHTML.slice(0, 120));
  }
  return bad;
}"""


@pytest.fixture(scope="module")
def browser():
    with launched() as opened:
        yield opened


@pytest.fixture(scope="module")
def address(site):
    with served(site) as root:
        yield root


@pytest.fixture
def page(browser, address):
    """一页；离开时核对：控制台没有错误，没有失败的请求，没有去过别处。"""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    wrong = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(request.url))
    page.on("response", lambda response: wrong.append(f"{response.status} {response.url}") if response.status >= 400 else None)
    page.on("request", lambda request: None if request.url.startswith((address, "data:")) else wrong.append(request.url))
    yield page
    page.close()
    assert not wrong


def names(site) -> list[str]:
    return sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html") if "explorer" not in path.parts)


def test_every_page_opens_without_an_error(page, site, address):
    for name in names(site):
        page.goto(address + name)
        assert page.locator("h1").count() >= 1, name
        assert page.locator(".katex-error").count() == 0 == page.locator(".math:not(.drawn)").count(), name


def test_nothing_overflows_on_a_phone(page, site, address):
    page.set_viewport_size({"width": 360, "height": 740})
    for name in names(site):
        page.goto(address + name)
        page.evaluate("document.querySelectorAll('details').forEach((each) => each.open = true)")
        page.wait_for_timeout(50)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, name
        assert not page.evaluate(CLIPPED), name
        wide = "[...document.querySelectorAll('.scroll, .wide')].filter((box) => box.scrollWidth > box.clientWidth + 1 && box.tabIndex < 0).length"
        assert page.evaluate(wide) == 0, f"{name} 里有键盘到不了的横向滚动"


def test_search_finds(page, address):
    page.goto(address + "05_kl_divergence.html")
    for word in WORDS:
        page.fill("#query", word)
        page.wait_for_selector(f"#results p:first-child:has-text('节里有“{word}”')")
        assert page.locator("#results li mark").count() > 0, word
    page.fill("#query", "后验坍塌")
    page.wait_for_selector("#results p:first-child:has-text('后验坍塌')")
    page.click("#results li:first-child a")
    page.wait_for_url("**/10_posterior_collapse.html*")
    page.fill("#query", "没有写过的词儿甲乙")
    page.wait_for_selector("#results p:has-text('没有找到')")
    page.keyboard.press("Escape")
    assert page.locator("#results").is_hidden()


def test_links_to_folded_things_open_them(page, address):
    page.goto(address + "05_kl_divergence.html#solution-5.3")
    assert page.locator("[id='solution-5.3']").get_attribute("open") is not None
    page.goto(address + "05_kl_divergence.html")
    page.click("a[href='#solutions']")
    page.wait_for_selector("[id='solution-5.1'][open]")


def test_the_menu_on_a_phone(page, address):
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto(address + "index.html")
    assert page.locator("#nav").is_hidden()
    page.click("#menu")
    page.click("#nav a:has-text('KL 散度')")
    page.wait_for_url("**/05_kl_divergence.html")


def test_light_and_dark(page, address):
    colour = "getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="light")
    page.goto(address + "index.html")
    light = page.evaluate(colour)
    page.click("#theme")
    dark = page.evaluate(colour)
    assert light != dark
    page.goto(address + "05_kl_divergence.html")  # 换了页还记得
    assert page.evaluate(colour) == dark
    page.evaluate("localStorage.clear()")
    page.emulate_media(color_scheme="dark")  # 没有按过，就跟系统走
    page.reload()
    assert page.evaluate(colour) == dark
    page.click("#theme")
    assert page.evaluate(colour) == light


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["index", "05_kl_divergence", "glossary", "README"])
def test_accessibility(page, address, name, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="没有 axe-playwright-python").Axe()
    page.emulate_media(color_scheme=scheme)
    page.goto(address + f"{name}.html")
    page.evaluate("document.querySelectorAll('details').forEach((each) => each.open = true)")
    page.fill("#query", "ELBO")
    page.wait_for_selector("#results li")
    found = axe.run(page).response["violations"]
    grave = {each["id"]: [node["html"][:150] for node in each["nodes"][:3]] for each in found if each["impact"] in ("serious", "critical")}
    assert not grave, json.dumps(grave, ensure_ascii=False, indent=1)


def test_a_chapter_becomes_a_pdf(site, tmp_path):
    target = tmp_path / "05.pdf"
    if not build_site.has_chinese_font():
        with pytest.raises(build_site.SiteError, match="没有中文字体.*方框"):
            build_site.print_pdf(site / "05_kl_divergence.html", target)
        return
    build_site.print_pdf(site / "05_kl_divergence.html", target)
    content, page = target.read_bytes(), (site / "05_kl_divergence.html").read_text(encoding="utf-8")
    assert 15 < len(re.findall(rb"/Type ?/Page\b", content)) < 60
    shown = re.sub(r'<details class="solution".*?</details>', "", page, flags=re.DOTALL)  # 解答折着，不印
    assert len(re.findall(rb"/Subtype ?/Image", content)) >= shown.count("<img ") > 5  # 懒加载的图也印出来了
    assert b"KaTeX_Main" in content  # 公式是画出来的，不是 TeX


# ---------------------------------------------------------------- JupyterLab


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """与新克隆一样的一份，JupyterLab 在那里开着；返回它的地址。"""
    pytest.importorskip("jupyterlab")
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("这里不是一个 git 克隆")
    folder = tmp_path_factory.mktemp("lab")
    listed = subprocess.run(["git", "ls-files", "-zco", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / "course" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "course" / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {name: str(folder / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    environment = {**os.environ, **own, "PYTHONPATH": str(folder / "course")}
    options = ["--no-browser", "--allow-root", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--expose-app-in-browser"]
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        *options,
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=folder / "course", env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{url}/api", timeout=2)
                break
            except OSError:
                assert server.poll() is None, (folder / "log").read_text(errors="replace")[-2000:]
                time.sleep(0.25)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


CELLS = """() => jupyterapp.shell.currentWidget.content.widgets.map((cell) => {
  const { cell_type, execution_count, outputs, source } = cell.model.toJSON();
  return { cell_type, execution_count, outputs, source };
})"""


CODE_TOPS = """() => [...document.querySelectorAll(".jp-Notebook .jp-CodeCell .cm-content")]
  .filter((each) => each.checkVisibility()).map((each) => each.getBoundingClientRect().top)"""


@pytest.mark.parametrize("name", ["05_kl_divergence", "12_finding_bugs"])
def test_run_all_in_jupyterlab(browser, lab, name):
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(60_000)
    page.goto(f"{lab}/lab/workspaces/{name}/tree/notebooks/{name}.ipynb")
    page.wait_for_selector(".jp-Notebook h1")
    page.wait_for_function("jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'")
    title, promise = page.locator(".jp-Notebook h1").first.bounding_box(), page.locator(".jp-Notebook p").first
    first_code = min(page.evaluate(CODE_TOPS), default=9999)  # 折起的不算
    assert title["y"] < 300 and "你能" in promise.inner_text()
    box = promise.bounding_box()
    assert title["y"] < box["y"] and box["y"] + box["height"] < first_code
    before = [cell["source"] for cell in page.evaluate(CELLS)]
    page.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells').then(() => { window.ran = true; }); }")
    page.wait_for_function("window.ran", timeout=180_000)
    cells = page.evaluate(CELLS)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    wrong = [output for cell in code for output in cell["outputs"] if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert not wrong and [cell["source"] for cell in cells] == before
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    page.close()
