"""改错一处，看谁看得见：``python tools/mutate.py 05 [--cell 12] [--limit 60] [--jobs 2]``。

每个代码单元里，逐处做一个人会犯的错：正负号、½ 与 2 倍、参数的次序、漏掉一项、下标差一、log 与 log2、mean 与 sum、
维的次序、循环一次不走、忘了 detach、标准差当方差。改过的单元连同本节余下的单元再运行一遍（到下一个二级标题为止）。
看得见，指的是读者看得见：抛出异常，或出现原来没有的 ✗。印出来的数变了不算。

看不见的，要么补上核对，要么在 ``tools/unseen/05.txt`` 里写明道理：``# 等价：…`` 之下列的改动，改后与原来说的是同一件事
（标准正态对称，换一批任意的输入），不计；``# 其余：…`` 之下的计作看不见。看得见的不到 95%、没有写道理的、写了而不再需要的，退出码是 1。

一章只从头运行一遍：到了一个单元，就为它的每处错误 fork 出一个进程，各自往下走；所以只在 Linux 与 macOS 上能用，只用一个线程。
不改 ``assert`` 与 ``compare`` 里的容差，种子，图的大小、颜色与文字，训练的步数与学习率：它们不是公式。
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
DRAWING = {  # 只管样子的函数与参数：画在哪里、多大、什么颜色、写什么字
    "subplots", "figure", "set", "legend", "text", "annotate", "axis", "set_title", "suptitle", "colorbar", "show", "print", "tight_layout",
    "manual_seed", "exercise", "use_chinese_font", "get_font", "tick_params", "set_xlim", "set_ylim", "set_xticks", "set_yticks", "set_xlabel",
    "set_ylabel", "set_axis_off", "bar_label", "grid", "setdefault", "repeat", "randint", "stamp", "axvline_label",
}  # fmt: skip
KEYWORDS = {
    "figsize", "color", "alpha", "label", "linewidth", "lw", "fontsize", "layout", "marker", "markersize", "s", "width", "height", "title",
    "cmap", "bins", "linestyle", "zorder", "sharex", "sharey", "atol", "rtol", "stderr", "sigmas", "generator", "seed", "count", "lr", "epochs",
    "steps", "gridspec_kw", "edgecolor", "facecolor", "ha", "va", "loc", "ncol", "pad", "vmin", "vmax", "extent", "aspect", "frameon", "levels",
    "density", "edgecolors", "colors", "batch_size", "dtype", "device", "requires_grad", "image_size", "padding", "columns", "scale", "texts",
    "titles",
}  # fmt: skip
TWINS = {
    "log": "log2", "log2": "log", "mean": "sum", "sum": "mean", "std": "var", "var": "std", "max": "min", "min": "max", "amax": "amin", "amin":
    "amax", "sin": "cos", "cos": "sin", "argmax": "argmin", "argmin": "argmax", "cumsum": "cumprod", "floor": "ceil", "ceil": "floor",
    "logsumexp": "sum", "tanh": "sigmoid",
}  # fmt: skip
PLOTS = {"plot", "semilogx", "semilogy", "loglog", "bar", "barh", "scatter", "errorbar", "fill_between"}
UNORDERED = PLOTS | {  # 前两个参数对调没有意义，或照样对，或由 compare、holds 自己拦住
    "linspace", "logspace", "arange", "rand", "randn", "zeros", "ones", "full", "view", "reshape", "repeat", "open", "max", "min", "maximum",
    "minimum", "allclose", "equal", "mse_loss", "Sequential", "range", "compare", "holds", "getattr", "zip", "isinstance", "Path",
}  # fmt: skip
LIBRARIES = ("torch", "F", "math")
REDUCTIONS = {"mean", "sum", "std", "var", "flatten", "softmax", "cumsum", "logsumexp", "amax"}  # 末一个参数是维
DROPPED = {"detach", "abs", "exp", "sqrt", "square", "flip", "relu", "log", "cumsum", "T", "mT", "neg", "softmax", "sigmoid"}


def _name(node: ast.expr) -> str:
    """调用的函数的名字：``torch.log`` 与 ``x.log`` 都是 ``log``。"""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def _children(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """可以改的子节点；图的样子、种子、容差、步数、类型注解不看。"""
    if isinstance(node, (ast.Assert, ast.Import, ast.ImportFrom, ast.JoinedStr, ast.FormattedValue)):
        return
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or (isinstance(child, ast.keyword) and child.arg in KEYWORDS):
                continue
            if isinstance(child, ast.Call) and _name(child.func) in DRAWING:
                continue
            yield child, name, index


def _walk(node: ast.AST, path: tuple = ()) -> Iterator[tuple[tuple, ast.AST]]:
    yield path, node
    for child, name, index in _children(node):
        yield from _walk(child, (*path, (name, index)))


def _at(tree: ast.AST, path: tuple) -> ast.AST:
    for name, index in path:
        tree = getattr(tree, name) if index is None else getattr(tree, name)[index]
    return tree


def _put(tree: ast.AST, path: tuple, new: ast.AST) -> None:
    *before, (name, index) = path
    parent = _at(tree, tuple(before))
    if index is None:
        setattr(parent, name, new)
    else:
        getattr(parent, name)[index] = new


def _other_axis(axis: int) -> int:
    return {0: 1, 1: 0, -1: 0}.get(axis, axis - 1)


def slips(node: ast.AST, parent: ast.AST | None) -> Iterator[tuple[str, ast.AST]]:
    """在 ``node`` 处会犯的错：(是什么错, 换成的节点)。"""
    if isinstance(node, ast.BinOp) and not _literal(node):
        yield from _operator_slips(node)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not _number(node.operand):
        yield "漏掉负号", node.operand
    if _number(node):
        yield from _number_slips(node, parent)
    if isinstance(node, ast.keyword) and node.arg in ("dim", "axis", "correction") and _number(node.value):
        yield "维（或修正）不对", ast.keyword(node.arg, ast.Constant(_other_axis(node.value.value)))
    if isinstance(node, ast.For) and not isinstance(node.iter, ast.Constant):
        empty = copy.copy(node)
        empty.iter = ast.Subscript(ast.Call(ast.Name("list", ast.Load()), [node.iter], []), ast.Slice(None, ast.Constant(0)), ast.Load())
        yield "循环一次不走", empty
    if isinstance(node, ast.Call):
        yield from _call_slips(node, _name(node.func))


def _literal(node: ast.AST | None) -> bool:
    """两个数写成的算式，如 ``1 / 4``：当作一个数，不在里面改。"""
    return isinstance(node, ast.BinOp) and _number(node.left) and _number(node.right)


def _operator_slips(node: ast.BinOp) -> Iterator[tuple[str, ast.AST]]:
    left, op, right = node.left, node.op, node.right
    joined = any(isinstance(side, (ast.List, ast.JoinedStr)) for side in (left, right)) or (
        isinstance(left, ast.Constant) and isinstance(left.value, str)
    )  # 列表、字符串相接，不是加法
    if isinstance(op, (ast.Add, ast.Sub)) and not joined:
        yield "正负号", ast.BinOp(left, ast.Sub() if isinstance(op, ast.Add) else ast.Add(), right)
        yield "漏掉右边一项", left
        yield "漏掉左边一项", right if isinstance(op, ast.Add) else ast.UnaryOp(ast.USub(), right)
    if isinstance(op, (ast.Mult, ast.Div, ast.MatMult)) and not isinstance(left, (ast.List, ast.Constant)) and not isinstance(right, ast.List):
        yield "漏掉右边的因子", left
    if isinstance(op, ast.Mult) and not any(isinstance(side, (ast.List, ast.Tuple)) for side in (left, right)):
        yield "漏掉左边的因子", right
    if isinstance(op, ast.Pow):
        yield "漏掉乘方", left


def _number_slips(node: ast.Constant, parent: ast.AST | None) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(parent, ast.BinOp) and not _literal(parent):
        if isinstance(parent.op, (ast.Mult, ast.Div)):
            yield "系数大一倍", ast.Constant(node.value * 2)
        if isinstance(parent.op, (ast.Add, ast.Sub)):
            yield "常数差一", ast.Constant(node.value + 1)
    if isinstance(parent, (ast.Subscript, ast.Slice)) and isinstance(node.value, int):
        yield "下标差一", ast.Constant(node.value + 1)


def _call_slips(node: ast.Call, name: str) -> Iterator[tuple[str, ast.AST]]:
    func, args, first_two = node.func, node.args, node.args[:2]

    def call(*changed: ast.expr) -> ast.Call:
        return ast.Call(func, list(changed), node.keywords)

    if name in TWINS and isinstance(func, ast.Attribute):
        yield f"{name} 当成 {TWINS[name]}", ast.Call(ast.Attribute(func.value, TWINS[name], ast.Load()), args, node.keywords)
    if name in DROPPED and isinstance(func, ast.Attribute):
        of_library = isinstance(func.value, ast.Name) and func.value.id in LIBRARIES
        if args or not of_library:
            yield f"漏掉 {name}", args[0] if of_library else func.value
    if name == "range" and len(args) == 1:
        yield "循环一次不走", ast.Call(func, [ast.Constant(0)], [])
    if len(first_two) == 2 and name not in UNORDERED and not any(isinstance(each, ast.Starred) for each in first_two):
        if not all(isinstance(each, ast.Constant) for each in first_two):
            yield "前两个参数对调", call(args[1], args[0], *args[2:])
    if name in REDUCTIONS and args and _number(args[-1]):
        yield "维不对", call(*args[:-1], ast.Constant(_other_axis(args[-1].value)))
    if name in PLOTS and len(args) >= 2 and not isinstance(args[1], (ast.Constant, ast.Starred)):
        yield "画的数差一倍", call(args[0], ast.BinOp(args[1], ast.Mult(), ast.Constant(2)), *args[2:])


def mutants(source: str) -> list[tuple[str, str]]:
    """一个单元的全部改错：(说明, 改后的源码)；改后与原来相同的不算。"""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # 有 % 或 ! 的单元
        return []
    found, seen = [], {ast.unparse(tree)}
    for path, node in _walk(tree):
        parent = _at(tree, path[:-1]) if path else None
        for kind, new in slips(node, parent):
            changed = copy.deepcopy(tree)
            _put(changed, path, copy.deepcopy(new))
            try:
                text = ast.unparse(ast.fix_missing_locations(changed))
                ast.parse(text)
            except (SyntaxError, ValueError):
                continue
            if text not in seen:
                seen.add(text)
                what = ast.unparse(node) if not isinstance(node, ast.For) else ast.unparse(node).splitlines()[0]
                became = ast.unparse(new) if not isinstance(new, ast.For) else "…"
                where = f"（{_statement(tree, path)[:60]}）" if len(what) + len(became) < 12 else ""  # 太短的说不清是哪一处
                found.append((f"{kind}：{what[:90]} → {became[:90]}{where}".strip(), text))
    return found


def cell_mutants(cell: nbformat.NotebookNode, index: int, only: set[int]) -> list[tuple[str, str]]:
    """第 ``index`` 格的全部改错；文字、准备单元、不在 ``only`` 里的（空的就是都要）没有。"""
    skipped = cell.cell_type != "code" or cell.source.startswith("# @title") or (only and index not in only)
    return [] if skipped else mutants(cell.source)


def _statement(tree: ast.AST, path: tuple) -> str:
    """``path`` 所在的那一句，写成一行。"""
    inside = [_at(tree, path[:length]) for length in range(len(path) + 1)]
    return " ".join(ast.unparse([each for each in inside if isinstance(each, ast.stmt)][-1]).split())


class Kernel:
    """进程里的 IPython，跑一个单元，交回读者看得见的：有没有异常，印了哪些 ✗。"""

    def __init__(self) -> None:
        os.environ["MPLBACKEND"] = "agg"
        import torch
        from IPython.core.interactiveshell import InteractiveShell

        torch.set_num_threads(1)
        torch.set_num_threads = lambda count: None  # fork 之后，多线程的算子会停住
        InteractiveShell.colors = "nocolor"
        self.shell = InteractiveShell.instance()

    def run(self, source: str, expected_error: bool = False) -> tuple[bool, list[str]]:
        from IPython.utils.capture import capture_output

        with capture_output() as shown:
            result = self.shell.run_cell(source, store_history=False)
        text = shown.stdout + "".join(str(output.data.get("text/plain", "")) for output in shown.outputs)
        if result.result is not None:
            text += repr(result.result)
        import matplotlib.pyplot as plt

        plt.close("all")
        return result.success or expected_error, [line for line in text.splitlines() if "✗" in line]


def sections(cells: list) -> Iterator[list[int]]:
    """各节的代码单元，按在笔记里的次序；一节到下一个二级标题为止。"""
    current: list[int] = []
    for index, cell in enumerate(cells):
        if cell.cell_type == "markdown" and re.match(r"##? ", cell.source):
            if current:
                yield current
            current = []
        elif cell.cell_type == "code":
            current.append(index)
    if current:
        yield current


class Hunt:
    """一章的全部改错，逐个试。"""

    def __init__(self, path: Path, limit: float, jobs: int, only: set[int], reasons: dict[str, str]) -> None:
        self.cells = nbformat.read(path, 4).cells
        self.limit, self.jobs, self.only, self.path, self.reasons = limit, jobs, only, path, reasons
        self.survivors: list[tuple[int, str]] = []
        self.slow: list[tuple[int, str]] = []
        self.tried = 0

    def may_fail(self, index: int) -> bool:
        return "raises-exception" in self.cells[index].metadata.get("tags", [])

    def seen(self, kernel: Kernel, source: str, rest: list[int], first: int) -> bool:
        """改过的单元与本节余下的，看得见错吗。"""
        for index, text in [(first, source), *((k, self.cells[k].source) for k in rest)]:
            fine, crosses = kernel.run(text, self.may_fail(index))
            if not fine or set(crosses) - self.usual[index]:
                return True
        return False

    def go(self) -> None:
        kernel, self.usual = Kernel(), {}
        os.chdir(self.path.parent)
        children: dict[int, tuple[int, str, float]] = {}
        for section in sections(self.cells):
            for place, index in enumerate(section):
                cell = self.cells[index]
                pending = cell_mutants(cell, index, self.only)
                # 本节余下的单元原来印的 ✗（有的单元就是演示错误的），先在一个子进程里量出来
                if pending and any(k not in self.usual for k in section[place:]):
                    self.usual |= self._measure(kernel, section[place:])
                for what, text in pending:
                    while len(children) >= self.jobs:
                        self._reap(children)
                    pid = os.fork()
                    if pid == 0:
                        code = 3
                        try:
                            with open(os.devnull, "w") as sink, redirect_stdout(sink), redirect_stderr(sink):
                                code = 0 if self.seen(kernel, text, section[place + 1 :], index) else 1
                        finally:
                            os._exit(code)
                    children[pid] = (index, what, time.monotonic())
                    self.tried += 1
                while children:
                    self._reap(children)
                fine, _ = kernel.run(cell.source, self.may_fail(index))
                if not fine:
                    raise SystemExit(f"{self.path.name} 第 {index} 格原样就跑不过；先修好它。")

    def _measure(self, kernel: Kernel, section: list[int]) -> dict[int, set[str]]:
        read, write = os.pipe()
        if (pid := os.fork()) == 0:
            try:
                found = {index: kernel.run(self.cells[index].source, self.may_fail(index))[1] for index in section}
                os.write(write, json.dumps(found).encode())
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as stream:
            found = json.loads(stream.read() or b"{}")
        os.waitpid(pid, 0)
        return {int(index): set(lines) for index, lines in found.items()}

    def _reap(self, children: dict[int, tuple[int, str, float]]) -> None:
        """等一个子进程结束；超时的杀掉，没有结论。"""
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                break
            now = time.monotonic()
            for each, (_, _, started) in children.items():
                if now - started > self.limit:
                    os.kill(each, signal.SIGKILL)
            time.sleep(0.01)
        if pid not in children:
            return
        index, what, _ = children.pop(pid)
        if os.WIFSIGNALED(status) or os.WEXITSTATUS(status) > 1:  # 超时，或者工具自己出错：没有结论，不算看得见
            self.slow.append((index, what))
            print(f"没跑完 [{index}] {what}", flush=True)
        elif os.WEXITSTATUS(status) == 1:
            self.survivors.append((index, what))
            if what not in self.reasons:
                print(f"看不见 [{index}] {what}", flush=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapter", help="章号，如 05")
    parser.add_argument("--cell", type=int, nargs="*", default=[], help="只改这几格（Markdown 与代码一起数，从 0）")
    parser.add_argument("--limit", type=float, default=120, help="一处错误至多跑多少秒（默认 120）")
    parser.add_argument("--jobs", type=int, default=1, help="同时跑几个（默认 1）")
    parser.add_argument("--list", action="store_true", help="只列出会改哪些地方，不运行")
    options = parser.parse_args(arguments)
    (path,) = (ROOT / "notebooks").glob(f"{options.chapter}_*.ipynb")
    if options.list:
        for index, cell in enumerate(nbformat.read(path, 4).cells):
            for what, _ in cell_mutants(cell, index, set(options.cell)):
                print(f"[{index}] {what}")
        return 0
    reasons = explained(options.chapter)
    hunt = Hunt(path, options.limit, options.jobs, set(options.cell), reasons)
    started = time.monotonic()
    hunt.go()
    unseen = [(index, what) for index, what in hunt.survivors if not reasons.get(what, "").startswith("等价")]
    bare = [(index, what) for index, what in unseen if what not in reasons]
    stale = [] if options.cell else sorted(reasons.keys() - {what for _, what in hunt.survivors + hunt.slow})
    counted = hunt.tried - (len(hunt.survivors) - len(unseen)) - len(hunt.slow)
    rate = 1 - len(unseen) / max(1, counted)
    for what in stale:
        print(f"道理已经用不着：{what}")
    print(
        f"{path.name}：{hunt.tried} 处，等价 {len(hunt.survivors) - len(unseen)}，没跑完 {len(hunt.slow)}；其余 {counted} 处看得见 {rate:.1%}，"
        f"没有写道理的 {len(bare)}；{time.monotonic() - started:.0f} 秒"
    )
    return int(rate < 0.95 or bool(bare) or bool(stale))


def explained(chapter: str) -> dict[str, str]:
    """``tools/unseen/`` 里写明道理的改动 → 道理。"""
    path, reasons, reason = ROOT / f"tools/unseen/{chapter}.txt", {}, ""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        if line.startswith("# "):
            reason = line[2:]
        elif line.strip():
            reasons[line.strip()] = reason
    return reasons


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    raise SystemExit(main(sys.argv[1:]))
