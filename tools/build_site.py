"""把全部课程做成静态的网站：离线，不执行任何一格，输出照存着的；页面不从外面载入任何东西。

用法：
  python tools/build_site.py               造在 site/ 里；双击 site/index.html 就能读
  python tools/build_site.py --out 文件夹  造在别处；只肯覆盖空的文件夹与它自己造的
  python tools/build_site.py --check       只检查，什么也不留下
  python tools/build_site.py --pdf         每一章另有一份 PDF，由 Chrome 或 Chromium 打印，要有中文字体

每一章一页，解答折叠在练习之后；笔记、术语表、README 之间的链接换成站里的页，提到的源文件各有一页。
公式由 tools/site_assets/katex 在浏览器里画（版本见那里的 VERSION），搜索由 tools/site_assets/find.js 在浏览器里找全文。
没有执行的单元、解析不了的公式、通向不存在之处的链接、显示不出的字符、没有描述的图：不造，退出码 1，一处一句话。
没有 mini-racer 就不检查公式，说一句话，其余照造；node、网络用不着，浏览器只有 --pdf 才用。
"""

from __future__ import annotations

import argparse
import html
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

import stamp

try:
    import jinja2
    from site_text import EQUATION, EXERCISE, Page, Where, Writer, code_block, readable
except ImportError as error:
    if __name__ != "__main__":
        raise
    raise SystemExit(f'造网站缺 {error.name} 这个包；请运行 uv pip install -e ".[site]"。') from None

ROOT = stamp.ROOT
ASSETS = Path(__file__).parent / "site_assets"
MARK = ".vae-site"  # 站的根里有它，才是这里造的，下次可以覆盖
LARGE = 150  # 像素；首页的卡片取一章里第一张有这么高的图
LANGUAGES = {".py": "python", ".toml": "toml", ".yml": "yaml", ".cff": "yaml", "": ""}  # 做成源文件页的；别的文件原样带上
STRICT = "code => code === 'unknownSymbol' ? 'error' : 'ignore'"  # 中文写在公式里不算错，字体里没有的符号算


class SiteError(Exception):
    """课程里有毛病，站没有造；信息给人看。"""


class Site:
    """由仓库 ``root`` 造出的全部页；:meth:`write` 写进文件夹。"""

    def __init__(self, root: Path = ROOT, pdf: bool = False) -> None:
        self.root, self.pdf = root, pdf = root.resolve(), pdf
        self.chapters = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
        self.pages: dict[str, Page] = {}
        self.copies: dict[str, Path] = {}  # 站里的地址 → 原样带上的文件
        self.waiting: list[tuple[str, Path]] = []  # 有链接指向、还没有造的页
        self.anchors: list[tuple[Where, str, str]] = []  # 链接要的锚点，等全部页造好再查
        self.cards: list[dict] = []
        numbers = {n: f"{path.stem}.html" for path in self.chapters for n in EQUATION.findall(path.read_text(encoding="utf-8", errors="replace"))}
        self.writer = Writer(self.link, numbers)
        self.has_explorer = (root / "tools/explorer/index.html").is_file()
        try:
            self.address = stamp.current_address(root)
        except stamp.StampError as error:
            raise SiteError(str(error)) from None
        except (ValueError, KeyError, TypeError):  # 有一本读不出，造那一页时会说是哪一本
            self.address = ""

    # ------------------------------------------------------------ 链接

    def link(self, target: str, where: Where) -> str:
        """仓库里的地址换成站里的；外面的地址照旧，哪里也不通向的记成毛病。"""
        if re.match(r"[a-z][a-z0-9+.-]*:|//", target):
            return target
        path, _, fragment = unquote(target).partition("#")
        file = (where.file.parent / path).resolve() if path else where.file
        if not file.is_file() or not file.is_relative_to(self.root):
            self.writer.problem(where, f"链接 {target} 通向不存在的地方。")
            return "#"
        page, anchor = self._page_of(file)
        fragment = fragment or anchor
        if fragment:
            self.anchors.append((where, page, fragment))
        away = "" if page == where.page and fragment else "../" * where.page.count("/") + page
        return away + (f"#{fragment}" if fragment else "")

    def _page_of(self, file: Path) -> tuple[str, str]:
        """仓库里的文件 ``file`` 在站里的页与锚点；还没有的排队去造。"""
        relative = file.relative_to(self.root)
        if file.suffix == ".ipynb" and any(file.name == path.name for path in self.chapters):
            return f"{file.stem}.html", "solutions" if file.parent.name == "solutions" else ""
        if file.suffix == ".md":
            page = f"{file.stem}.html" if file.parent.name == "notebooks" else relative.with_suffix(".html").as_posix()
        elif file.suffix in LANGUAGES:
            page = f"source/{relative.as_posix()}.html"
        else:
            self.copies[f"files/{relative.as_posix()}"] = file
            return f"files/{relative.as_posix()}", ""
        if page not in self.pages and (page, file) not in self.waiting:
            self.waiting.append((page, file))
        return page, ""

    # ------------------------------------------------------------ 各种页

    def build(self) -> None:
        """造出全部页，留在内存里。

        Raises:
            SiteError: 课程里有毛病；一处一行。
        """
        if not self.chapters:
            raise SiteError(f"{self.root / 'notebooks'} 里没有 NN_*.ipynb 这样的笔记。")
        for path in self.chapters:
            self._chapter(path)
        for name in ("notebooks/glossary.md", "README.md"):
            if (self.root / name).is_file():
                self._page_of(self.root / name)
        while self.waiting:
            page, file = self.waiting.pop(0)
            self.pages[page] = Page(page)
            self._document(self.pages[page], file)
        for where, page, fragment in self.anchors:
            if page not in self.pages or fragment not in self.pages[page].ids:
                self.writer.problem(where, f"链接通向 {page} 的 #{fragment}，那一页没有这个锚点。")
        self.writer.problems += check_formulas(self.writer.formulas)
        if self.writer.problems:
            raise SiteError("\n".join(dict.fromkeys(self.writer.problems)))

    def _document(self, page: Page, file: Path) -> None:
        """一页 Markdown，或一个源文件。"""
        text = file.read_text(encoding="utf-8", errors="replace")
        relative = file.relative_to(self.root).as_posix()
        where = Where(file, page.address, self.root)
        if file.suffix == ".md":
            found = re.search(r"^# (.*)", text, re.MULTILINE)
            page.title = html.escape(readable(found[1])) if found else relative
            page.body = self.writer.markdown(stamp.BADGE.sub("", text), where, page)
        else:
            page.title = relative
            page.body = f"<h1>{html.escape(relative)}</h1>\n{code_block(text, LANGUAGES[file.suffix])}"

    def _chapter(self, path: Path) -> None:
        """一章：各格按次序写下，每道练习之后是折叠的解答。"""
        page = self.pages[f"{path.stem}.html"] = Page(f"{path.stem}.html", title=path.stem)
        solutions = self._solutions(path.parent / "solutions" / path.name, page)
        parts, heading, exercise = [], "", ""
        opening = True  # 标题之后、第一段话之前：准备与导入，折起来
        for where, cell in self.writer.cells(path, page.address, self.root):
            source = cell["source"]
            opening = opening and (where.cell == 0 or cell["cell_type"] == "code")
            if cell["cell_type"] != "markdown":
                if opening and not cell["outputs"]:
                    cell["metadata"] = {**cell["metadata"], **stamp.FOLDED}
                parts.append(self.writer.code(cell, where, heading) if cell["cell_type"] == "code" else "")
                continue
            found = EXERCISE.match(source) or re.search(r"^\*\*练习 (\d+\.\d+)", source, re.MULTILINE)
            if exercise and (found or re.match(r"##+ ", source)):
                parts.append(solutions.pop(exercise, ""))
                exercise = ""
            if found:
                exercise = found[1]
                if exercise not in solutions:
                    self.writer.problem(where, f"练习 {exercise} 没有解答，应在 solutions/{path.name} 里有“## 练习 {exercise}”。")
            if titles := re.findall(r"^#+ (.*)", source, re.MULTILINE):
                heading = readable(titles[-1])
            parts.append(self.writer.markdown(stamp.BADGE.sub("", source), where, page))
            if where.cell == 0:
                page.title = html.escape(readable(titles[0])) if titles else path.stem
                self.cards.append(self._card(path, source, where))
                parts.append(self._actions(path))
        parts.append(solutions.pop(exercise, ""))
        for number in solutions:
            self.writer.problem(f"notebooks/solutions/{path.name}", f"有练习 {number} 的解答，{path.name} 里没有这道练习。")
        page.body = "".join(parts)

    def _solutions(self, path: Path, page: Page) -> dict[str, str]:
        """解答笔记里，每道练习的折叠块；题号 → HTML。"""
        found: dict[str, str] = {}
        number = ""
        for where, cell in self.writer.cells(path, page.address, self.root) if path.is_file() else []:
            source = cell["source"]
            if cell["cell_type"] == "markdown":
                if title := re.match(r"## 练习 (\d+\.\d+).*\n*", source):
                    number, source = title[1], source[title.end() :]
                    found[number] = ""
                if number:
                    found[number] += self.writer.markdown(source, where, page, deeper=1)
            elif number:
                found[number] += self.writer.code(cell, where, f"练习 {number} 的解答")
        page.ids |= {f"solution-{each}" for each in found} | ({"solutions"} if found else set())
        first = next(iter(found), "")
        return {
            each: ('<span id="solutions"></span>' if each == first else "")
            + f'<details class="solution" id="solution-{each}"><summary>练习 {each} 的解答</summary>\n{body}</details>\n'
            for each, body in found.items()
        }

    def _card(self, path: Path, source: str, where: Where) -> dict:
        """首页上的一张卡片：标题、承诺、用时；主图等各格写完再取。"""
        paragraphs = stamp.BADGE.sub("", source).split("\n\n")
        title, promise = (self.writer.md.renderInline(each, {"where": where}) for each in [*paragraphs, "", ""][:2])
        minutes = re.search(r"\| 用时 \|.*?(\d+ 分钟)", source)
        return {
            "number": path.name[:2],
            "title": re.sub(r"^# (\d\d )?", "", title).strip(),
            "page": where.page,
            "promise": re.sub(r"</?a\b[^>]*>", "", promise),
            "minutes": minutes[1] if minutes else "",
        }

    def _actions(self, path: Path) -> str:
        """标题下面：下载笔记与解答，在 Colab 打开（笔记里写着地址时），08 章还有探索器。"""
        links = []
        for file, words in ((path, "下载笔记"), (path.parent / "solutions" / path.name, "下载解答")):
            if file.is_file():
                address = file.relative_to(self.root).as_posix()
                self.copies[address] = file
                links.append(f'<a href="{address}" download>{words}</a>')
        if self.pdf:
            links.append(f'<a href="pdf/{path.stem}.pdf" download>下载 PDF</a>')
        if colab := re.search(r"\]\(([^()]*)\)$", stamp.badge(self.address, path.relative_to(self.root).as_posix())):
            links.insert(0, f'<a href="{html.escape(colab[1])}">在 Colab 打开</a>')
        if self.has_explorer and path.name.startswith("08_"):
            links.append('<a href="explorer/index.html">打开探索器：拖一拖旋钮</a>')
        return f'<p class="actions">{"".join(links)}</p>\n'

    def _home(self) -> dict:
        """首页的内容：README 的标题、第一张图与第一段，各章的卡片。"""
        where = Where(self.root / "README.md", "index.html", self.root)
        text = where.file.read_text(encoding="utf-8") if where.file.is_file() else ""
        blocks = [block for block in stamp.BADGE.sub("", text).split("\n\n") if block.strip()]
        picture = next((block for block in blocks if block.startswith("![")), "")
        lead = next((block for block in blocks[1:] if re.match(r"\w", block)), "")
        page = Page("index.html")
        for card in self.cards:
            pictures = list(re.finditer(r'<img src="images/[^"]*" width="\d+" height="(\d+)"[^>]*>', self.pages[card["page"]].body))
            large = [each for each in pictures if int(each[1]) >= LARGE] or pictures  # 00 章的头一张只是试字体
            card["picture"] = large[0][0] if large else ""
        return {
            "title": blocks[0].removeprefix("# ") if blocks else "课程",
            "picture": self.writer.markdown(picture, where, page).replace(' loading="lazy"', ""),
            "lead": self.writer.markdown(lead, where, page),
            "cards": self.cards,
        }

    # ------------------------------------------------------------ 写下

    def write(self, out: Path) -> list[str]:
        """写进空的文件夹 ``out``；返回没有做到的事，一件一句话。"""
        templates = jinja2.Environment(loader=jinja2.FileSystemLoader(ASSETS), autoescape=False, trim_blocks=True, lstrip_blocks=True)
        home = self._home()
        chapters = [(card["page"], card["number"], card["title"]) for card in self.cards]
        shared = {
            "chapters": chapters,
            "site": home["title"].split("：")[0],
            "glossary": "glossary.html" in self.pages,
            "readme": "README.html" in self.pages,
            "explorer": self.has_explorer,
        }
        addresses = [address for address, *_ in chapters]
        texts = {"index.html": templates.get_template("home.html").render(shared, page=Page("index.html", title=home["title"]), home=home)}
        for address, page in self.pages.items():
            here = addresses.index(address) if address in addresses else None
            near = {} if here is None else {"previous": (chapters[:here] or [None])[-1], "next": (chapters[here + 1 :] or [None])[0]}
            texts[address] = templates.get_template("page.html").render(shared, page=page, **near)
        for address, text in texts.items():
            stamp_file(out / address, text.encode("utf-8"))
        for address, data in self.writer.pictures.items():
            stamp_file(out / address, data)
        for address, file in self.copies.items():
            stamp_file(out / address, file.read_bytes())
        for name in ("style.css", "site.js"):
            shutil.copy(ASSETS / name, out)
        shutil.copytree(ASSETS / "katex", out / "katex")
        if self.has_explorer:
            add_explorer(self.root, out / "explorer")
        index = [[page.address, html.unescape(page.title), *text] for page in self.pages.values() for text in page.texts]
        find = (ASSETS / "find.js").read_text(encoding="utf-8")
        stamp_file(out / "search.js", f"{find}\nconst INDEX = {json.dumps(index, ensure_ascii=False)};\n".encode())
        stamp_file(out / MARK, b"")
        return [] if importlib.util.find_spec("py_mini_racer") else ["没有 mini-racer，公式没有检查；装上它：uv pip install mini-racer。"]


def stamp_file(path: Path, data: bytes) -> None:
    """写一个文件，需要的文件夹一并建好。"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def add_explorer(root: Path, folder: Path) -> None:
    """探索器放进 ``folder``：由 tools/explorer.py 拼成双击就能看的文件夹；没有那个程序，就把页面与数据原样拷来。

    Raises:
        SiteError: tools/explorer.py 没有拼成。
    """
    program = root / "tools/explorer.py"
    if program.is_file():
        run = subprocess.run([sys.executable, str(program), "--assemble", str(folder)], capture_output=True, encoding="utf-8", errors="replace")
        if run.returncode:
            raise SiteError(f"探索器没有拼成：{(run.stderr.strip() or '没有说为什么').splitlines()[-1]}")
        return
    for source in (root / "tools/explorer", root / "photos/explorer"):
        if source.is_dir():
            shutil.copytree(source, folder, dirs_exist_ok=True)


def check_formulas(formulas: Sequence[tuple[Where, str, bool]]) -> list[str]:
    """用 KaTeX 解析每一个公式；解析不了的，一个一句话。没有 mini-racer 就都算通过。"""
    if not importlib.util.find_spec("py_mini_racer"):
        return []
    from py_mini_racer import MiniRacer

    engine = MiniRacer()
    engine.eval((ASSETS / "katex/katex.min.js").read_text(encoding="utf-8"))
    engine.eval(
        "function check(tex, displayMode) { try { katex.renderToString(tex, {displayMode, throwOnError: true, strict: "
        + STRICT
        + "}); return '' } catch (error) { return String(error.message) } }"
    )
    found = ((where, tex, engine.call("check", tex, display)) for where, tex, display in formulas)
    return [f"{where}：公式解析不了：{' '.join(tex.split())[:80]}（KaTeX：{why[:120]}）" for where, tex, why in found if why]


def chrome() -> str | None:
    """系统里的 Chrome 或 Chromium，没有则为空。"""
    usual = ("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome", r"C:\Program Files\Google\Chrome\Application\chrome.exe")
    found = map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))
    return next(filter(None, [*found, *filter(os.path.isfile, usual)]), None)


def has_chinese_font() -> bool:
    """浏览器画得出中文：Linux 上问 fontconfig，别的系统都带着中文字体。"""
    if not shutil.which("fc-list"):
        return True
    return bool(subprocess.run(["fc-list", ":lang=zh", "family"], capture_output=True).stdout.strip())


def print_pdf(page: Path, target: Path) -> None:
    """用浏览器把造好的一页 ``page`` 打印成 PDF。

    Raises:
        SiteError: 没有浏览器，没有中文字体，或浏览器没有打印成。
    """
    program = chrome()
    if not program:
        raise SiteError("造 PDF 要 Chrome 或 Chromium，这台机器上没有找到；去掉 --pdf，其余都造得成。")
    if not has_chinese_font():
        raise SiteError("这台机器上没有中文字体，PDF 里的字会成为方框；装上一种（例如 Debian 的 fonts-noto-cjk），或去掉 --pdf。")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, "--headless=new", "--disable-gpu", f"--user-data-dir={profile}", "--no-pdf-header-footer", "--virtual-time-budget=30000"]
        command += ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        run = subprocess.run([*command, f"--print-to-pdf={target}", page.resolve().as_uri()], capture_output=True, encoding="utf-8", errors="replace")
    if not target.is_file() or target.read_bytes()[:4] != b"%PDF":
        raise SiteError(f"{page.name} 没有打印成 PDF：{(run.stderr.strip() or '浏览器没有说为什么').splitlines()[-1]}")


def build(out: Path | None, root: Path = ROOT, pdf: bool = False) -> tuple[Site, list[str]]:
    """造站；``out`` 为空就只检查，``pdf`` 则每一章另有一份 PDF。返回站与没有做到的事。

    Raises:
        SiteError: 课程里有毛病，或 ``out`` 里有别的东西；原来的文件夹不动。
    """
    if out and out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARK).is_file())):
        raise SiteError(f"{out} 里有别的东西，不覆盖；请用 --out 换一个空的文件夹。")
    site = Site(root, pdf)
    site.build()
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out and out.parent, prefix=".site-") as scratch:
        fresh = Path(scratch) / "site"
        fresh.mkdir()
        missing = site.write(fresh)
        for path in site.chapters if pdf else []:
            print_pdf(fresh / f"{path.stem}.html", fresh / f"pdf/{path.stem}.pdf")
        if out:
            if out.exists():
                shutil.rmtree(out)
            os.replace(fresh, out)
    return site, missing


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """命令行；返回退出码。"""
    stamp.speak_utf8()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=root / "site", help="造在哪里")
    parser.add_argument("--check", action="store_true", help="只检查，什么也不留下")
    parser.add_argument("--pdf", action="store_true", help="每一章另造一份 PDF")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    try:
        site, missing = build(None if options.check else options.out.resolve(), root, options.pdf and not options.check)
    except (SiteError, OSError) as error:
        problems = str(error).splitlines()
        print("\n".join(f"✗ {each}" for each in problems), file=sys.stderr)
        print("站没有造。格从 0 数，Markdown 与代码一起数。", file=sys.stderr)
        return 1
    for each in missing:
        print(f"○ {each}")
    print(f"✓ {len(site.pages) + 1} 页，{len(site.writer.formulas)} 个公式，{time.perf_counter() - started:.0f} 秒", end="")
    print("；只检查，没有留下什么" if options.check else f"，在 {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
