"""作图：中文字体，以及每种图一个函数。只画传进来的数，不做计算。"""

from __future__ import annotations

import base64
import html
import json
import warnings
from collections.abc import Sequence

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.backends import BackendFilter, backend_registry
from matplotlib.figure import Figure
from torch import Tensor

from vaelab import provenance
from vaelab.images import to_uint8

# 色盲也能分辨的配色（Okabe & Ito 2008）
BLUE, ORANGE, GREEN, PURPLE, SKY, RED, YELLOW, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000",
)  # fmt: skip


def use_chinese_font() -> None:
    """让 matplotlib 写得出中文：Noto Sans SC（随 zhplot 安装，OFL 许可）排在字体表最前；缺字从此是错误。

    在 Jupyter 里，图从此还带着来历，见 :mod:`vaelab.provenance`。
    """
    import zhplot  # noqa: F401  导入时登记字体

    plt.rcParams.update(
        {
            "font.family": ["Noto Sans SC", "DejaVu Sans"],
            "axes.unicode_minus": True,
            "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, PURPLE, SKY, RED]),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "figure.dpi": 100,
            "savefig.dpi": 100,
        }
    )
    warnings.filterwarnings("error", message=r"Glyph .* missing from")
    provenance.install()


def shows_figures() -> bool:
    """``plt.show()`` 会不会让图出现：Agg、PDF 一类的后端只写文件，什么也不显示。"""
    return matplotlib.get_backend().lower() not in backend_registry.list_builtin(BackendFilter.NON_INTERACTIVE)


def tile(images: Tensor, columns: int, gap: int = 2) -> np.ndarray:
    """把 uint8 或 [-1, 1] 浮点图像 ``[N, C, H, W]``（C 为 1 或 3）拼成一张 ``[H', W', 3]`` 的 uint8 图，白色间隔。"""
    images = images.detach().cpu()
    if images.is_floating_point():
        images = to_uint8(images)
    count, channels, height, width = images.shape
    if channels not in (1, 3):
        images = images[:, :1]
    rows = -(-count // columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def grid(
    images: Tensor,
    columns: int = 8,
    *,
    title: str = "",
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    cell: float = 0.9,
) -> Figure:
    """图像网格 ``[N, C, H, W]``，按行排列；``cell`` 是每张图的边长（英寸）。"""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    margin = 0.9 if row_labels else 0.1
    figure, axes = plt.subplots(figsize=(columns * cell + margin, rows * cell + 0.5), layout="constrained")
    picture = tile(images, columns)
    axes.imshow(picture, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    height, width = (picture.shape[0] + 2) / rows, (picture.shape[1] + 2) / columns
    if row_labels:
        axes.set_yticks([(i + 0.5) * height - 1 for i in range(rows)], row_labels)
    if column_labels:
        axes.set_xticks([(i + 0.5) * width - 1 for i in range(columns)], column_labels)
    axes.tick_params(length=0)
    if title:
        axes.set_title(title)
    return figure


def history(rows: Sequence[dict], baseline_mse: float | None = None) -> Figure:
    """训练历史（``vaelab.train.train`` 的返回值）：左边重建误差，右边 KL；``baseline_mse`` 是只猜平均图的误差。"""
    epochs = [row["epoch"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for axes, key, unit in ((left, "mse", "MSE（[−1, 1] 坐标，每像素）"), (right, "kld", "KL（nat/图）")):
        axes.plot(epochs, [row[key] for row in rows], color=BLUE, marker="o", markersize=3, label="训练")
        axes.plot(epochs, [row[f"test_{key}"] for row in rows], color=ORANGE, marker="s", markersize=3, label="测试")
        axes.set(xlabel="轮", ylabel=unit)
        axes.xaxis.get_major_locator().set_params(integer=True)
    left.set(yscale="log", title="重建误差")
    right.set(title="KL 散度")
    if baseline_mse is not None:
        left.axhline(baseline_mse, color=BLACK, linestyle=":", label="只猜平均图")
    left.legend(frameon=False)
    right.legend(frameon=False)
    return figure


def kl_bars(kld_per_dim: Tensor) -> Figure:
    """逐维 KL 的条形图，``[L]``，nat，从大到小排列：高的在用，贴地的已坍塌。"""
    values = kld_per_dim.detach().cpu().sort(descending=True).values
    figure, axes = plt.subplots(figsize=(8, 2.6), layout="constrained")
    axes.bar(range(1, len(values) + 1), values.tolist(), color=BLUE)
    axes.set(xlabel="隐变量的维（按 KL 从大到小）", ylabel="KL（nat）", title="每一维隐变量携带多少信息")
    return figure


_SLIDER_SCRIPT = """
for (const box of document.querySelectorAll(".vae-slider:not([data-on])")) {
  box.dataset.on = "1";
  const strip = box.querySelector("img"), labels = JSON.parse(box.dataset.labels), stops = JSON.parse(box.dataset.stops);
  const grid = document.createElement("div"), size = 96;
  grid.style.cssText = "display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 10px; max-width: 900px; font-size: 13px";
  labels.forEach((label, row) => {
    const cell = document.createElement("label"), face = document.createElement("div"), input = document.createElement("input");
    cell.style.cssText = "display: block; text-align: center";
    face.style.cssText = `width: ${size}px; height: ${size}px; margin: 0 auto 2px; border-radius: 10px; background: url(${strip.src})`;
    face.style.backgroundSize = `${size * stops.length}px`;
    face.setAttribute("role", "img");
    Object.assign(input, { type: "range", min: 0, max: stops.length - 1, step: 1, value: (stops.length - 1) / 2 });
    input.style.cssText = `width: ${size}px; height: 44px; margin: 0; touch-action: pan-y`;
    input.setAttribute("aria-label", label);
    const turn = () => {
      face.style.backgroundPosition = `${-size * input.value}px ${-size * row}px`;
      face.setAttribute("aria-label", `${label}，转到 ${stops[input.value]}`);
      input.setAttribute("aria-valuetext", stops[input.value]);
    };
    input.addEventListener("input", turn);
    turn();
    cell.append(label, face, input);
    grid.append(cell);
  });
  strip.before(grid);
  strip.hidden = true;
}
"""


def slider(strip: bytes, labels: Sequence[str], stops: Sequence[float], alt: str) -> str:
    """一排滑块的 HTML，一个滑块转一行帧；交给 ``IPython.display.HTML`` 显示。

    脚本不能运行的地方（GitHub、没有信任的 JupyterLab）看到的是整条帧带，一张静图。不用 widget，字节只由传进来的东西定。

    Args:
        strip: WebP 的字节，方的帧拼成 ``len(labels)`` 行、``len(stops)`` 列。
        labels: 每一行的名字。
        stops: 每一列的刻度。
        alt: 静图的文字说明，不空。
    """
    if not strip[8:12] == b"WEBP":
        raise ValueError("slider 要一个 WebP 文件的字节；请用 Path(...).read_bytes() 读它。")
    if not alt.strip():
        raise ValueError("slider 的 alt 是空的：看不见图的读者要靠它；请写一句话说明图里有什么。")
    data = {name: html.escape(json.dumps(list(value), ensure_ascii=False)) for name, value in (("labels", labels), ("stops", stops))}
    source = f"data:image/webp;base64,{base64.b64encode(strip).decode()}"
    return (
        f'<div class="vae-slider" data-labels="{data["labels"]}" data-stops="{data["stops"]}">\n'
        f'<img src="{source}" alt="{html.escape(alt)}" width="624">\n<script>{_SLIDER_SCRIPT}</script>\n</div>'
    )
