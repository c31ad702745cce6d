"""写一章：造出、转成草稿、由草稿造笔记、重新执行、只测这一章。

用法（15 是章号）：
  python tools/chapter.py new 15 normalizing_flows 归一化流   由 tools/template 造出草稿、练习的检查与 README 的一行
  python tools/chapter.py draft 05                               由现有的笔记与解答得到草稿（py:percent 脚本，不提交）
  python tools/chapter.py build 15                               草稿 → 笔记与解答：换上准备单元，在全新的内核里执行，存好
  python tools/chapter.py run [05 …]                             不经草稿，重新执行笔记与解答；不写章号就是全部
  python tools/chapter.py test 15                                只测这一章：写法的规则、每格的输出与图、练习的检查

草稿放在笔记旁边，同名，.py。没有改动的单元保留原来的 id。
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jupytext
import nbformat
import stamp
from execute import execute

ROOT = stamp.ROOT
TEMPLATE = Path(__file__).parent / "template"


class ChapterError(Exception):
    """给出的章不合要求；信息给人看。"""


def lessons(number: str, suffix: str = ".ipynb", root: Path = ROOT) -> list[Path]:
    """第 ``number`` 章的笔记与解答（或它们的草稿）。"""
    found = sorted((root / "notebooks").glob(f"{number}_*{suffix}")) + sorted((root / "notebooks/solutions").glob(f"{number}_*{suffix}"))
    if not found:
        raise ChapterError(f"notebooks/ 里没有第 {number} 章的 {suffix} 文件；章号写成两位，如 05，或先用 new、draft 造出来。")
    return found


def new(number: str, name: str, title: str, root: Path = ROOT) -> list[Path]:
    """由模板造出一章的草稿、练习的检查与 README 的一行。"""
    if not re.fullmatch(r"\d\d", number) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ChapterError(f"应写成 new 15 normalizing_flows 归一化流（两位章号，小写英文的文件名，中文标题），收到 {number} {name} {title}。")
    file = f"{number}_{name}"
    targets = {
        "lesson.py": root / f"notebooks/{file}.py",
        "solution.py": root / f"notebooks/solutions/{file}.py",
        "exercises.py": root / f"vaelab/exercises/ch{number}.py",
    }
    taken = [path for path in targets.values() if path.exists()] + list((root / "notebooks").glob(f"{number}_*.ipynb"))
    if taken:
        raise ChapterError(f"第 {number} 章已经有 {taken[0].relative_to(root)}；请换一个章号，或用 draft 改现有的一章。")
    words = {"{NN}": number, "{N}": str(int(number)), "{TITLE}": title, "{FILE}": f"{file}.ipynb"}
    for template, path in targets.items():
        text = (TEMPLATE / template).read_text(encoding="utf-8")
        for word, value in words.items():
            text = text.replace(word, value)
        stamp.write(path, text)
    readme = root / "README.md"
    lines = readme.read_text(encoding="utf-8").split("\n")
    rows = [index for index, line in enumerate(lines) if re.match(r"\| \[\d\d ", line)]
    after = max(index for index in rows if lines[index][3:5] < number)
    lines.insert(after + 1, f"| [{number} {title}](notebooks/{file}.ipynb) | 说出…… | 30 分钟 |")
    stamp.write(readme, "\n".join(lines))
    return [*targets.values(), readme]


def draft(path: Path) -> Path:
    """笔记 → 草稿：标签留着，准备单元只留一行，输出与 id 不写。"""
    book = nbformat.read(path, 4)
    for each in book.cells:
        if each.source.startswith(stamp.MARK):
            each.source, each.metadata = "# 准备：由 tools/stamp.py 写入", nbformat.from_dict({})
    book.metadata = nbformat.from_dict({})
    script = path.with_suffix(".py")
    if script.exists():
        raise ChapterError(f"草稿 {script.relative_to(ROOT)} 已经在了，里面可能有没有 build 的改动；先 build，或删掉它再来。")
    text = jupytext.writes(book, fmt={"extension": ".py", "format_name": "percent", "notebook_metadata_filter": "-all"})
    stamp.write(script, text.rstrip("\n") + "\n")
    return script


def build(script: Path, root: Path = ROOT) -> Path:
    """草稿 → 笔记：换上准备单元，照 ruff 整理，给每格一个 id（没有改动的照旧），在全新的内核里执行，存好。

    没有通过时，原来的笔记原样留着。
    """
    path = script.with_suffix(".ipynb")
    before = path.read_bytes() if path.exists() else None
    old = {_key(each.source): each.id for each in nbformat.reads(before.decode(), 4).cells} if before else {}
    book = jupytext.reads(script.read_text(encoding="utf-8"), fmt="py:percent")
    for each in book.cells:
        if _key(each.source) == stamp.MARK:
            each.source = stamp.MARK  # 下面的 stamp 换成真的
    book.metadata = nbformat.from_dict({"kernelspec": stamp.KERNELSPEC})
    book.nbformat, book.nbformat_minor = 4, 5
    try:
        stamp.write(path, nbformat.writes(book, version=nbformat.NO_CONVERT) + "\n")
        stamp.write(path, stamp.stamped(path, stamp.current_address(root), root))
        subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", str(path)], cwd=root, check=True)  # 先整理再执行：图的来历记着代码
        book, used = nbformat.read(path, 4), set()
        for index, each in enumerate(book.cells):
            fresh = hashlib.sha256(f"{path.name} {index} {each.source}".encode()).hexdigest()[:8]
            kept = old.get(_key(each.source), fresh)
            each.id = fresh if kept in used else kept
            used.add(each.id)
        stamp.write(path, nbformat.writes(book, version=nbformat.NO_CONVERT) + "\n")
        if reasons := execute(path):
            raise ChapterError(f"{path.relative_to(root)} 没有存好，原来的照旧：" + "；".join(reasons))
    except BaseException:
        if before is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(before)
        raise
    return path


def _key(source: str) -> str:
    """认单元用的：源码本身；准备单元不论新旧、写没写全，都是 ``MARK``。"""
    return stamp.MARK if source.startswith("# 准备：由 tools/stamp.py 写入") or stamp.OLD_OR_NEW.match(source) else source


def test(number: str) -> int:
    """只测这一章；返回 pytest 的退出码。"""
    books, stem = lessons(number), lessons(number)[0].stem
    rules = [f"tests/test_notebooks.py::test_notebook_keeps_every_rule[{folder}/{stem}]" for folder in ("notebooks", "solutions")]
    started = time.perf_counter()
    chosen = f"ch{number} or test_every_exercise_knows or " + " or ".join(f"[{int(number)}.{index}" for index in range(1, 10))
    runs = [[*rules, "tests/test_house.py", *map(str, books)], ["tests/test_exercises.py", "-k", chosen]]
    codes = [subprocess.run([sys.executable, "-m", "pytest", "-q", *each], cwd=ROOT).returncode for each in runs]
    print(f"第 {number} 章{'没有通过' if any(codes) else '通过'}，{time.perf_counter() - started:.0f} 秒")
    return max(codes)


def main(arguments: Sequence[str] | None = None) -> int:
    """命令行；返回退出码。"""
    stamp.speak_utf8()
    try:
        match list(sys.argv[1:] if arguments is None else arguments):
            case ["new", number, name, title]:
                for path in new(number, name, title):
                    print(f"写下 {path.relative_to(ROOT)}")
                print(f"接着：改草稿，然后 python tools/chapter.py build {number}")
            case ["draft", number]:
                for path in lessons(number):
                    print(f"写下 {draft(path).relative_to(ROOT)}")
            case ["build", number]:
                for script in lessons(number, ".py"):
                    print(f"✓ {build(script).relative_to(ROOT)}")
            case ["run", *numbers]:
                failed = False
                for path in [path for number in numbers for path in lessons(number)] or stamp.notebooks():
                    started = time.perf_counter()
                    reasons = execute(path)
                    failed |= bool(reasons)
                    seconds = f"{time.perf_counter() - started:.0f} 秒"
                    print(f"{'✗' if reasons else '✓'} {path.relative_to(ROOT)}　{seconds}", *reasons, sep="\n  ", flush=True)
                return int(failed)
            case ["test", number]:
                return test(number)
            case [] | ["-h" | "--help"]:
                print(__doc__)
            case other:
                raise ChapterError(f"不认得 {' '.join(other)}；加 --help 看用法。")
    except (ChapterError, stamp.StampError) as error:
        print(f"错误：{error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
