"""tools/build_site.py：造好的站不从外面载入任何东西，每条链接通，每个词找得到；课程里有毛病就不造，说出在哪里。"""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

build_site = pytest.importorskip("build_site", reason="造网站要 markdown-it-py、mdit-py-plugins、jinja2 与 pygments", exc_type=ImportError)
from site_text import strange  # noqa: E402

WORDS = ["后验坍塌", "重参数化", "隐变量", "率失真", "批归一化", "证据下界", "ELBO"]
LOADS = {"src", "srcset", "poster", "data", "background", "xlink:href"}  # <a href> 之外，浏览器见了就去取的
VOID = {"meta", "link", "img", "input", "br", "hr", "wbr"}


class Reader(HTMLParser):
    """一页里的锚点、链接、图，与浏览器会去载入的地址。"""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids, self.links, self.images, self.loads, self.styles = [], [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.styles += [found["style"]] if "style" in found else []
        if tag in ("a", "area"):
            self.links.append(found.get("href", ""))
        elif "href" in found:
            self.loads.append(found["href"])
        self.loads += [each.split()[0] for key in LOADS & found.keys() for each in (found[key].split(",") if key == "srcset" else [found[key]])]
        self.images += [found] if tag == "img" else []


@pytest.fixture(scope="module")
def pages(site):
    return {path.relative_to(site).as_posix(): Reader(path) for path in site.rglob("*.html")}


def fetched(text: str) -> list[str]:
    """CSS 与 JavaScript 里会去取的地址。"""
    found = re.findall(r"""url\(\s*["']?([^"')]+)""", text) + re.findall(r"""@import\s+["']([^"']+)""", text)
    return found + re.findall(r"""\b(?:import|fetch|importScripts|Worker|URL|open)\s*\(\s*["'`]([^"'`]+)""", text)


def test_nothing_is_loaded_from_elsewhere(site, pages):
    loads = [(name, url) for name, page in pages.items() for url in page.loads + [url for style in page.styles for url in fetched(style)]]
    for path in [*site.rglob("*.css"), *site.rglob("*.js")]:
        text = path.read_text(encoding="utf-8").split("\nconst INDEX")[0]  # 全文里的地址是课文，不是代码
        loads += [(path.relative_to(site).as_posix(), url) for url in fetched(text)]
    assert len(loads) > 100
    for name, url in loads:
        if not url.startswith("data:"):
            assert not urlsplit(url).scheme and not url.startswith("//"), (name, url)
            assert (site / name).parent.joinpath(unquote(urlsplit(url).path)).is_file() or url == ".", (name, url)


def test_pages_are_small(site):
    sizes = {path.name: path.stat().st_size for path in site.rglob("*.html")}
    assert max(sizes.values()) < 400_000, max(sizes, key=sizes.get)


def test_every_link_and_anchor_is_there(site, pages):
    checked = 0
    for name, page in pages.items():
        assert len(page.ids) == len(set(page.ids)), f"{name} 里有重复的锚点"
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or link.startswith("//"):
                continue
            target = (site / name).parent.joinpath(unquote(url.path)).resolve() if url.path else site / name
            assert target.is_file(), (name, link)
            assert not url.fragment or unquote(url.fragment) in pages[target.relative_to(site).as_posix()].ids, (name, link)
            checked += 1
    assert checked > 1000


def test_every_image_is_described_and_waits(pages):
    images = [(name, image) for name, page in pages.items() for image in page.images]
    assert len(images) > 100
    hero = pages["index.html"].images[0]  # 首屏的大图不等
    for name, image in images:
        assert image.get("alt", "").strip(), (name, image)
        if name.startswith("explorer/") or "images/html-" in image["src"]:  # 探索器与 HTML 的输出自己定大小
            continue
        assert int(image["width"]) and int(image["height"]), (name, image)
        assert (image.get("loading") == "lazy") == (image is not hero), (name, image)


def test_nothing_is_shown_as_a_replacement_character(site):
    for path in site.rglob("*.html"):
        assert not strange(path.read_text(encoding="utf-8")), path


def engine(site):
    """站里的 search.js，在没有浏览器的地方运行。"""
    v8 = pytest.importorskip("py_mini_racer", reason="没有 mini-racer，不在浏览器里的搜索不测").MiniRacer()
    v8.eval((site / "search.js").read_text(encoding="utf-8").replace("const INDEX", "var INDEX"))
    return v8


def test_search_finds_the_words(site):
    v8 = engine(site)
    for word in WORDS:
        found = json.loads(v8.eval(f"JSON.stringify(find({json.dumps(word)}))"))["found"]
        assert found, word
        pages = [each["url"].split("#")[0] for each in found]
        assert any(page.startswith(("0", "1")) for page in pages[:3]), (word, pages)
        page = (site / pages[0]).read_text(encoding="utf-8")
        assert word in re.sub("<[^>]*>", "", page), (word, pages[0])
    sections = json.loads(v8.eval('JSON.stringify(find("批归一化"))'))["found"][:4]
    assert all("批归一化" in each["section"] for each in sections)  # 写在标题里的在前
    first = json.loads(v8.eval('JSON.stringify(find("后验坍塌"))'))["found"][0]
    assert first["url"].startswith("10_posterior_collapse.html")
    assert not v8.eval('find("这句话哪里也没有写过").found.length')
    assert v8.eval('find("kl散度").found.length') == v8.eval('find("KL 散度").found.length') > 10  # 大小写、空格不计较
    assert v8.eval('find("(.*").found.length') == 0  # 记号不当正则


def test_each_exercise_is_followed_by_its_folded_solution(site, pages):
    for path in build_site.Site().chapters:
        ids = pages[f"{path.stem}.html"].ids
        numbers = [each.split("-")[1] for each in ids if each.startswith("exercise-")]
        order = [each for each in ids if re.match(r"(exercise|solution)-\d", each)]
        assert numbers and order == [f"{kind}-{number}" for number in numbers for kind in ("exercise", "solution")], path.name
        text = (site / f"{path.stem}.html").read_text(encoding="utf-8")
        assert all(f'<details class="solution" id="solution-{number}">' in text for number in numbers)


def test_the_map_shows_every_chapter(site, pages):
    text = (site / "index.html").read_text(encoding="utf-8")
    cards = re.findall(r'<li class="card">(.*?)</li>', text, re.DOTALL)
    chapters = build_site.Site().chapters
    assert len(cards) == len(chapters)
    for path, card in zip(chapters, cards):
        assert f'href="{path.stem}.html"' in card and "<img" in card and re.search(r"\d+ 分钟", card), path.name
        assert len(re.search(r"<p>(.*?)</p>", card, re.DOTALL)[1]) > 10, path.name
        for copy in (path, path.parent / "solutions" / path.name):
            assert (site / copy.relative_to(build_site.ROOT)).read_bytes() == copy.read_bytes()
    for before, after in zip(chapters, chapters[1:]):
        assert f'rel="next" href="{after.stem}.html"' in (site / f"{before.stem}.html").read_text(encoding="utf-8")
        assert f'rel="prev" href="{before.stem}.html"' in (site / f"{after.stem}.html").read_text(encoding="utf-8")


# ---------------------------------------------------------------- 小小的假课程

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
TITLE = "# 01 假的一章：试试看\n\n读完这一章，你能看见造站。\n\n| | |\n|---|---|\n| 用时 | 约 5 分钟 |"


def text(source: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": [source]}


def code(source: str, *outputs: dict, count: int | None = 1) -> dict:
    return {"cell_type": "code", "metadata": {}, "source": source.splitlines(keepends=True), "outputs": list(outputs), "execution_count": count}


def stream(words: str) -> dict:
    return {"output_type": "stream", "name": "stdout", "text": [words]}


def shown(**data: str) -> dict:
    return {"output_type": "display_data", "metadata": {}, "data": {key.replace("_", "/"): value for key, value in data.items()}}


@pytest.fixture
def course(tmp_path):
    """造一个只有一章的课程；``cells`` 接在标题后面，``solutions`` 是解答的各格。返回仓库的根。"""

    def make(*cells: dict, solutions: tuple[dict, ...] = (), readme: str = "# 假的课程\n\n一句话。\n") -> Path:
        (tmp_path / "notebooks/solutions").mkdir(parents=True)
        (tmp_path / "README.md").write_text(readme, encoding="utf-8")
        (tmp_path / "table.csv").write_text("1\n", encoding="utf-8")
        for name, found in (("01_fake", [text(TITLE), *cells]), ("solutions/01_fake", solutions)):
            book = {"cells": list(found), "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
            (tmp_path / f"notebooks/{name}.ipynb").write_text(json.dumps(book, ensure_ascii=False), encoding="utf-8")
        return tmp_path

    return make


BAD = {
    "没有执行": ([code("1 + 1", count=None)], "第 1 格：没有执行过"),
    "公式": ([text(r"一个公式 $\frac{1}{$。")], "第 1 格：公式解析不了"),
    "公式里不认得的命令": ([text("$$\\begin{aligned}a&=\\nosuch{b}\\end{aligned}$$")], "第 1 格：公式解析不了"),
    "链接": ([text("[哪里](02_nowhere.ipynb)")], "第 1 格：链接 02_nowhere.ipynb 通向不存在的地方"),
    "仓库之外": ([text("[外面](../../outside.md)")], "第 1 格：链接 ../../outside.md 通向不存在的地方"),
    "锚点": ([text("[那一节](01_fake.ipynb#没有这一节)")], "第 1 格：链接通向 01_fake.html 的 #没有这一节"),
    "文件里的锚点": ([text("[表](../table.csv#L3)")], "第 1 格：链接通向 files/table.csv 的 #L3"),
    "式号": ([text("由式(1.9) 得出。")], "第 1 格：提到式(1.9)"),
    "替代字符": ([text("一个坏字\ufffd。")], "第 1 格：有一个显示不出的字符 U+FFFD"),
    "输出里的替代字符": ([code("1", stream("坏\ufffd"))], "第 1 格：输出里有一个显示不出的字符 U+FFFD"),
    "缺字的警告": ([code("1", stream("UserWarning: Glyph 21644 (\\N{CJK}) missing from font(s) DejaVu Sans."))], "第 1 格：输出里有缺字的警告"),
    "代码里的私用区": ([code("x = '\ue000'")], "第 1 格：代码里有一个显示不出的字符 U+E000"),
    "坏图": ([code("1", shown(image_png="iVBORw0KGgo="))], "第 1 格：输出里有一张读不出的图"),
    "没有描述的图": ([text("![](../faces.png)")], "第 1 格：图 ../faces.png 没有描述"),
    "外面的图": ([text("![脸](https://example.com/a.png)")], "第 1 格：图 https://example.com/a.png 不在仓库里"),
    "HTML 里没有描述的图": ([code("1", shown(text_html='<img src="data:image/png;base64,AAAA">'))], "第 1 格：输出的 HTML 里有一张没有描述的图"),
    "HTML 从外面载入": ([code("1", shown(text_html='<script src="https://example.com/a.js"></script>'))], "第 1 格：输出的 HTML 从外面载入"),
    "原样的 HTML": ([text('<img src="a.png">')], "第 1 格：写着原样的 HTML"),
    "粗体": ([text("这是**粗（体）**的字。")], "第 1 格：粗体没有成"),
    "练习没有解答": ([text("**练习 1.1** 想一想。")], "第 1 格：练习 1.1 没有解答"),
}


@pytest.mark.parametrize("cells, words", BAD.values(), ids=BAD.keys())
def test_a_flaw_stops_the_build_and_is_named(course, capsys, cells, words):
    if "公式" in words:
        pytest.importorskip("py_mini_racer", reason="没有 mini-racer，公式不检查")
    root = course(*cells)
    assert build_site.main(["--out", str(root / "site")], root) == 1
    told = capsys.readouterr().err
    assert "notebooks/01_fake.ipynb" in told and words in told, told
    assert not (root / "site").exists()


def test_a_picture_without_any_words_around_is_a_flaw(course, capsys):
    root = course(code("1", shown(image_png=PIXEL)))
    book = root / "notebooks/01_fake.ipynb"
    book.write_text(book.read_text(encoding="utf-8").replace("# 01 ", "01 "), encoding="utf-8")
    assert build_site.main(["--check"], root) == 1
    assert "第 1 格：这张图前面没有标题" in capsys.readouterr().err


@pytest.mark.parametrize("broken", [b"{", b"[]", b'{"cells": 1}', b"\xff\xfe"])
def test_a_file_that_is_no_notebook_is_named(course, capsys, broken):
    root = course(text("## 一节"))
    (root / "notebooks/02_broken.ipynb").write_bytes(broken)
    assert build_site.main(["--check"], root) == 1
    assert "notebooks/02_broken.ipynb：不是一本读得出的笔记" in capsys.readouterr().err


def test_a_solution_without_its_exercise_and_a_broken_readme_are_flaws(course, capsys):
    root = course(solutions=(text("# 解答"), text("## 练习 1.7\n就是这样。")), readme="# 假的课程\n\n[没有](nowhere.md)\n")
    assert build_site.main(["--check"], root) == 1
    told = capsys.readouterr().err
    assert "有练习 1.7 的解答，01_fake.ipynb 里没有这道练习" in told and "README.md：链接 nowhere.md 通向不存在的地方" in told


def test_a_small_course(course, capsys):
    """公式、表格里的公式、转义的 $、编号的链接、解答、下载、长输出，都在一页里。"""
    cells = [
        text(
            "## 一节\n\n花了 \\$5，不是公式；$a_{\\text{中文}}$ 是。\n\n$$\\begin{aligned}a&=b\\end{aligned} \\tag{1.1}$$\n\n- 列表里 $x$\n\n"
            "| 甲 |\n|---|\n| $y$ |"
        ),
        code("print('长')", stream("行\n" * 30), shown(image_png=PIXEL)),
        text("由式(1.1)，见[解答](solutions/01_fake.ipynb)与[源码](../tool.py)、[表](../table.csv)、[草稿](extra.ipynb)。\n\n**练习 1.1** 想一想。"),
        code("exercise()", stream("✓ 对了")),
        text("## 小结\n\n完了。"),
    ]
    root = course(*cells, solutions=(text("# 解答"), code("import os"), text("## 练习 1.1\n答案是 $z$。"), code("answer = 1")))
    (root / "tool.py").write_text("x = 1\n", encoding="utf-8")
    (root / "notebooks/extra.ipynb").write_text("{}", encoding="utf-8")  # 不是一章，原样带上
    assert build_site.main(["--out", str(root / "site")], root) == 0
    assert "5 个公式" in capsys.readouterr().out or not build_site.importlib.util.find_spec("py_mini_racer")
    page = (root / "site/01_fake.html").read_text(encoding="utf-8")
    assert "花了 $5，不是公式" in page and page.count('class="math"') == 4 and 'id="eq-1.1"' in page
    assert '<a class="eq" href="#eq-1.1">式(1.1)</a>' in page and 'href="#solutions"' in page
    assert 'href="source/tool.py.html"' in page and (root / "site/source/tool.py.html").is_file()
    assert all(f'href="files/{name}"' in page and (root / "site/files" / name).is_file() for name in ("table.csv", "notebooks/extra.ipynb"))
    assert "输出，共 30 行" in page and 'alt="一节"' in page and "import os" not in page
    assert page.index("exercise()") < page.index("练习 1.1 的解答") < page.index('<h2 id="小结"')
    assert "在 Colab 打开" not in page and 'href="notebooks/01_fake.ipynb" download' in page


def test_colab_only_where_an_address_is_stamped(course):
    import stamp

    root = course(code(stamp.cell("https://github.com/someone/somewhere")))
    build_site.build(root / "site", root)
    page = (root / "site/01_fake.html").read_text(encoding="utf-8")
    assert f'href="{stamp.COLAB}/github/someone/somewhere/blob/main/notebooks/01_fake.ipynb"' in page
    assert "colab-badge" not in page


def test_the_explorer_comes_along_when_there_is_one(course):
    root = course(text("## 一节\n\n字。"))
    for name in ("tools/explorer/index.html", "photos/explorer/frames.webp"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("探索", encoding="utf-8")
    build_site.build(root / "site", root)
    assert {path.name for path in (root / "site/explorer").iterdir()} == {"index.html", "frames.webp"}
    assert "explorer/index.html" in (root / "site/index.html").read_text(encoding="utf-8")


def test_other_peoples_folders_are_left_alone(course, capsys):
    root = course(text("## 一节\n\n字。"))
    (root / "mine").mkdir()
    (root / "mine/thesis.txt").write_text("三年", encoding="utf-8")
    assert build_site.main(["--out", str(root / "mine")], root) == 1
    assert "里有别的东西，不覆盖" in capsys.readouterr().err
    assert [path.name for path in (root / "mine").iterdir()] == ["thesis.txt"]
    for _ in range(2):  # 自己造的可以覆盖
        assert build_site.main(["--out", str(root / "site")], root) == 0
    assert not list(root.glob(".site-*"))


def test_without_mini_racer_the_rest_is_still_built(course, capsys, monkeypatch):
    root = course(text(r"$\frac{1}{$"))
    monkeypatch.setattr(build_site.importlib.util, "find_spec", lambda name: None)
    assert build_site.main(["--out", str(root / "site")], root) == 0
    assert "没有 mini-racer，公式没有检查" in capsys.readouterr().out
    assert (root / "site/index.html").is_file()


def test_without_a_browser_there_is_one_sentence_and_no_site(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build_site, "chrome", lambda: None)
    assert build_site.main(["--pdf", "--out", str(tmp_path / "site")]) == 1
    assert "造 PDF 要 Chrome 或 Chromium" in capsys.readouterr().err and not (tmp_path / "site").exists()


def test_a_missing_package_is_one_sentence():
    code = "import runpy, sys; sys.modules['markdown_it'] = None; runpy.run_path('tools/build_site.py', run_name='__main__')"
    environment = {**os.environ, "PYTHONPATH": "tools", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", code], cwd=build_site.ROOT, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 1 and done.stderr.strip() == '造网站缺 markdown_it 这个包；请运行 uv pip install -e ".[site]"。'
