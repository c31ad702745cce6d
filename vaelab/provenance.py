"""每张图从哪里来：画在哪种机器上，有没有用到训练过的模型，画了些什么。

由公式画出的图，在任何机器上都一样；训练过的模型的图只在同一种机器上一样，因为舍入的差别经过几百步训练会放大到看得见。
两种图要用不同的办法比较，所以每张图自己带着来历：:func:`install` 让内核在显示图的时候，往 PNG 里写一段 JSON，
:func:`read` 取出它。比较由 tests/figures_plugin.py 去做，约定写在 CONTRIBUTING.md。

一格用到了训练过的模型，是指下面三条里有一条成立（所以不必列一张名单）：

1. 这一格里有优化器改动了网络的权重（至少二维的参数；一两个数的玩具问题不放大舍入）；
2. 它读的名字里，有优化器改动过的权重、含着它的模型，或优化器自己；
3. 它读的名字，是前面这样的一格写下的。
"""

from __future__ import annotations

import ast
import base64
import hashlib
import inspect
import json
import platform
import re
import struct
import sys
import types
import zlib
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.collections import Collection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from vanilla_vae import VanillaVAE

KEY = b"vaelab"  # PNG 里这一段的名字
POINTS = 32  # 一条曲线至多记下这么多个点
PNG = b"\x89PNG\r\n\x1a\n"

# ---------------------------------------------------------------- 哪种机器


@cache
def _processor() -> str:
    """处理器的厂商、型号与指令集；后者只留一个摘要。"""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    text = info.read_text(encoding="utf-8", errors="replace")
    found = [re.search(rf"^{key}\s*:\s*(.*)$", text, re.MULTILINE) for key in ("vendor_id", "cpu family", "model", "flags")]
    vendor, family, model, flags = (each[1] if each else "" for each in found)
    return f"{vendor} {family}/{model} {hashlib.sha256(flags.encode()).hexdigest()[:6]}"


def machine() -> str:
    """这种机器的名字：名字相同，同样的程序训练出逐位相同的模型（GPU 除外，它的求和次序每次都可能不同）。

    认得出的写出来，认不出的由试算来分：把一个小模型训练三步，权重的每一位都进摘要。
    """
    parts = [sys.platform, platform.machine(), _processor(), torch.backends.cpu.get_cpu_capability()]
    parts += [f"{torch.get_num_threads()} 线程", f"torch {torch.__version__}"]
    parts += [] if torch.backends.mkldnn.enabled and torch.backends.mkldnn.is_available() else ["没有 oneDNN"]
    if torch.cuda.is_available():
        parts.append(f"cuda {torch.cuda.get_device_name()}")
    name = "，".join(parts)
    return f"{name}，试算 {_trial(name)}"


@cache
def _trial(name: str) -> str:
    """在名为 ``name`` 的机器上（只作缓存的键），小模型在 CPU 上训练三步之后全部权重的摘要；不动全局的随机数。"""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        model = VanillaVAE(3, 8, [8, 16, 32], 32)
        optimizer = torch.optim.Adam(model.parameters())
        for _ in range(3):
            images = torch.rand(16, 3, 32, 32) * 2 - 1
            optimizer.zero_grad()
            model.loss_function(*model(images), M_N=1e-3)["loss"].backward()
            optimizer.step()
    return hashlib.sha256(b"".join(each.detach().numpy().tobytes() for each in model.state_dict().values())).hexdigest()[:8]


def repeatable(name: str) -> bool:
    """同一种机器上，训练是不是每次都一样。"""
    return "cuda " not in name


# ---------------------------------------------------------------- 有没有用到训练过的模型


class _Names(ast.NodeVisitor):
    """一格代码读了哪些名字（在它自己写下之前）、写了哪些、就地改了哪些；按执行的先后走。"""

    CHANGING = {"append", "extend", "insert", "update", "add", "setdefault", "load_state_dict"}

    def __init__(self) -> None:
        self.reads, self.writes, self.bound = set(), set(), set()

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self.reads |= {node.id} - self.bound
        else:
            self.bound.add(node.id)
            self.writes.add(node.id)

    def _in_order(self, *parts: ast.AST | list | None) -> None:
        for part in parts:
            for node in part if isinstance(part, list) else [part] * (part is not None):
                self.visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        self._in_order(node.value, node.targets)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name):
            self.reads |= {node.target.id} - self.bound
        self._in_order(node.value, node.target)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._in_order(node.value, node.target)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self._in_order(node.value, node.target)

    def visit_For(self, node: ast.For) -> None:
        self._in_order(node.iter, node.target, node.body, node.orelse)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._in_order(node.iter, node.target, node.ifs)

    def _comprehension(self, node: ast.AST) -> None:
        outside = set(self.writes)
        self._in_order(node.generators)
        self._in_order(*(getattr(node, name, None) for name in ("key", "value", "elt")))
        self.writes = outside | {n.target.id for n in ast.walk(node) if isinstance(n, ast.NamedExpr)}

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _comprehension

    def visit_Lambda(self, node: ast.Lambda) -> None:
        inner = _Names()
        inner.bound = self.bound | {each.arg for each in ast.walk(node.args) if isinstance(each, ast.arg)}
        inner.visit(node.body)
        self.reads |= inner.reads

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """函数体等到被调用才走：由 :func:`_reach` 从函数对象里看它读了什么。"""
        self._in_order(node.decorator_list, node.args.defaults)
        self.bound.add(node.name)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.bound.add(node.name)

    def _changed(self, node: ast.AST) -> None:
        """``a.b[c] = …`` 或 ``a.append(…)`` 改的是 a。"""
        while isinstance(node, (ast.Attribute, ast.Subscript, ast.Starred)):
            node = node.value
        if isinstance(node, ast.Name):
            self.writes.add(node.id)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if not isinstance(node.ctx, ast.Load):
            self._changed(node)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if not isinstance(node.ctx, ast.Load):
            self._changed(node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Attribute) and node.func.attr in self.CHANGING:
            self._changed(node.func.value)
        self.generic_visit(node)


def names_of(source: str) -> tuple[set[str], set[str]]:
    """一格代码读的名字与写的名字；不合语法（例如魔法命令）就都是空的。"""
    names = _Names()
    try:
        names.visit(ast.parse(source))
    except SyntaxError:
        return set(), set()
    return names.reads, names.writes


def _trained(value: object, depth: int = 3) -> bool:
    """``value`` 是、或（几层之内）含有优化器改动过的东西。"""
    if isinstance(value, torch.Tensor):
        return getattr(value, "_stepped", False)
    if isinstance(value, nn.Module):
        return any(getattr(parameter, "_stepped", False) for parameter in value.parameters())
    if isinstance(value, torch.optim.Optimizer):
        return any(_trained(parameter) for group in value.param_groups for parameter in group["params"])
    if isinstance(value, dict):
        value = list(value.values())
    return depth > 0 and isinstance(value, (list, tuple, set)) and any(_trained(each, depth - 1) for each in value)


def _reach(names: set[str], namespace: dict) -> set[str]:
    """``names``，加上其中的函数（笔记里定义的）又读的名字，一层层展开。"""
    found, todo = set(), list(names)
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        value = namespace.get(name)
        value = inspect.unwrap(value) if isinstance(value, types.FunctionType) else value  # @torch.no_grad() 里面那一个
        codes = [value.__code__] if isinstance(value, types.FunctionType) and value.__globals__ is namespace else []
        while codes:
            code = codes.pop()
            todo += [each for each in code.co_names if each in namespace]
            codes += [each for each in code.co_consts if isinstance(each, types.CodeType)]
    return found


class Tracker:
    """跟着一个内核，一格一格地记：哪些名字来自训练。"""

    def __init__(self, namespace: dict) -> None:
        self.namespace, self.tainted = namespace, set()
        self.source, self.reads, self.writes, self.stepped = "", set(), set(), False

    def optimizer_stepped(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.dim() >= 2:
                    self.stepped = parameter._stepped = True

    def start(self, source: str) -> None:
        """一格开始。"""
        self.source, self.stepped = source, False
        self.reads, self.writes = names_of(source)

    @property
    def cell_is_trained(self) -> bool:
        """正在运行的这一格有没有用到训练过的模型，到此刻为止。"""
        reach = _reach(self.reads, self.namespace)
        values = [self.namespace.get(name) for name in reach | self.writes]
        return self.stepped or bool(reach & self.tainted) or any(map(_trained, values))

    def finish(self) -> None:
        """一格结束：它写下的名字从此带着、或不再带着训练的痕迹。"""
        if self.cell_is_trained:
            self.tainted |= self.writes
        else:
            self.tainted -= self.writes


# ---------------------------------------------------------------- 画了些什么


def _sampled(values: object, log: bool = False) -> list[float]:
    """一串数里等距地取至多 ``POINTS`` 个，四位有效数字；对数轴上记它的常用对数，非有限的数略去。"""
    flat = np.asarray(values, dtype=float).ravel()
    flat = flat[np.isfinite(flat) & (flat > 0)] if log else flat[np.isfinite(flat)]
    flat = np.log10(flat) if log else flat
    picked = flat[np.linspace(0, len(flat) - 1, min(POINTS, len(flat))).round().astype(int)] if len(flat) else flat
    return [float(f"{value:.4g}") for value in picked]


def _words(text: str) -> str:
    """去掉数，只留字：训练得到的数印在图上，各机器不同；对数轴上 10 的几次方也是数，画几个随 matplotlib 的版本。"""
    return re.sub(r"[-−+]?\d[\d.,]*(e[-+]?\d+)?%?|nan|inf", "#", text.replace(r"\mathdefault", ""))


def _bitmap(image: AxesImage) -> tuple[list[float], list[float]]:
    """一幅位图，按它显示出来的颜色：缩成至多 4×4 块的亮度（0–1）；以及横、竖两个方向相邻像素的平均相差（噪声远比图像大）。"""
    grey = np.asarray(image.make_image(None, unsampled=True)[0], dtype=float)[..., :3].mean(axis=2) / 255
    blocks = [part for row in np.array_split(grey, min(4, grey.shape[0])) for part in np.array_split(row, min(4, row.shape[1]), axis=1)]
    steps = [np.abs(np.diff(grey, axis=axis)) for axis in (1, 0)]
    return _sampled([block.mean() for block in blocks]), _sampled([step.mean() if step.size else 0.0 for step in steps])


def content(figure: Figure) -> dict:
    """图里有什么：``words`` 是全部文字（数换成 #，纯粹的数略去），``series`` 是一串 ``(名字, 数)``，次序就是画的次序。"""
    words, series = [_words(text.get_text()) for text in figure.texts], []
    for number, axes in enumerate(figure.axes):
        words += [_words(each) for each in (axes.get_title(), axes.get_xlabel(), axes.get_ylabel())]
        words += [_words(text.get_text()) for text in axes.texts]
        if legend := axes.get_legend():
            words += [_words(text.get_text()) for text in legend.get_texts()]
        words += [_words(text.get_text()) for axis in (axes.xaxis, axes.yaxis) for text in axis.get_ticklabels()]
        log = [axes.get_xscale() == "log", axes.get_yscale() == "log"]
        for name, limits, is_log in (("横轴", axes.get_xlim(), log[0]), ("纵轴", axes.get_ylim(), log[1])):
            series.append((f"{number} {name}", _sampled(limits, is_log)))
        for line in filter(Artist.get_visible, axes.lines):
            for name, values, is_log in (("线的 x", line.get_xdata(orig=False), log[0]), ("线的 y", line.get_ydata(orig=False), log[1])):
                series.append((f"{number} {name}", _sampled(values, is_log)))
        boxes = [patch.get_path().get_extents(patch.get_patch_transform()) for patch in filter(Artist.get_visible, axes.patches)]
        if boxes:
            corners = np.array([[box.x0, box.y0, box.x1, box.y1] for box in boxes])
            for name, column, is_log in zip(("左", "下", "右", "上"), corners.T, (*log, *log)):
                series.append((f"{number} 块的{name}", _sampled(column, is_log)))
        for each in filter(Artist.get_visible, axes.collections):
            series.append((f"{number} 面", _extent(each)))
        for image in filter(Artist.get_visible, axes.images):
            brightness, texture = _bitmap(image)
            series += [(f"{number} 亮度", brightness), (f"{number} 纹理", texture), (f"{number} 色标", _sampled(image.get_clim()))]
    return {"words": [each for each in words if re.search(r"\w", each)], "series": series}


def _extent(collection: Collection) -> list[float]:
    """填色的面、散点的范围与重心。"""
    points = (
        [path.vertices for path in collection.get_paths() if len(path.vertices)] if not len(collection.get_offsets()) else [collection.get_offsets()]
    )
    if not points:
        return []
    points = np.ma.filled(np.ma.concatenate(points).astype(float), np.nan)
    points = points[np.isfinite(points).all(axis=1)]
    return [] if not len(points) else _sampled([*points.min(axis=0), *points.mean(axis=0), *points.max(axis=0)])


# ---------------------------------------------------------------- 写进 PNG，与读出来


def _chunks(png: bytes):
    """逐段给出 ``(名字, 内容, 整段的起止)``；不是 PNG 就一段也没有。"""
    place = len(PNG)
    while png[: len(PNG)] == PNG and place + 8 <= len(png):
        (length,) = struct.unpack(">I", png[place : place + 4])
        name, end = png[place + 4 : place + 8], place + 12 + length
        yield name, png[place + 8 : end - 4], (place, end)
        place = end


def _pixels(png: bytes) -> str:
    """像素数据的摘要：来历只对它所跟着的那些像素作数。"""
    return hashlib.sha256(b"".join(data for name, data, _ in _chunks(png) if name in (b"IHDR", b"IDAT"))).hexdigest()[:16]


def write(png: bytes, label: dict) -> bytes:
    """在 PNG 的头之后插入来历。"""
    text = json.dumps({**label, "pixels": _pixels(png)}, ensure_ascii=False, separators=(",", ":"))
    body = b"iTXt" + KEY + b"\0\1\0\0\0" + zlib.compress(text.encode("utf-8"), 9)  # 关键字、压缩、语言与译名留空
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    after_header = next(_chunks(png))[2][1]
    return png[:after_header] + chunk + png[after_header:]


def read(png: bytes) -> dict | None:
    """PNG 里的来历；没有，或者像素后来被改过，是 None。"""
    for name, data, _ in _chunks(png):
        if name == b"iTXt" and data.startswith(KEY + b"\0\1\0\0\0"):
            try:
                label = json.loads(zlib.decompress(data[len(KEY) + 5 :]))
            except (zlib.error, ValueError):
                return None
            return label if label.get("pixels") == _pixels(png) else None
    return None


def _code(source: str) -> str:
    """一格代码的摘要，与空白无关；不经语法树，``ast.dump`` 的写法随 Python 的版本而变。"""
    return hashlib.sha256("".join(source.split()).encode()).hexdigest()[:16]


_tracker: Tracker | None = None


def install() -> None:
    """在 Jupyter 的内核里，让每张显示出来的图带上来历；在别处什么也不做。再次调用没有作用。"""
    global _tracker
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None or not hasattr(shell, "kernel") or _tracker is not None:
        return
    tracker = _tracker = Tracker(shell.user_ns)
    register_optimizer_step_post_hook(tracker.optimizer_stepped)
    shell.events.register("pre_run_cell", lambda info: tracker.start(info.raw_cell))
    shell.events.register("post_run_cell", lambda result: tracker.finish())
    tracker.start(shell.get_parent().get("content", {}).get("code", ""))  # 正在运行的这一格，开头的事件已经错过

    plt.switch_backend(plt.get_backend())  # 内联的后端到第一次画图才登记自己的格式；先让它登记，再包在外面
    formatter = shell.display_formatter.formatters["image/png"]
    try:
        draw = formatter.lookup_by_type(Figure)
    except KeyError:  # 不是内联的后端，图不会出现在笔记里
        return

    def labelled(figure: Figure) -> str | None:
        png = draw(figure)
        if png is None:  # 空的图不显示
            return None
        png = png if isinstance(png, bytes) else base64.b64decode(png)
        try:
            trained = tracker.cell_is_trained
            label = {"machine": machine() if trained else "", "trained": trained, "code": _code(tracker.source), **content(figure)}
        except Exception:  # 图比来历要紧；没有来历的图逐像素地比，存进课程的图都应有来历（tests/test_notebooks.py）
            return base64.b64encode(png).decode()
        return base64.b64encode(write(png, label)).decode()

    formatter.for_type(Figure, labelled)
