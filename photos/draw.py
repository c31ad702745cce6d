"""重画 photos/ 里的全部图：``python photos/draw.py``。

每个图是一个函数，接收输出的文件夹，列在 :data:`FIGURES` 里。要模型的一张用 photos/explorer/ 里训练好的，
那个文件夹与动图 explorer.webp 由 ``python tools/explorer.py`` 造。
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tools")]  # 没有安装课程时也找得到 vaelab；tools 里有 explorer

from vaelab.plot import BLUE, GREEN, ORANGE, PURPLE, RED, SKY, use_chinese_font  # noqa: E402

INK, GREY, PALE = "#222222", "#888888", "#F4F4F4"


def _mix(color: str, amount: float) -> tuple[float, ...]:
    """``color`` 与白色按 ``amount``（0 全白，1 原色）混合，RGB 各在 [0, 1]。"""
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return tuple(1 - amount * (1 - rgb))


def _pixels(figure: Figure) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def _blank_axes(figure: Figure, width: float, height: float) -> Axes:
    """铺满整张图的坐标系，单位是英寸，左上角为原点。"""
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return axes


# ---------------------------------------------------------------- 转置卷积的动画

INPUT = np.arange(1, 10).reshape(3, 3)
KERNEL = np.outer([1, 2, 1], [1, 2, 1])
STRIDE, PADDING = 2, 1


def padding_strides_transposed(folder: Path) -> None:
    """``padding_strides_transposed.gif``：输入 3×3、核 3、步长 2、填充 1、没有 output_padding，输出 5×5。

    每个输入像素把整个核乘上自己的值、盖在画布上，重叠处相加；最后裁掉外圈。数是真的：终幅就是
    ``F.conv_transpose2d(INPUT, KERNEL, stride=2, padding=1)``。
    """
    use_chinese_font()
    side = (len(INPUT) - 1) * STRIDE + len(KERNEL)
    canvas = np.zeros((side, side), dtype=int)
    frames = [_stamp_frame(canvas, None, f"空画布：边长 (3−1)×2+3 = {side}；虚线以外一圈稍后裁掉")]
    for step, (i, j) in enumerate(np.ndindex(INPUT.shape), 1):
        top, left = i * STRIDE, j * STRIDE
        canvas[top : top + 3, left : left + 3] += INPUT[i, j] * KERNEL
        text = f"第 {step} 步：输入值 {INPUT[i, j]} 乘整个核，盖在画布上；下一个输入挪 {STRIDE} 格，重叠处相加"
        frames.append(_stamp_frame(canvas, (i, j), text))
    frames.append(_stamp_frame(canvas, None, "padding=1：裁掉画布最外一圈", crossed=True))
    frames.append(_stamp_frame(canvas, None, "剩下的 5×5 就是输出", cropped=True))
    durations = [2000] + [1100] * INPUT.size + [1800, 3000]

    # 各幅共用一张调色板，颜色才不会逐幅闪动。
    palette = Image.fromarray(np.vstack([np.asarray(frame) for frame in frames])).quantize(128)
    first, *rest = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    path = folder / "padding_strides_transposed.gif"
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0, optimize=True)


def _stamp_frame(
    canvas: np.ndarray,
    current: tuple[int, int] | None,
    text: str,
    *,
    crossed: bool = False,
    cropped: bool = False,
) -> Image.Image:
    width, height, cell = 7.6, 4.3, 0.42
    figure = Figure(figsize=(width, height), dpi=100)
    axes = _blank_axes(figure, width, height)
    title = "转置卷积：kernel_size=3，stride=2，padding=1"
    axes.text(width / 2, 0.28, title, ha="center", va="center", fontsize=13, color=INK)
    axes.text(width / 2, 4.05, text, ha="center", va="center", fontsize=12, color=INK)

    middle = 2.15
    small = middle - 1.5 * cell
    _cells(axes, 0.45, small, cell, INPUT, lambda i, j: BLUE, lambda i, j: 0.75 if (i, j) == current else 0.15)
    axes.text(0.45 + 1.5 * cell, small - 0.2, "输入 3×3", ha="center", fontsize=11, color=INK)
    axes.text(2.0, middle, "×", ha="center", va="center", fontsize=18, color=INK)
    _cells(axes, 2.28, small, cell, KERNEL, lambda i, j: ORANGE, lambda i, j: 0.6 if current else 0.2)
    axes.text(2.28 + 1.5 * cell, small - 0.2, "核 3×3", ha="center", fontsize=11, color=INK)
    arrow = FancyArrowPatch((3.72, middle), (4.18, middle), arrowstyle="-|>", mutation_scale=16, color=INK, lw=1.5)
    axes.add_patch(arrow)

    left, top, side = 4.35, middle - 3.5 * cell + 0.12, len(canvas)

    def is_ring(i: int, j: int) -> bool:
        return min(i, j) < PADDING or max(i, j) >= side - PADDING

    shown = np.where([[is_ring(i, j) for j in range(side)] for i in range(side)], 0, canvas) if cropped else canvas
    amount = shown / (16 * INPUT.max() / 4)  # 最深的一格是 36
    _cells(
        axes, left, top, cell, shown,
        lambda i, j: GREY if is_ring(i, j) else GREEN,
        lambda i, j: 0.75 * min(1.0, amount[i, j]) * (0.5 if is_ring(i, j) else 1),
        hide_zero=True, skip=is_ring if cropped else None,
    )  # fmt: skip
    inner = (left + cell * PADDING, top + cell * PADDING)
    extent = cell * (side - 2 * PADDING)
    axes.add_patch(Rectangle(inner, extent, extent, fill=False, ec=INK, lw=1.6, ls="-" if cropped else (0, (4, 3))))
    if current:
        corner = (left + current[1] * STRIDE * cell, top + current[0] * STRIDE * cell)
        axes.add_patch(Rectangle(corner, 3 * cell, 3 * cell, fill=False, ec=ORANGE, lw=3.5))
    if crossed:
        for i, j in np.ndindex(side, side):
            if is_ring(i, j):
                x, y = left + j * cell, top + i * cell
                axes.plot([x + 0.06, x + cell - 0.06], [y + 0.06, y + cell - 0.06], color=RED, lw=1.5)
    label = "输出 5×5" if cropped else "画布 7×7"
    axes.text(left + cell * side / 2, inner[1] - 0.14 if cropped else top - 0.1, label, ha="center", fontsize=11, color=INK)
    return _pixels(figure)


def _cells(
    axes: Axes,
    left: float,
    top: float,
    cell: float,
    values: np.ndarray,
    color: Callable[[int, int], str],
    amount: Callable[[int, int], float],
    *,
    hide_zero: bool = False,
    skip: Callable[[int, int], bool] | None = None,
) -> None:
    """画一张写着数的方格表，格子的深浅由 ``amount`` 给出（0 到 1）。"""
    for (i, j), value in np.ndenumerate(values):
        if skip and skip(i, j):
            continue
        face = _mix(color(i, j), amount(i, j))
        x, y = left + j * cell, top + i * cell
        axes.add_patch(Rectangle((x, y), cell, cell, fc=face, ec="white", lw=1.2))
        axes.add_patch(Rectangle((x, y), cell, cell, fill=False, ec=GREY, lw=0.5))
        if value or not hide_zero:
            dark = sum(face) < 1.3
            axes.text(
                x + cell / 2, y + cell / 2, str(value), ha="center", va="center", fontsize=10.5,
                color="white" if dark else INK,
            )  # fmt: skip


# ---------------------------------------------------------------- VAE 的结构


def vae_structure(folder: Path) -> None:
    """``1.webp``：默认宽度、64×64 图像时 VanillaVAE 的结构、各级形状与损失的两项。"""
    use_chinese_font()
    width, height = 8.0, 5.5
    figure = Figure(figsize=(width, height), dpi=200)
    axes = _blank_axes(figure, width, height)
    shapes = [(3, 64), (32, 32), (64, 16), (128, 8), (256, 4), (512, 2)]
    x_positions = [0.7, 1.72, 2.62, 3.5, 4.38, 5.28]
    top_row, bottom_row = 1.42, 4.08

    axes.text(3.0, 0.3, "编码器：5 级卷积，每级边长减半", ha="center", fontsize=12, color=BLUE)
    axes.text(3.0, 5.28, "解码器：5 级转置卷积，每级边长加倍，末尾 3×3 卷积与 Tanh", ha="center", fontsize=12, color=GREEN)
    for row, color, picture_sharpness in ((top_row, BLUE, 60.0), (bottom_row, GREEN, 9.0)):
        edges: list[float] = []
        for x, (channels, side) in zip(x_positions, shapes):
            if side == 64:
                left, right, below = _picture(axes, x, row, 1.1, _face(picture_sharpness))
            else:
                left, right, below = _slab(axes, x, row, channels, side, color)
            axes.text(x, below + 0.15, f"{channels}×{side}×{side}", ha="center", va="center", fontsize=9.5, color=INK)
            edges += [left - 0.05, right + 0.05]
        for a, b in zip(edges[1::2], edges[2::2]):  # 前一块的右缘到后一块的左缘
            start, end = (a, b) if row == top_row else (b, a)
            _arrow(axes, (start, row), (end, row), INK)
    axes.text(x_positions[0], 0.74, "图像 x", ha="center", fontsize=11, color=INK)
    axes.text(x_positions[0], 3.4, "重建 x̂", ha="center", fontsize=11, color=INK)

    # 右侧：分布的参数、重参数化
    _box(axes, 6.9, 0.98, 1.0, 0.42, "mu", PURPLE)
    _box(axes, 6.9, 1.86, 1.0, 0.42, "log_var", PURPLE)
    _arrow(axes, (5.7, 1.32), (6.38, 1.0), INK)
    _arrow(axes, (5.7, 1.5), (6.38, 1.84), INK)
    axes.text(5.85, 0.83, "展平 2048\n全连接", ha="center", va="center", fontsize=8.5, color=INK)
    _box(axes, 6.9, 2.92, 1.72, 0.66, "重参数化\n$z = \\mu + \\sigma\\cdot\\varepsilon$", ORANGE)
    _arrow(axes, (7.25, 2.08), (7.1, 2.58), INK)
    _arrow(axes, (7.4, 0.98), (7.62, 2.58), INK, curve=-0.25)
    axes.text(6.5, 2.36, r"$\sigma=e^{\frac{1}{2}\mathtt{log\_var}}$", ha="center", va="center", fontsize=11, color=INK)
    _box(axes, 5.05, 2.92, 1.2, 0.5, "$\\varepsilon \\sim N(0, I)$", SKY)
    _arrow(axes, (5.66, 2.92), (6.03, 2.92), INK)
    _box(axes, 6.9, 4.08, 1.0, 0.42, "z", ORANGE)
    _arrow(axes, (6.9, 3.26), (6.9, 3.86), INK)
    _arrow(axes, (6.38, 4.08), (5.7, 4.08), INK)
    axes.text(6.0, 3.75, "全连接 2048\n改形状", ha="center", va="center", fontsize=8.5, color=INK)
    axes.text(6.9, 4.45, "隐变量 [B, L]", ha="center", va="center", fontsize=9.5, color=INK)

    # 损失的两项
    _arrow(axes, (0.42, 2.3), (0.42, 3.2), RED, both=True)
    axes.text(0.58, 2.74, "重建损失：MSE(x, x̂)", ha="left", va="center", fontsize=10.5, color=RED)
    axes.text(6.9, 0.5, r"KL 损失：$N(\mu,\sigma^2)$ 与 $N(0,I)$", ha="center", va="center", fontsize=10.5, color=RED)
    axes.add_patch(FancyBboxPatch((6.28, 0.68), 1.24, 1.48, boxstyle="round,pad=0.02", fill=False, ec=RED, lw=1.2, ls=(0, (3, 2))))
    _pixels(figure).save(folder / "1.webp", lossless=True)


def _slab(axes: Axes, x: float, y: float, channels: int, side: int, color: str) -> tuple[float, float, float]:
    """一叠特征图：高表示边长，厚表示通道数（都取对数）；返回左、右、下三条边的位置。"""
    half = 0.12 + 0.095 * np.log2(side)
    depth, thick = 0.12, 0.028 * np.log2(channels)
    front = [(x - thick, y - half), (x + thick, y - half), (x + thick, y + half), (x - thick, y + half)]
    roof = [(x - thick, y - half), (x - thick + depth, y - half - depth), (x + thick + depth, y - half - depth), front[1]]
    flank = [front[1], roof[2], (x + thick + depth, y + half - depth), front[2]]
    for corners, amount in ((front, 0.55), (roof, 0.3), (flank, 0.75)):
        axes.add_patch(Polygon(corners, fc=_mix(color, amount), ec=color, lw=0.8, joinstyle="round"))
    return x - thick, x + thick + depth, y + half


def _picture(axes: Axes, x: float, y: float, size: float, pixels: np.ndarray) -> tuple[float, float, float]:
    """一张方图；返回左、右、下三条边的位置。"""
    box = (x - size / 2, x + size / 2, y + size / 2, y - size / 2)
    axes.imshow(pixels, extent=box, interpolation="nearest", aspect="auto", zorder=2)
    axes.add_patch(Rectangle((box[0], box[3]), size, size, fill=False, ec=GREY, lw=0.8, zorder=3))
    return box[:3]


def _box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str) -> None:
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0.02,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, fc=_mix(color, 0.3), ec=color, lw=1.2))
    axes.text(x, y, text, ha="center", va="center", fontsize=11, color=INK)


def _arrow(
    axes: Axes,
    start: Sequence[float],
    end: Sequence[float],
    color: str,
    *,
    both: bool = False,
    curve: float = 0.0,
) -> None:
    style = "<|-|>" if both else "-|>"
    bend = f"arc3,rad={curve}"
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=10, color=color, lw=1.3, connectionstyle=bend))


def _face(sharpness: float) -> np.ndarray:
    """示意用的脸 ``[64, 64, 3]``，[0, 1]；``sharpness`` 越小边缘越糊。"""
    v, u = np.mgrid[0:64, 0:64] / 63 * 2 - 1
    image = np.ones((64, 64, 3)) * _mix(SKY, 0.45)

    def paint(inside: np.ndarray, color: tuple[float, ...]) -> None:
        alpha = 1 / (1 + np.exp(-np.clip(inside * sharpness, -50, 50)))[..., None]
        image[:] = alpha * np.array(color) + (1 - alpha) * image

    paint(0.95 - np.hypot(u / 0.8, (v + 0.1) / 0.95), (0.30, 0.18, 0.10))
    paint(0.78 - np.hypot(u / 0.85, v - 0.1), (0.96, 0.80, 0.67))
    for side in (-1, 1):
        paint(0.11 - np.hypot(u - 0.28 * side, v), (0.12, 0.12, 0.15))
    paint(0.06 - np.abs(np.hypot(u / 1.2, v - 0.3) - 0.27) - np.maximum(0, 0.38 - v), (0.75, 0.22, 0.22))
    return image


# ---------------------------------------------------------------- README 的第一张图


def first_picture(folder: Path) -> None:
    """``faces.png``：按 ``python vanilla_vae.py`` 的缺省设置训练的模型，上面原图与重建，下面抽样，先验是拟合的混合高斯（08 章）。

    模型是 ``python tools/explorer.py`` 训练并存在 photos/explorer/ 的那一个，不再训练一遍。
    """
    import explorer

    from vaelab import plot
    from vaelab.data import load
    from vaelab.images import to_float

    model, prior, _ = explorer.load()
    plot.use_chinese_font()
    real = to_float(load("faces").test[:10])
    with torch.no_grad():
        samples = model.decode(prior.sample(20, torch.Generator().manual_seed(0)).float())
    picture = plot.grid(torch.cat([real, model.generate(real), samples]), 10, row_labels=["原图", "重建", "抽样", "抽样"], cell=0.75)
    picture.savefig(folder / "faces.png", dpi=110)


FIGURES: list[Callable[[Path], None]] = [vae_structure, padding_strides_transposed, first_picture]


def main() -> None:
    """重画 :data:`FIGURES` 里的每一张图。"""
    for figure in FIGURES:
        figure(HERE)
        print(f"已画 {figure.__name__}")


if __name__ == "__main__":
    main()
