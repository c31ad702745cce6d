"""让 ``pytest --nbval`` 看见它本来看不见的：没有执行过的单元、变了样的图、被忽略的单元里的警告。

nbval 逐字比较文字输出，不比较图像。这里给每个笔记单元加一道检查：重跑得到的图与存着的图应当画着同样的东西。
"""

import base64
import io

import numpy as np
import pytest
from PIL import Image, ImageSequence

try:
    from nbval.plugin import IPyNbCell
except ImportError:  # 只跑 tests/ 用不着 nbval
    IPyNbCell = ()

# 允许挪动的像素数，与允许的差异。同一版 matplotlib 画的图几乎逐字节相同，只容许另一种 freetype 的抗锯齿；
# 换一版 matplotlib，图例与坐标轴会挪动好几个像素（实测 3.9 与 3.11 画同一批图，差异不到 0.3），只认得出大的变化。
SAME_VERSION, OTHER_VERSION = (3, 0.1), (8, 0.45)


def figure_difference(new: bytes, old: bytes) -> float:
    """两张图（PNG 或 GIF 的字节）画的东西差多少，以允许的差异为 1；尺寸或帧数不合是无穷大。

    每个像素与另一张图同一处附近几个像素以内的取值范围相比，只算越出范围的部分：
    挪动一点的文字、换一种抗锯齿都不算，一条去了别处的曲线两头都算。差异是它在全图的平均，单位是 1/255 灰度。
    只有刻度上的数字不同的两张图，这样分不出来。
    """
    if new == old:
        return 0.0
    images = [Image.open(io.BytesIO(data)) for data in (new, old)]
    same = images[0].info.get("Software") == images[1].info.get("Software")
    shift, limit = SAME_VERSION if same else OTHER_VERSION
    frames = [[frame.convert("RGB") for frame in ImageSequence.Iterator(image)] for image in images]
    if len(frames[0]) != len(frames[1]):
        return float("inf")
    return max(_frame_difference(*pair, shift) for pair in zip(*frames)) / limit


def _frame_difference(new: Image.Image, old: Image.Image, shift: int) -> float:
    if any(abs(a - b) > 0.1 * b for a, b in zip(new.size, old.size)):
        return float("inf")
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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """nbval 认可一个笔记单元之后，再查它不查的三件事。"""
    result = yield
    if not isinstance(item, IPyNbCell):
        return result
    if item.cell.execution_count is None:
        item.raise_cell_error("这一格没有执行过；请重新运行全部单元并保存。")
    for each in item.test_outputs:
        if each.get("name") == "stderr":
            item.raise_cell_error("这一格往 stderr 写了东西：" + each["text"])
    if item.options["check"]:
        new, old = figures(item.test_outputs), figures(item.cell.outputs)
        if len(new) != len(old):
            item.raise_cell_error(f"这一格画出 {len(new)} 张图，存着的是 {len(old)} 张；请重新运行并保存。")
        for index, difference in enumerate(map(figure_difference, new, old)):
            if difference > 1:
                item.raise_cell_error(f"第 {index + 1} 张图与存着的不同，差异是允许的 {difference:.1f} 倍。")
    return result
