"""笔记作为文档：不运行，只看存着的内容。每条规则是一个函数，返回抱怨的话；每条规则都有一本故意写坏的笔记让它开口。

运行笔记并比较输出的是 ``pytest --nbval notebooks``；它看不见的由 figures_plugin.py 补上。
"""

import ast
import base64
import inspect
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import nbformat
import pytest
from matplotlib.figure import Figure
from sanitizer import shows_a_still_picture
from stamp import FOLDED, KERNELSPEC, LANGUAGE_INFO, MARK, ROOT, cell, changes, current_address, notebooks

import vanilla_vae
from vaelab import evaluate, images, plan, provenance, step, stepper, train
from vaelab.exercises.judging import all_checks

CHECKS = all_checks()
CHINESE = r"[\u4e00-\u9fff]"
UNCHECKED = {"nbval-ignore-output", "nbval-skip"}
MIME_TYPES = {"text/plain", "text/latex", "text/markdown", "image/png", "application/vnd.jupyter.widget-view+json"}
CLOSING = ["## 常见错误", "## 练习", "## 小结", "## 回到 vanilla_vae.py", "## 参考文献"]
ABSOLUTE_PATH = r"(?<![\w.~/:-])/(?:home|root|tmp|content|Users|work|mnt|var|usr|opt)/|\b[A-Za-z]:\\+\w"
TIMING = r"\d\.\d+\s*s\b|\d\s*(?:ms|µs|μs|ns)\b|\d\s*(?:秒|分钟)|per loop|seconds?\b|it/s|s/it|Wall time|CPU times|\d+%\|"


@dataclass
class Lesson:
    """一本笔记：``path`` 定下章号、是不是解答、相对链接从哪里算起。"""

    path: Path
    book: nbformat.NotebookNode

    @property
    def chapter(self) -> str:
        return str(int(self.path.name[:2]))

    @property
    def is_solution(self) -> bool:
        return self.path.parent.name == "solutions"

    def cells(self, kind: str) -> list[nbformat.NotebookNode]:
        return [each for each in self.book.cells if each.cell_type == kind]

    @property
    def markdown(self) -> str:
        return "\n\n".join(each.source for each in self.cells("markdown"))

    @property
    def code(self) -> str:
        return "\n".join(each.source for each in self.cells("code"))

    @property
    def printed(self) -> str:
        return "\n".join(map(shown, self.cells("code")))


def shown(code_cell: nbformat.NotebookNode) -> str:
    """一个单元的文字输出。"""
    texts = [each.get("text") or each.get("data", {}).get("text/plain") or "" for each in code_cell.outputs]
    return "".join(texts) + "".join("\n".join(each.get("traceback", [])) for each in code_cell.outputs)


def tags(code_cell: nbformat.NotebookNode) -> set[str]:
    return set(code_cell.metadata.get("tags", []))


def prose(markdown: str) -> str:
    """去掉代码、公式与链接地址，只留文字；公式与行内代码各换成一个 □。"""
    text = re.sub(r"^```.*?^```", "", markdown, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]*`|\$\$.*?\$\$|\$[^$]*\$", "□", text, flags=re.DOTALL)
    return re.sub(r"\]\([^)]*\)|<[^>]*>|https?://\S+|\*|^ *\|?[-:| ]+\|$", "", text, flags=re.MULTILINE)


@cache
def formula_numbers(path: Path) -> tuple[str, ...]:
    return tuple(re.findall(r"\\tag\{(.*?)\}", Lesson(path, nbformat.read(path, 4)).markdown))


# —— 规则：文件 ——


def format_is_valid(lesson: Lesson) -> Iterator[str]:
    ids = [each.get("id") for each in lesson.book.cells]
    if None in ids or len(set(ids)) < len(ids):
        yield "每格应有自己的 id"
        return
    try:
        nbformat.validate(lesson.book)
    except nbformat.ValidationError as error:
        yield f"不合 nbformat：{error.message}"
    if extra := set(lesson.book.metadata) - {"kernelspec", "language_info"}:
        yield f"元数据只应有 kernelspec 与 language_info，多出 {sorted(extra)}"
    if lesson.book.metadata.get("kernelspec") != KERNELSPEC:
        yield f"kernelspec 应为 {KERNELSPEC}"
    if missing := LANGUAGE_INFO.keys() - lesson.book.metadata.get("language_info", {}).keys():
        yield f"language_info 少了 {sorted(missing)}，在 JupyterLab 里一打开就算改动过；请运行 python tools/stamp.py --refresh"


def executed_in_order(lesson: Lesson) -> Iterator[str]:
    counts = [each.execution_count for each in lesson.cells("code")]
    if counts != list(range(1, len(counts) + 1)):
        yield f"应从 1 到 n 依次执行过，实际是 {counts}"


def no_stray_output(lesson: Lesson) -> Iterator[str]:
    for code_cell in lesson.cells("code"):
        failed = any(each.output_type == "error" for each in code_cell.outputs)
        if failed != ("raises-exception" in tags(code_cell)):
            yield f"出错的单元与 raises-exception 标签应一致：{code_cell.source[:60]!r}"
        if any(each.get("name") == "stderr" for each in code_cell.outputs):
            yield f"有 stderr：{code_cell.source[:60]!r}"
        pages = [each["data"]["text/html"] for each in code_cell.outputs if "text/html" in each.get("data", {})]
        allowed = MIME_TYPES | ({"text/html"} if all(map(shows_a_still_picture, pages)) else set())  # GitHub 上只剩静图
        for kind in {kind for each in code_cell.outputs for kind in each.get("data", {})} - allowed:
            yield f"不该有 {kind} 的输出：{code_cell.source[:60]!r}"
        if "NBVAL_" in code_cell.source:
            yield "nbval 的指令应写成标签，不写成注释"


def nothing_of_this_machine(lesson: Lesson) -> Iterator[str]:
    for code_cell in lesson.cells("code"):
        if code_cell.source.startswith(MARK):
            continue
        for text in (code_cell.source, shown(code_cell)):
            for found in re.finditer(ABSOLUTE_PATH, text):
                yield f"有绝对路径：{text[found.start() :][:60]!r}"
        if tags(code_cell) & UNCHECKED:
            continue
        for pattern, what in ((TIMING, "时间"), (r"\b0x[0-9a-fA-F]{6,}", "内存地址")):
            if found := re.search(pattern, shown(code_cell)):
                yield f"要比较的输出里有{what}：{found[0]!r}（{code_cell.source[:60]!r}）"


def figures_say_where_they_come_from(lesson: Lesson) -> Iterator[str]:
    for code_cell in lesson.cells("code"):
        for each in code_cell.outputs:
            picture = base64.b64decode(each.get("data", {}).get("image/png", ""))
            if b"Software\0Matplotlib" in picture and provenance.read(picture) is None:
                yield f"matplotlib 画的图没有带来历；请用 tools/chapter.py run 重新运行：{code_cell.source[:60]!r}"


def few_unchecked_cells(lesson: Lesson) -> Iterator[str]:
    unchecked = [each for each in lesson.cells("code") if tags(each) & UNCHECKED]
    if len(unchecked) * 10 > len(lesson.cells("code")):
        yield f"{len(lesson.cells('code'))} 个代码单元里有 {len(unchecked)} 个不比较输出，至多十分之一"
    for code_cell in unchecked:
        if not re.search(r"\bassert\b|\b(compare|holds)\(", code_cell.source):
            yield f"不比较输出的单元里应有 assert：{code_cell.source[:60]!r}"


def starts_with_the_common_cell(lesson: Lesson) -> Iterator[str]:
    first = lesson.cells("code")[0]
    if not first.source.startswith(MARK) or first.outputs or lesson.book.cells.index(first) != 1:
        yield f"第二格应是以“{MARK}”开头、没有输出的准备单元"
    if {**first.metadata, **FOLDED} != first.metadata:
        yield f"准备单元应折起，元数据里要有 {FOLDED}"


def cells_are_short(lesson: Lesson) -> Iterator[str]:
    own = [each for each in lesson.cells("code") if not each.source.startswith(MARK)]
    for code_cell in own:
        if (length := len(code_cell.source.splitlines())) > 15:
            yield f"一格至多 15 行，这一格 {length} 行：{code_cell.source[:60]!r}"
    imports = next((each for each in own if re.search(r"^from (vaelab|vanilla_vae)", each.source, re.MULTILINE)), None)
    if imports and (length := len(imports.source.splitlines())) > 12:
        yield f"导入至多 12 行，这里 {length} 行；只有一节用的，在那一节导入"


# —— 规则：内容 ——


def formulas_are_verified(lesson: Lesson) -> Iterator[str]:
    numbers = re.findall(r"\\tag\{(.*?)\}", lesson.markdown)
    if numbers != [f"{lesson.chapter}.{i}" for i in range(1, len(numbers) + 1)] and not lesson.is_solution:
        yield f"公式的编号应从 {lesson.chapter}.1 起连续，实际是 {numbers}"
    for index, each in enumerate(lesson.book.cells):
        for number in re.findall(r"\\tag\{(.*?)\}", each.source) if each.cell_type == "markdown" else ():
            later = "\n".join(shown(other) for other in lesson.book.cells[index:] if other.cell_type == "code")
            if not re.search(rf"✓.*式\({re.escape(number)}\)", later):
                yield f"式({number}) 之后没有核对它的单元（输出里要有 ✓ …式({number})）"


def referenced_formulas_exist(lesson: Lesson) -> Iterator[str]:
    own = re.findall(r"\\tag\{(.*?)\}", lesson.markdown)
    for chapter, number in sorted(set(re.findall(r"式\((\d+)\.(\d+)\)", lesson.markdown + lesson.code))):
        files = [path for path in notebooks() if path.parent.name == "notebooks" and path.name.startswith(f"{int(chapter):02}_")]
        elsewhere = lesson.is_solution or chapter != lesson.chapter
        known = [*own, *(formula_numbers(files[0]) if files and elsewhere else ())]
        if f"{chapter}.{number}" not in known and (files or not elsewhere):
            yield f"提到的 式({chapter}.{number}) 不存在"


def shown_source_is_real(lesson: Lesson) -> Iterator[str]:
    rooms = (evaluate, images, plan, step, stepper, train, vanilla_vae)
    names = {name: value for room in rooms for name, value in vars(room).items()} | {"vanilla_vae": vanilla_vae}
    found = 0
    for code_cell in lesson.cells("code"):
        for call in ast.walk(_parse(code_cell.source)):
            if not isinstance(call, ast.Call) or not ast.unparse(call.func).endswith("getsource"):
                continue
            try:
                source = inspect.getsource(eval(ast.unparse(call.args[0]), names))
            except (NameError, AttributeError):  # 笔记里自己的东西，由 nbval 重跑来核对
                continue
            found += 1
            printed = ast.unparse(call) in [
                ast.unparse(argument)
                for outer in ast.walk(_parse(code_cell.source))
                if isinstance(outer, ast.Call) and ast.unparse(outer.func) == "print"
                for argument in outer.args
            ]
            if printed and source not in shown(code_cell):
                yield f"展示的 {ast.unparse(call.args[0])} 与现在的源码不同；请重新运行并保存"
    if not found and not lesson.is_solution:
        yield "应有一格用 inspect.getsource 展示 vanilla_vae.py 的源码"


def _parse(source: str) -> ast.AST:
    try:
        return ast.parse(source)
    except SyntaxError:  # %魔法命令，或故意的语法错误
        return ast.Module([], [])


def exercises_are_judged(lesson: Lesson) -> Iterator[str]:
    known = {number for number in CHECKS if number.split(".")[0] == lesson.chapter}
    used = set(re.findall(r"""\bexercise\(\s*["']([\d.]+)["']""", lesson.code))
    if used != known or not (lesson.is_solution or 2 <= len(used) <= 5):
        yield f"练习应有二到五个，与 vaelab/exercises/ 里的一致：笔记 {sorted(used)}，检查 {sorted(known)}"
    for number in sorted(known):
        for mark, name in (("✓", "solution"), ("✗", "wrong")) if lesson.is_solution else (("○", None),):
            if not re.search(rf"^{mark} 练习 {re.escape(number)}\b", lesson.printed, re.MULTILINE):
                yield f"没有存着“{mark} 练习 {number}”的输出"
            if name and not re.search(rf"\b{name}_{number.replace('.', '_')}\b", lesson.code):
                yield f"没有 {name}_{number.replace('.', '_')}"
        if not lesson.is_solution and re.search(rf"^[✓✗] 练习 {re.escape(number)}\b", lesson.printed, re.MULTILINE):
            yield f"练习 {number} 的空白处已经作答"


def sections_in_order(lesson: Lesson) -> Iterator[str]:
    headings = re.findall(r"^## .*$", lesson.markdown.replace("`", ""), re.MULTILINE)
    first = lesson.book.cells[0].source
    if not first.startswith(f"# {int(lesson.chapter):02} "):
        yield f"第一格应以标题“# {int(lesson.chapter):02} …”开头"
    if lesson.is_solution:
        expected = [f"## 练习 {n}" for n in sorted(CHECKS) if n.split(".")[0] == lesson.chapter]
        actual = re.findall(r"^## 练习 \d+\.\d+", lesson.markdown, re.MULTILINE)
        if actual != expected:
            yield f"各题应依次是 {expected}，实际是 {actual}"
        return
    card = re.search(r"^\| \| \|\n\|---\|---\|\n((?:\|.*\|\n?)+)", first, re.MULTILINE)
    words = re.findall(r"^\| (\S+) \| .+ \|$", card[1], re.MULTILINE) if card else []
    if words != ["先修", "用时", "难度", "学完你能"]:
        yield f"第一格的卡片应是四行的竖表：先修、用时、难度、学完你能，实际是 {words}"
    if [heading for heading in headings if heading in CLOSING] != CLOSING:
        yield f"结尾的小节应依次是 {CLOSING}，实际结尾是 {headings[-len(CLOSING) - 1 :]}"
    if lesson.markdown.count("先猜再跑") < 3:
        yield "“先猜再跑”少于三处"


def math_is_portable(lesson: Lesson) -> Iterator[str]:
    for each in lesson.cells("markdown"):
        text = re.sub(r"^```.*?^```|`[^`\n]*`", "", each.source, flags=re.DOTALL | re.MULTILINE)
        for found in re.finditer(r"\\begin\{(?:align|equation|gather|eqnarray|multline)\*?\}|\\(?:re)?newcommand|\\def\b", text):
            yield f"用了 {found[0]}；请写成 $$\\begin{{aligned}}…\\end{{aligned}}$$"
        for block in re.findall(r"\\begin\{aligned\}(.*?)\\end\{aligned\}", text, re.DOTALL):
            if r"\tag" in block:
                yield r"\tag 应写在 aligned 之外"
        inline = re.sub(r"\$\$.*?\$\$", "", text, flags=re.DOTALL).replace(r"\$", "")
        for paragraph in re.split(r"\n\s*\n", inline):
            pieces = paragraph.split("$")
            if len(pieces) % 2 == 0:
                yield f"$ 不成对：{paragraph[:60]!r}"
                continue
            for formula in pieces[1::2]:
                if formula != formula.strip() or not formula:
                    yield f"$ 的内侧不应有空格：{formula[:40]!r}"
            for line in paragraph.splitlines():
                if line.startswith("|") and any(re.search(r"(?<!\\)\|", formula) for formula in line.split("$")[1::2]):
                    yield f"表格的公式里不能有 |，请用 \\mid 或 \\vert：{line[:60]!r}"


def links_and_pictures_work(lesson: Lesson) -> Iterator[str]:
    text = re.sub(r"^```.*?^```|`[^`\n]*`|\$[^$\n]*\$", "", lesson.markdown, flags=re.DOTALL | re.MULTILINE)
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]*)\)|<img[^>]*src=[\"']([^\"']*)", text):
        if not "".join(picture).startswith("https://"):
            yield f"Markdown 里不能有相对路径的图：{''.join(picture)}"
    for target in re.findall(r"(?<!!)\]\(([^)\s#]+)[^)]*\)", text):
        if not re.match(r"[a-z]+:", target) and not (lesson.path.parent / target).exists():
            yield f"链接的文件不存在：{target}"


def chinese_is_tidy(lesson: Lesson) -> Iterator[str]:
    text = prose(lesson.markdown)
    rules = {
        rf"{CHINESE}\s?[,;:?!]|[,;:?!]\s?{CHINESE}|{CHINESE}\.(?=\s*(?:$|{CHINESE}))": "中文旁边应用全角标点",
        r"！": "不用感叹号",
        r"您|众所周知|不难看出|显而易见|显然易见": "不用“您”与套话",
        rf"{CHINESE}[A-Za-z0-9]|[A-Za-z0-9]{CHINESE}": "中文与字母、数字之间应空一格",
    }
    for pattern, rule in rules.items():
        for found in re.finditer(pattern, text, re.MULTILINE):
            yield f"{rule}：{text[max(0, found.start() - 12) : found.end() + 12]!r}"


RULES: list[Callable[[Lesson], Iterator[str]]] = [
    format_is_valid, executed_in_order, no_stray_output, nothing_of_this_machine, figures_say_where_they_come_from, few_unchecked_cells,
    starts_with_the_common_cell, cells_are_short, formulas_are_verified, referenced_formulas_exist, shown_source_is_real,
    exercises_are_judged, sections_in_order, math_is_portable, links_and_pictures_work, chinese_is_tidy,
]  # fmt: skip


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_notebook_keeps_every_rule(path):
    lesson = Lesson(path, nbformat.read(path, 4))
    complaints = [f"{rule.__name__}：{complaint}" for rule in RULES for complaint in rule(lesson)]
    assert not complaints, "\n" + "\n".join(complaints)


def test_every_notebook_carries_the_current_cell():
    stale = [path.name for path in changes(current_address())]
    assert not stale, f"请运行 python tools/stamp.py --refresh：{stale}"


# —— 每条规则都会开口：一本合格的笔记，每次弄坏一处 ——


def code(source: str, text: str = "", **metadata) -> nbformat.NotebookNode:
    outputs = [nbformat.v4.new_output("stream", text=text)] if text else []
    return nbformat.v4.new_code_cell(source, outputs=outputs, metadata=metadata)


def sample(solution: bool = False) -> Lesson:
    """一本满足全部规则的第 05 章（或它的解答），不曾真的运行。"""
    text = nbformat.v4.new_markdown_cell
    numbers = sorted(number for number in CHECKS if number.startswith("5."))
    if solution:
        cells = [text("# 05 解答\n\n题目在 [05 章](../05_kl_divergence.ipynb)。"), code(cell(), **FOLDED)]
        for n in numbers:
            name = n.replace(".", "_")
            cells += [text(f"## 练习 {n}\n由式(5.8) 可得。")]
            cells += [code(f'solution_{name} = 1\nexercise("{n}", solution_{name})', f"✓ 练习 {n} 通过\n")]
            cells += [code(f'wrong_{name} = 2\nexercise("{n}", wrong_{name})', f"✗ 练习 {n}：符号反了。\n")]
    else:
        card = "| | |\n|---|---|\n| 先修 | [04 章](04_reparameterization.ipynb) |\n| 用时 | 20 分钟 |\n| 难度 | ★ |\n| 学完你能 | 推导 |"
        formula = "$$\\begin{aligned}a&=b\\end{aligned} \\tag{5.1}$$\n\n式(5.1) 里 $q(x\\mid z)$ 是后验。"
        cells = [text(f"# 05 KL 散度\n\n一句话。\n\n{card}"), code(cell(), **FOLDED), text(f"## 1 直觉\n\n**先猜再跑。** 是几？\n\n{formula}")]
        cells += [code('compare("式(5.1)：一致", a, b)', "✓ 式(5.1)：一致\n"), text("## 2 公式\n\n**先猜再跑。** 大还是小？")]
        cells += [code(f"a{i} = {i}\na{i}", "1\n") for i in range(10)]
        cells += [code("assert loss < 1; loss", "0.123\n", tags=["nbval-ignore-output"])]
        cells += [text("## 常见错误\n\n**先猜再跑。** 错在哪里？"), text("## 练习")]
        cells += [code(f'exercise("{n}", ...)', f"○ 练习 {n} 还没有作答；可以先往下读，回头再来。\n") for n in numbers]
        source = inspect.getsource(vanilla_vae.VanillaVAE.sample)
        cells += [text("## 小结\n\n- 一条。"), text("## 回到 vanilla_vae.py")]
        cells += [code("print(inspect.getsource(VanillaVAE.sample))", source + "\n"), text("## 参考文献\n\n- 论文。")]
    book = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": dict(KERNELSPEC), "language_info": dict(LANGUAGE_INFO)})
    for count, each in enumerate((each for each in book.cells if each.cell_type == "code"), 1):
        each.execution_count = count
    path = ROOT / "notebooks/solutions/05_kl_divergence.ipynb" if solution else ROOT / "notebooks/05_kl_divergence.ipynb"
    return Lesson(path, book)


def complaints_of(lesson: Lesson) -> set[str]:
    return {rule.__name__ for rule in RULES if any(True for _ in rule(lesson))}


def test_a_figure_with_its_label_is_fine():
    lesson = sample()
    add(output=picture(labelled=True))(lesson)
    assert not complaints_of(lesson)


@pytest.mark.parametrize("solution", [False, True])
def test_the_sample_keeps_every_rule(solution):
    assert not complaints_of(sample(solution))


def edit(old: str, new: str) -> Callable[[Lesson], None]:
    """把整本笔记（源码与输出）里的一段文字换掉。"""

    def mutate(lesson: Lesson) -> None:
        text = json.dumps(lesson.book, ensure_ascii=False)
        escaped_old, escaped_new = (json.dumps(each, ensure_ascii=False)[1:-1] for each in (old, new))
        assert escaped_old in text
        lesson.book = nbformat.from_dict(json.loads(text.replace(escaped_old, escaped_new)))

    return mutate


def add(source: str = "1", output: nbformat.NotebookNode | None = None, **metadata) -> Callable[[Lesson], None]:
    """在末尾加一个执行过的代码单元。"""

    def mutate(lesson: Lesson) -> None:
        added = code(source, **metadata)
        added.execution_count = len(lesson.cells("code")) + 1
        added.outputs = [output] if output else []
        lesson.book.cells.append(added)

    return mutate


def write(markdown: str) -> Callable[[Lesson], None]:
    return lambda lesson: lesson.book.cells.append(nbformat.v4.new_markdown_cell(markdown))


def stream(text: str, name: str = "stdout") -> nbformat.NotebookNode:
    return nbformat.v4.new_output("stream", text=text, name=name)


def display(kind: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_output("display_data", data={kind: "x"})


def picture(labelled: bool) -> nbformat.NotebookNode:
    """matplotlib 画的一张图。"""
    file = io.BytesIO()
    Figure(figsize=(1, 1)).savefig(file, format="png")
    png = provenance.write(file.getvalue(), {}) if labelled else file.getvalue()
    return nbformat.v4.new_output("display_data", data={"image/png": base64.b64encode(png).decode()})


ERROR = nbformat.v4.new_output("error", ename="ValueError", evalue="x", traceback=["x"])

DEFECTS = {
    "格式不合": (format_is_valid, lambda lesson: lesson.book.cells[0].update(unknown=1)),
    "没有单元编号": (format_is_valid, lambda lesson: lesson.book.cells[0].pop("id")),
    "存了 widgets": (format_is_valid, lambda lesson: lesson.book.metadata.update(widgets={})),
    "别的内核": (format_is_valid, lambda lesson: lesson.book.metadata.kernelspec.update(name="myenv")),
    "没有版本号": (format_is_valid, lambda lesson: lesson.book.metadata.language_info.pop("version")),
    "没有执行": (executed_in_order, lambda lesson: lesson.cells("code")[3].update(execution_count=None)),
    "执行过两遍": (executed_in_order, lambda lesson: lesson.cells("code")[3].update(execution_count=40)),
    "有警告": (no_stray_output, add(output=stream("UserWarning", "stderr"))),
    "出了错": (no_stray_output, add(output=ERROR)),
    "该出错而没有": (no_stray_output, add(tags=["raises-exception"])),
    "SVG": (no_stray_output, add(output=display("image/svg+xml"))),
    "HTML 动画": (no_stray_output, add(output=display("text/html"))),
    "注释里的指令": (no_stray_output, add("# NBVAL_IGNORE_OUTPUT")),
    "输出里的路径": (nothing_of_this_machine, add(output=stream("/home/me/x.py"))),
    "源码里的路径": (nothing_of_this_machine, add('open("/content/x.zip")')),
    "Windows 的路径": (nothing_of_this_machine, add(output=stream("C:\\Users\\me"))),
    "内存地址": (nothing_of_this_machine, add(output=stream("<object at 0x7f0012345678>"))),
    "用时": (nothing_of_this_machine, add(output=stream("1.23 ms ± 4 µs per loop"))),
    "秒": (nothing_of_this_machine, add(output=stream("训练用了 31 秒"))),
    "进度条": (nothing_of_this_machine, add(output=stream("100%|██████| 10/10 [00:01<00:00, 9.9it/s]"))),
    "图没有来历": (figures_say_where_they_come_from, add(output=picture(labelled=False))),
    "不比较的太多": (few_unchecked_cells, lambda lesson: [add("assert x", tags=["nbval-skip"])(lesson) for _ in range(3)]),
    "不比较又没有 assert": (few_unchecked_cells, edit("assert loss < 1; loss", "loss")),
    "没有准备单元": (starts_with_the_common_cell, edit(MARK, "# 别的")),
    "准备单元有输出": (starts_with_the_common_cell, lambda lesson: lesson.cells("code")[0].outputs.append(stream("x"))),
    "准备单元没有折起": (starts_with_the_common_cell, lambda lesson: lesson.cells("code")[0].metadata.clear()),
    "准备单元只在一处折起": (starts_with_the_common_cell, lambda lesson: lesson.cells("code")[0].metadata.pop("cellView")),
    "公式没有核对": (formulas_are_verified, edit("✓ 式(5.1)：一致", "✓ 一致")),
    "核对没有通过": (formulas_are_verified, edit("✓ 式(5.1)", "✗ 式(5.1)")),
    "核对在公式之前": (formulas_are_verified, lambda lesson: lesson.book.cells.insert(2, lesson.book.cells.pop(3))),
    "公式跳号": (formulas_are_verified, edit("(5.1)", "(5.2)")),
    "提到没有的公式": (referenced_formulas_exist, write("见式(5.99)。")),
    "源码过时": (shown_source_is_real, edit("print(inspect.getsource(VanillaVAE.sample))", "print(inspect.getsource(VanillaVAE.encode))")),
    "没有展示源码": (shown_source_is_real, edit("inspect.getsource", "str")),
    "漏了一个练习": (exercises_are_judged, edit('exercise("5.1", ...)', "1")),
    "没有检查的练习": (exercises_are_judged, add('exercise("5.9", ...)')),
    "空白处已作答": (exercises_are_judged, edit("○ 练习 5.1 还没有作答", "✓ 练习 5.1 通过")),
    "没有卡片": (sections_in_order, edit("| 难度 |", "| 星级 |")),
    "卡片加粗": (sections_in_order, edit("| 先修 |", "| **先修** |")),
    "长的单元": (cells_are_short, add("\n".join(["x = 1"] * 16))),
    "长的导入": (cells_are_short, lambda lesson: lesson.cells("code")[1].update(source="\n".join(["from vaelab import plot"] * 13))),
    "少一节": (sections_in_order, edit("## 小结", "### 小结")),
    "次序颠倒": (sections_in_order, lambda lesson: lesson.book.cells.append(lesson.book.cells.pop(-4))),
    "没有先猜": (sections_in_order, edit("先猜再跑", "运行")),
    "标题没有章号": (sections_in_order, edit("# 05 KL", "# KL")),
    "裸的 align": (math_is_portable, write("\\begin{align}a\\end{align}")),
    "tag 在 aligned 里": (math_is_portable, edit("\\end{aligned} \\tag{5.1}", "\\tag{5.1}\\end{aligned}")),
    "$ 内有空格": (math_is_portable, write("设 $ x$ 是数。")),
    "$ 不成对": (math_is_portable, write("设 $x 是数。")),
    "表格里的竖线": (math_is_portable, write("| a | b |\n|---|---|\n| $p(x|z)$ | c |")),
    "相对路径的图": (links_and_pictures_work, write("![图](../photos/1.webp)")),
    "HTML 的图": (links_and_pictures_work, write('<img src="../photos/1.webp">')),
    "断了的链接": (links_and_pictures_work, write("[下一章](99_nothing.ipynb)")),
    "半角标点": (chinese_is_tidy, write("先看左边,再看右边。")),
    "半角句号": (chinese_is_tidy, write("到此为止.")),
    "感叹号": (chinese_is_tidy, write("太好了！")),
    "您": (chinese_is_tidy, write("请您运行。")),
    "中英文不空格": (chinese_is_tidy, write("用Adam训练。")),
}  # fmt: skip

SOLUTION_DEFECTS = {
    "解答没有通过": (exercises_are_judged, edit("✓ 练习 5.2 通过", "○ 练习 5.2 还没有作答")),
    "错误的答案没有被判错": (exercises_are_judged, edit("✗ 练习 5.2：", "✓ 练习 5.2 ")),
    "没有典型的错误": (exercises_are_judged, edit("wrong_5_2", "other")),
    "题目的次序": (sections_in_order, edit("## 练习 5.2", "## 练习 5.9")),
    "解答提到没有的公式": (referenced_formulas_exist, edit("式(5.8)", "式(5.98)")),
}


@pytest.mark.parametrize(
    ("solution", "rule", "mutate"),
    [(False, *each) for each in DEFECTS.values()] + [(True, *each) for each in SOLUTION_DEFECTS.values()],
    ids=[*DEFECTS, *SOLUTION_DEFECTS],
)
def test_each_defect_is_noticed(solution, rule, mutate):
    lesson = sample(solution)
    mutate(lesson)
    assert rule.__name__ in complaints_of(lesson)
