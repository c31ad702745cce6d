"""pytest 的插件，让 nbval 看见它本来看不见的：没有执行过的单元、变了样的图、被忽略的单元里的警告、死掉的内核。

nbval 逐字比较文字输出，不比较图像。这里给每个笔记单元加一道检查：重跑得到的图与存着的图应当画着同样的东西。
怎样才算同样，有两种标准，由图自己带着的来历（``vaelab/provenance.py``）决定用哪一种：

- 由公式画出的图，在任何机器上都一样：逐像素地比，画的数也要相同。
- 训练过的模型的图，只在同一种机器上一样；换一种机器，须由同样的代码画出，写着同样的字，每条曲线的高低与走向相近。
"""

import base64
import io
import math
import os
import signal
import time
from collections.abc import Callable
from queue import Empty

import numpy as np
import psutil
import pytest
from PIL import Image, ImageSequence

from vaelab import provenance

try:
    from nbval.plugin import IPyNbCell
except ImportError:  # 只跑 tests/ 用不着 nbval
    IPyNbCell = ()

# 允许挪动的像素数，与允许的差异。同一版 matplotlib 画的图几乎逐字节相同，只容许另一种 freetype 的抗锯齿；
# 换一版 matplotlib，图例与坐标轴会挪动好几个像素（实测 3.9 与 3.11 画同一批图，差异不到 0.3），只认得出大的变化。
SAME_VERSION, OTHER_VERSION = (3, 0.1), (8, 0.45)
BITMAP = ("亮度", "纹理", "色标")  # 来历里说位图的几串数，见 provenance.content


def figure_difference(new: bytes, old: bytes) -> float:
    """两张图（PNG 或 GIF 的字节）画的东西差多少，以允许的差异为 1；尺寸、帧数或文字不合是无穷大。"""
    if new == old:
        return 0.0
    ours, stored = provenance.read(new), provenance.read(old)
    if ours is None or stored is None:  # 不是笔记的内核画的，或像素后来被改过
        return _pixel_difference(new, old)
    elsewhere = ours["machine"] != stored["machine"] or not provenance.repeatable(ours["machine"])
    if ours["trained"] and stored["trained"] and elsewhere:
        return max(_trained_difference(ours, stored), _ink_difference(new, old))
    return max(_pixel_difference(new, old), _content_difference(ours, stored, _same))


def _content_difference(new: dict, old: dict, measure: Callable[[str, np.ndarray, np.ndarray], float]) -> float:
    """两张图里的文字与各串数差多少；文字不同、曲线的条数或各条的点数不同是无穷大。"""
    shapes = [[(name, len(values)) for name, values in each["series"]] for each in (new, old)]
    if new["words"] != old["words"] or shapes[0] != shapes[1]:
        return math.inf
    found: dict[str, list[float]] = {}  # 位图按种类合起来取平均：几十张特征图里，总有几张在别处不同；其余各算各的
    for (name, a), (_, b) in zip(new["series"], old["series"]):
        if a:
            kind = name.split(" ", 1)[1]
            found.setdefault(kind if kind in BITMAP else name + str(len(found)), []).append(measure(kind, np.array(a), np.array(b)))
    return max((float(np.mean(values)) for values in found.values()), default=0.0)


def _same(kind: str, new: np.ndarray, old: np.ndarray) -> float:
    """公式画出的一串数：平均相差不到范围的百分之一。"""
    return float(np.abs(new - old).mean() / _size(old)) / 0.01


def _size(values: np.ndarray) -> float:
    """一串数的范围；几乎是常数的，以它的大小为准。"""
    return max(float(np.ptp(values)), 1e-3 * float(np.abs(values).max()), 1e-12)


def _trained_difference(new: dict, old: dict) -> float:
    """训练过的模型的图，在另一种机器上：同样的代码、同样的字，每串数的走向与大小都相近。"""
    return math.inf if new["code"] != old["code"] else _content_difference(new, old, _alike)


def _alike(kind: str, new: np.ndarray, old: np.ndarray) -> float:
    """训练得来的一串数。

    走向：平均相差不到范围的四分之一；大小：范围与最大的绝对值，都在 1.6 倍以内。范围不到大小的一成，就只看大小。
    位图的各块亮度在 0 与 1 之间，相差不到 0.25；纹理（相邻像素相差多少，0 与 1 之间）1.9 倍以内；特征图的色标，三倍以内。
    """
    if kind == "亮度":
        return float(np.abs(new - old).mean()) / 0.25
    if kind == "纹理":
        return float(np.abs(np.log((new + 0.005) / (old + 0.005))).max()) / math.log(1.9)
    largest = [float(np.abs(values).max()) + 1e-6 for values in (new, old)]
    scale = abs(math.log(largest[0] / largest[1]))
    if kind == "色标":
        return scale / math.log(3)
    spread = [float(np.ptp(values)) + 1e-6 for values in (new, old)]
    if max(spread) < 0.1 * max(largest):
        return scale / math.log(1.6)
    scale = max(scale, abs(math.log(spread[0] / spread[1])))
    return max(float(np.abs(new - old).mean()) / spread[1] / 0.25, scale / math.log(1.6))


def _ink_difference(new: bytes, old: bytes) -> float:
    """画上了东西的像素（与左上角的底色不同），两张图的多少应在两倍以内；空白的图由此认出。"""
    ink = []
    for data in (new, old):
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.int16)
        ink.append(float((np.abs(pixels - pixels[0, 0]).max(axis=-1) > 8).mean()) + 1e-6)
    return abs(math.log(ink[0] / ink[1])) / math.log(2)


def _pixel_difference(new: bytes, old: bytes) -> float:
    """逐像素地比。

    每个像素与另一张图同一处附近几个像素以内的取值范围相比，只算越出范围的部分：
    挪动一点的文字、换一种抗锯齿都不算，一条去了别处的曲线两头都算。差异是它在全图的平均，单位是 1/255 灰度。
    只有刻度上的数字不同的两张图，这样分不出来；那要看来历里记着的数。
    """
    images = [Image.open(io.BytesIO(data)) for data in (new, old)]
    same = images[0].info.get("Software") == images[1].info.get("Software")
    shift, limit = SAME_VERSION if same else OTHER_VERSION
    frames = [[frame.convert("RGB") for frame in ImageSequence.Iterator(image)] for image in images]
    if len(frames[0]) != len(frames[1]):
        return math.inf
    return max(_frame_difference(*pair, shift) for pair in zip(*frames)) / limit


def _frame_difference(new: Image.Image, old: Image.Image, shift: int) -> float:
    if any(abs(a - b) > 0.1 * b for a, b in zip(new.size, old.size)):
        return math.inf
    a, b = (np.asarray(image.resize(old.size), np.int16) for image in (new, old))
    return float(np.maximum(_outside(a, b, shift), _outside(b, a, shift)).max(axis=-1).mean())


def _outside(image: np.ndarray, other: np.ndarray, shift: int) -> np.ndarray:
    """``image`` 的像素越出 ``other`` 附近取值范围多少，``[H, W, 3]``。"""
    low = high = np.pad(other, [(shift, shift), (shift, shift), (0, 0)], mode="edge")
    width = 1  # 已经覆盖的窗口宽，每步至多翻倍，到 2·shift + 1 为止
    while step := min(width, 2 * shift + 1 - width):
        low = np.minimum(low[step:], low[:-step])
        low = np.minimum(low[:, step:], low[:, :-step])
        high = np.maximum(high[step:], high[:-step])
        high = np.maximum(high[:, step:], high[:, :-step])
        width += step
    return np.maximum(np.maximum(low - image, image - high), 0)


def figures(outputs: list) -> list[bytes]:
    """单元的各个输出里的图。"""
    return [base64.b64decode(each["data"]["image/png"]) for each in outputs if "image/png" in each.get("data", {})]


def pytest_configure(config: pytest.Config) -> None:
    """装着 nbval 就用它，用这个环境的 Python；``-p no:nbval`` 时没有它的选项，所以不写在 pyproject.toml 里。"""
    option = config.option
    if not hasattr(option, "nbval"):
        return
    option.nbval = option.nbval or not option.nbval_lax
    option.nbval_current_env = option.nbval_current_env or not option.nbval_kernel_name
    option.nbval_cell_timeout = min(option.nbval_cell_timeout, 300.0)
    option.nbval_kernel_startup_timeout = max(option.nbval_kernel_startup_timeout, 120.0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item):
    """别的程序占着 CPU 时，内核少用几个线程。

    两个线程要等齐才能往下走，各被抢走一半时间，训练会慢四五倍；只用空着的核，慢不到两倍。已经指定了线程数的，照旧。
    """
    starting = isinstance(item, IPyNbCell) and item.parent.kernel is None and "OMP_NUM_THREADS" not in os.environ
    if starting and (threads := free_threads()):
        os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        return (yield)
    finally:
        if starting:
            os.environ.pop("OMP_NUM_THREADS", None)


def free_threads(interval: float = 0.3) -> int | None:
    """别的程序占着半个核以上时，还剩几个核（至少 1）；都闲着则是 None，不必改。"""
    cores = os.cpu_count() or 1
    taken = psutil.cpu_percent(interval) / 100 * cores
    return max(1, round(cores - taken)) if taken > 0.5 else None


class KernelDied(Exception):
    """内核的进程没了；信息说明怎样没的。"""


def watch(kernel: object) -> None:
    """等内核的消息时，每秒看一眼它还在不在；nbval 自己要等到超时，然后只说超时。"""
    usual = kernel.get_message

    def get_message(stream: str, timeout: float | None = None) -> dict:
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            try:
                return usual(stream, timeout=max(0.0, min(1.0, left)))
            except Empty:
                if not kernel.is_alive():
                    raise KernelDied(how_it_ended(kernel)) from None
                if left <= 1:
                    raise

    kernel.get_message, kernel.watched = get_message, True


def how_it_ended(kernel: object) -> str:
    """内核的退出方式：信号的名字，或退出码。"""
    process = getattr(kernel.km.provisioner, "process", None)
    code = process.poll() if process else None
    if code is None or code >= 0:
        return "退出码未知" if code is None else f"退出码 {code}"
    name = signal.Signals(-code).name
    return f"信号 {name}" + ("，多半是内存用尽，被系统结束" if name == "SIGKILL" else "")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """nbval 认可一个笔记单元之后，再查它不查的三件事；内核死了，说清死在哪一格。"""
    if not isinstance(item, IPyNbCell):
        return (yield)
    book = item.parent
    if getattr(book, "died_in", None):
        item.raise_cell_error(f"没有运行：内核在第 {book.died_in[0]} 格已经结束（{book.died_in[1]}）。")
    if book.kernel and not getattr(book.kernel, "watched", False):
        watch(book.kernel)
    try:
        result = yield
    except KernelDied as error:
        book.died_in = (item.cell_num, error)
        item.raise_cell_error(f"内核在这一格里结束了（{error}）。")
    if item.cell.execution_count is None:
        item.raise_cell_error("这一格没有执行过；请重新运行全部单元并保存。")
    for each in item.test_outputs:
        if each.get("name") == "stderr":
            item.raise_cell_error("这一格往 stderr 写了东西：" + each["text"])
    if item.options["check"]:
        new, old = figures(item.test_outputs), figures(item.cell.outputs)
        if len(new) != len(old):
            item.raise_cell_error(f"这一格画出 {len(new)} 张图，存着的是 {len(old)} 张；请重新运行并保存。")
        for index, (ours, stored) in enumerate(zip(new, old)):
            difference = figure_difference(ours, stored)
            item.user_properties.append((f"图 {index + 1} 的差异", f"{difference:.3g}"))
            if difference > 1:
                item.raise_cell_error(f"第 {index + 1} 张图与存着的不同，差异是允许的 {difference:.1f} 倍。")
    return result
