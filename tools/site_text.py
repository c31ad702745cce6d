"""Markdown 与笔记的单元变成 HTML；课程网站（tools/build_site.py）用的。

不执行任何一格。路上看见的毛病（解析不了的公式、没有描述的图、没有执行的单元……）记下来，不当场停：一次说全。
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin
from PIL import Image
from pygments.lexers import TextLexer, get_lexer_by_name
from pygments.token import Comment, Keyword, Name, Number, Operator, String
from pygments.util import ClassNotFound

LONG = 20  # 文字输出多于这么多行就折叠
EQUATION = re.compile(r"\\tag\{(\d+\.\d+)\}")
REFERENCE = re.compile(r"式 ?\((\d+\.\d+)\)")
EXERCISE = re.compile(r"\*\*练习 (\d+\.\d+)")
CHINESE = re.compile("[\u3000-\u30ff\u4e00-\u9fff\uff00-\uffef“”‘’—…]")
VERDICTS = {"✓": "yes", "✗": "no", "○": "open"}
COLOURS = {Keyword: "k", Operator.Word: "k", String: "s", Number: "m", Comment: "c", Name.Function: "f", Name.Class: "f", Name.Decorator: "f"}
SIGNS = dict(lVert="‖", rVert="‖", parallel="‖", mid="|", vert="|", sum="Σ", prod="Π", int="∫", cdot="·", times="×", approx="≈", le="≤", ge="≥")
SIGNS |= dict(to="→", mapsto="→", infty="∞", partial="∂", nabla="∇", odot="⊙", sim="~", pm="±", ne="≠", ell="ℓ", propto="∝", sqrt="√", ll="≪", gg="≫")
PICTURES = {"image/png": "png", "image/jpeg": "jpg", "image/gif": "gif"}


@dataclass(frozen=True)
class Where:
    """一段文字在哪里：源文件、第几格（Markdown 文件没有），以及它出现在站里的哪一页。"""

    file: Path
    page: str
    root: Path
    cell: int | None = None

    def __str__(self) -> str:
        name = self.file.relative_to(self.root).as_posix()
        return name if self.cell is None else f"{name} 第 {self.cell} 格"


@dataclass
class Page:
    """站里的一页：地址（相对站的根）、标题、正文，与正文里的锚点、小节。"""

    address: str
    title: str = ""
    body: str = ""
    ids: set[str] = field(default_factory=set)
    sections: list[tuple[str, str]] = field(default_factory=list)  # (锚点, HTML)，只有二级标题
    texts: list[list[str]] = field(default_factory=list)  # 搜索用：[锚点, 小节的标题, 文字]，每个标题起一节

    @property
    def root(self) -> str:
        """从这一页回到站的根。"""
        return "../" * self.address.count("/")


def plain(token: Token) -> str:
    """一行 Markdown 的文字，不带记号与公式的 $。"""
    said = {"text": str, "code_inline": str, "math_inline": spoken}
    return "".join(said[child.type](child.content) for child in token.children or [] if child.type in said)


def readable(line: str) -> str:
    """一行 Markdown 去掉记号，公式换成读得出的字。"""
    return re.sub(r"[`*]", "", re.sub(r"\$([^$]*)\$", lambda found: spoken(found[1]), line))


def spoken(tex: str) -> str:
    """公式里读得出的部分，给搜索的摘要用：希腊字母与常用的记号换成字，log、exp 之类留着，别的命令与括号去掉。"""

    def letter(found: re.Match) -> str:
        name = found[1].removeprefix("var")
        if name in SIGNS:
            return SIGNS[name]
        if name in ("log", "exp", "det", "min", "max", "arg"):
            return f"{name} "
        try:
            return unicodedata.lookup(f"GREEK {'CAPITAL' if name[0].isupper() else 'SMALL'} LETTER {name}")
        except KeyError:
            return ""

    return " ".join(re.sub(r"[{}$&\\]", "", re.sub(r"\\([A-Za-z]+)", letter, tex)).split())


def strange(text: str) -> str:
    """文字里显示不出的第一个字符：替代字符、落单的代理项、私用区；没有则为空。"""
    found = re.search("[\ufffc\ufffd\ud800-\udfff\ue000-\uf8ff]", text)
    return f"U+{ord(found[0]):04X}" if found else ""


def opened(data: bytes) -> tuple[int, int, str] | None:
    """图的宽、高与它带着的来历（vaelab/provenance.py 写的，没有则为空）；读不出则没有。"""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return *image.size, image.info.get("vaelab", "")
    except (OSError, ValueError, SyntaxError):  # 坏的 PNG，Pillow 有时报 SyntaxError
        return None


def code_block(source: str, language: str = "python") -> str:
    """高亮的一段代码；不认得的语言原样显示。只给有颜色的词加 <span>：每个词都加，页面大一倍。"""
    try:
        lexer = get_lexer_by_name(language, stripnl=False) if language else TextLexer()
    except ClassNotFound:
        lexer = TextLexer()
    parts = []
    for kind, word in lexer.get_tokens(source):
        colour = next((name for group, name in COLOURS.items() if kind in group), "")
        text = html.escape(word, quote=False)
        parts.append(f'<span class="{colour}">{text}</span>' if colour else text)
    return f'<pre class="code scroll"><code>{"".join(parts).rstrip()}</code></pre>\n'


class Writer:
    """把 Markdown 与单元写成 HTML。

    ``link(地址, 在哪里)`` 把仓库里的地址换成站里的；``pictures`` 收下输出里的图，``formulas`` 收下公式，等着一并检查。
    """

    def __init__(self, link: Callable[[str, Where], str], equations: dict[str, str]) -> None:
        self.link, self.equations = link, equations  # equations：式号 → 它所在的页
        self.problems: list[str] = []
        self.formulas: list[tuple[Where, str, bool]] = []
        self.pictures: dict[str, bytes] = {}
        options = {"html": True, "highlight": lambda source, language, _: code_block(source, language)}
        self.md = MarkdownIt("commonmark", options).enable(["table", "strikethrough"])
        self.md.use(dollarmath_plugin, allow_labels=False, double_inline=True)
        for kind in ("math_inline", "math_inline_double", "math_block"):
            self.md.renderer.rules[kind] = self._formula
        self.md.renderer.rules["table_open"] = lambda *_: '<div class="scroll"><table>\n'
        self.md.renderer.rules["table_close"] = lambda *_: "</table></div>\n"

    def problem(self, where: Where | str, what: str) -> None:
        """记下一处毛病。"""
        self.problems.append(f"{where}：{what}")

    def markdown(self, text: str, where: Where, page: Page, deeper: int = 0) -> str:
        """一段 Markdown 的 HTML；``deeper`` 把标题降几级（放进折叠里的解答）。"""
        env = {"where": where}
        tokens = self.md.parse(text, env)
        if code := strange(text):
            self.problem(where, f"有一个显示不出的字符 {code}，请改成想写的字。")
        for before, token in zip([None, *tokens], tokens):
            if token.type == "inline":
                self._opened(before, token, page, deeper, env)
                if page.texts and not deeper and before and before.type != "heading_open":  # 解答不进搜索：先自己做
                    page.texts[-1][2] += " " * bool(page.texts[-1][2]) + plain(token)
                token.children = self._inline(token.children or [], where)
            elif token.type == "math_block":
                page.ids.update(f"eq-{number}" for number in EQUATION.findall(token.content))
            elif token.type == "html_block":
                token.content = self._raw(token.content, where)
            if deeper and token.type.startswith("heading_"):
                token.tag = f"h{min(int(token.tag[1]) + deeper, 6)}"
        return self.md.renderer.render(tokens, self.md.options, env)

    def _opened(self, opening: Token | None, inline: Token, page: Page, deeper: int, env: dict) -> None:
        """给标题一个锚点，给“先猜再跑”与练习的段落一个类名。"""
        if opening is None:
            return
        if opening.type == "heading_open":
            words = plain(inline)
            base = re.sub(r"[^\w\- ]", "", words.lower()).strip().replace(" ", "-") or "section"  # 与 GitHub 的一样，那里的链接这里也通
            slug = next(slug for slug in (base, *(f"{base}-{count}" for count in range(1, 999))) if slug not in page.ids)
            page.ids.add(slug)
            opening.attrSet("id", slug)
            if opening.tag == "h2" and not deeper:
                page.sections.append((slug, self.md.renderer.render([inline], self.md.options, env)))
            if not deeper:
                page.texts.append([slug, words, ""] if opening.tag != "h1" else ["", "", ""])
        elif opening.type == "paragraph_open" and inline.content.startswith("**先猜再跑"):
            opening.attrSet("class", "guess")
        elif opening.type == "paragraph_open" and (found := EXERCISE.match(inline.content)) and not deeper:
            page.ids.add(f"exercise-{found[1]}")
            opening.attrSet("class", "exercise")
            opening.attrSet("id", f"exercise-{found[1]}")

    def _inline(self, children: list[Token], where: Where) -> list[Token]:
        """换链接，查图的描述，把“式(5.3)”连到公式。"""
        kept, in_link = [], False
        for index, token in enumerate(children):
            if token.type == "softbreak" and any(
                near.content and CHINESE.match(near.content[edge]) for near, edge in ((children[index - 1], -1), (children[index + 1], 0))
            ):
                continue  # 中文之间换行，不要变成空格
            if token.type == "text" and "**" in token.content:
                self.problem(where, f"粗体没有成：{token.content.strip()[:30]}，记号与标点挨着时，在外侧空一格。")
            if token.type == "link_open":
                in_link = True
                token.attrSet("href", self.link(str(token.attrGet("href") or ""), where))
            elif token.type == "link_close":
                in_link = False
            elif token.type == "image":
                self._image(token, where)
            elif token.type == "html_inline":
                token.content = self._raw(token.content, where)
            elif token.type == "text" and not in_link and REFERENCE.search(token.content):
                text = REFERENCE.sub(lambda found: self._reference(found, where), html.escape(token.content, quote=False))
                token = Token("html_inline", "", 0, content=text)
            kept.append(token)
        return kept

    def _reference(self, found: re.Match, where: Where) -> str:
        """“式(5.3)”变成到公式的链接。"""
        page = self.equations.get(found[1])
        if page is None:
            self.problem(where, f"提到式({found[1]})，课程里没有这个编号的公式。")
            return found[0]
        target = "" if page == where.page else "../" * where.page.count("/") + page
        return f'<a class="eq" href="{target}#eq-{found[1]}">{found[0]}</a>'

    def _image(self, token: Token, where: Where) -> None:
        """Markdown 的图：要有描述，要在仓库里；写上宽高，看到时再载入。"""
        source = str(token.attrGet("src") or "")
        if not token.content.strip():
            self.problem(where, f"图 {source} 没有描述，请在方括号里写一句它画了什么。")
        if re.match(r"[a-z]+:|//", source):
            self.problem(where, f"图 {source} 不在仓库里；站里不从外面载入东西。")
            return
        token.attrSet("src", self.link(source, where))
        file = where.file.parent / unquote(source)
        if shape := opened(file.read_bytes()) if file.is_file() else None:  # 矢量图没有
            token.attrSet("width", shape[0])
            token.attrSet("height", shape[1])
        token.attrSet("loading", "lazy")

    def _raw(self, text: str, where: Where) -> str:
        """原样的 HTML：注释去掉；链接与图不许这样写，它们换不成站里的地址。"""
        text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
        if re.search(r"<(img|script|style|iframe|link)\b|\b(src|href)\s*=", text, re.IGNORECASE):
            self.problem(where, f"写着原样的 HTML（{text.strip()[:40]}），链接与图请用 Markdown 写。")
        return text

    def _formula(self, tokens: list[Token], index: int, _options: object, env: dict) -> str:
        """公式留着 TeX，由站里的 KaTeX 在浏览器里画；有编号的带上锚点。"""
        token = tokens[index]
        display = token.type != "math_inline"
        self.formulas.append((env["where"], token.content, display))
        tex = html.escape(token.content.strip(), quote=False)
        if not display:
            return f'<span class="math">{tex}</span>'
        anchors = "".join(f' id="eq-{number}"' for number in EQUATION.findall(token.content)[:1])
        tag = "div" if token.type == "math_block" else "span"
        return f'<{tag} class="math display scroll"{anchors}>{tex}</{tag}>\n'

    # ------------------------------------------------------------ 笔记的单元

    def cells(self, file: Path, page: str, root: Path) -> list[tuple[Where, dict]]:
        """一本笔记的各格；没有执行过的代码记成毛病。"""
        try:
            book = json.loads(file.read_text(encoding="utf-8"))
            cells = [(Where(file, page, root, index), {**cell, "source": "".join(cell["source"])}) for index, cell in enumerate(book["cells"])]
        except (ValueError, KeyError, TypeError):
            self.problem(Where(file, page, root), "不是一本读得出的笔记。")
            return []
        for where, cell in cells:
            if cell["cell_type"] == "code" and cell["source"].strip() and cell.get("execution_count") is None:
                self.problem(where, "没有执行过；请先用 tools/chapter.py run 执行，存好输出。")
        return cells

    def code(self, cell: dict, where: Where, heading: str) -> str:
        """一格代码与它的输出；折起源码的单元在这里也折着。"""
        if code := strange(cell["source"]):
            self.problem(where, f"代码里有一个显示不出的字符 {code}，请写成转义。")
        block = code_block(cell["source"])
        if cell["metadata"].get("jupyter", {}).get("source_hidden"):
            first = re.match(r"# ?@title ?(.*)", cell["source"])
            title = first[1] if first else "准备：导入"
            block = f'<details class="setup"><summary>{html.escape(title)}</summary>\n{block}</details>\n'
        outputs = "".join(self._output(each, where, f"{where.cell}-{number}", heading) for number, each in enumerate(cell.get("outputs", [])))
        return f'<div class="cell">\n{block}{outputs}</div>\n'

    def _output(self, output: dict, where: Where, name: str, heading: str) -> str:
        """一个输出：图、HTML 或文字，取最丰富的一种。"""
        data = output.get("data", {})
        if kind := next((kind for kind in PICTURES if kind in data), None):
            return self._picture(base64.b64decode("".join(data[kind])), PICTURES[kind], where, name, heading)
        if "text/html" in data:
            return f'<div class="html scroll">{self._embedded("".join(data["text/html"]), where, name)}</div>\n'
        text = "".join(output.get("text", data.get("text/plain", [line + "\n" for line in output.get("traceback", [])])))
        text = re.sub(r"\x1b\[[0-9;]*m", "", text).rstrip("\n")
        if found := re.search(r"Glyph \d+.*missing", text):
            self.problem(where, f"输出里有缺字的警告：{found[0]}。")
        if code := strange(text):
            self.problem(where, f"输出里有一个显示不出的字符 {code}。")
        lines = [
            f'<span class="{VERDICTS[line[0]]}">{html.escape(line)}</span>' if line[:1] in VERDICTS else html.escape(line)
            for line in text.split("\n")
        ]
        block = '<pre class="output scroll">{}</pre>\n'.format("\n".join(lines))
        return f"<details><summary>输出，共 {len(lines)} 行</summary>\n{block}</details>\n" if len(lines) > LONG else block

    def _picture(self, data: bytes, suffix: str, where: Where, name: str, heading: str) -> str:
        """输出的图存成单独的文件；描述由最近的标题与图上的文字造出。"""
        shape = opened(data)
        if shape is None:
            self.problem(where, "输出里有一张读不出的图；请重新执行这本笔记。")
            return ""
        width, height, label = shape
        try:
            words = json.loads(label)["words"] if label else []
        except (ValueError, KeyError):
            words = []
        seen = dict.fromkeys(word.replace("#", "…").strip() for word in words if "$" not in word)
        said = "、".join([word for word in seen if re.search(r"\w", word)][:8])
        alt = "；图上写着：".join(part for part in (heading, said) if part)
        if not alt:
            self.problem(where, "这张图前面没有标题，图上也没有文字，造不出描述；请在前面加一个标题。")
        source = self._saved(data, f"{name}.{suffix}", where)
        size = f'width="{width}" height="{height}"'
        return f'<figure><img src="{source}" {size} alt="{html.escape(alt)}" loading="lazy" decoding="async"></figure>\n'

    def _saved(self, data: bytes, name: str, where: Where, kind: str = "") -> str:
        """收下一张图，返回由页面到它的地址。"""
        folder = "solutions-" if where.file.parent.name == "solutions" else ""
        address = f"images/{kind}{folder}{where.file.stem}-{name}"
        self.pictures[address] = data
        return "../" * where.page.count("/") + address

    def _embedded(self, text: str, where: Where, name: str) -> str:
        """HTML 的输出：嵌在里面的图也存成单独的文件，页面才不会太大；图要有描述，不许从外面载入。"""
        for tag in re.findall(r"<img\b[^>]*>", text):
            if not re.search(r"""\balt=["']?[^"'\s>]""", tag):
                self.problem(where, "输出的 HTML 里有一张没有描述的图，请写上 alt。")
        if re.search(r"""(src|srcset)=["']?(https?:)?//|url\(["']?(https?:)?//""", text):
            self.problem(where, "输出的 HTML 从外面载入东西；站里不许。")

        def saved(found: re.Match) -> str:
            return self._saved(base64.b64decode(found[2]), f"{name}-{len(self.pictures)}.{found[1]}", where, "html-")

        return re.sub(r"data:image/(png|webp|gif|jpeg);base64,([A-Za-z0-9+/=]+)", saved, text)
