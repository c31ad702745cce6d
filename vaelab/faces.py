"""按公式画的卡通脸：十二个因子定一张，任何机器上都是同样的字节。"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from vaelab.images import ImageSet

FACE_FACTORS = (
    "skin", "hair_hue", "hair_length", "face_width", "eye_gap", "eye_size",
    "gaze", "brow", "mouth_curve", "mouth_width", "pose", "background",
)  # fmt: skip


def faces(count: int, image_size: int, seed: int) -> ImageSet:
    """``count`` 张按公式画的卡通脸，十二个因子各自均匀分布；末尾的十分之一作测试。"""
    if count < 2:
        raise ValueError(f"count 应至少为 2（训练、测试各一张），收到 {count}；请加大它。")
    factors = torch.rand(count, len(FACE_FACTORS), generator=Generator().manual_seed(seed), dtype=torch.float32)
    images = draw_faces(factors, image_size)
    train = count - max(1, count // 10)
    return ImageSet(
        "faces",
        images[:train],
        images[train:],
        train_factors=factors[:train],
        test_factors=factors[train:],
        factor_names=FACE_FACTORS,
    )


def draw_faces(factors: Tensor, image_size: int = 64) -> Tensor:
    """按因子画卡通人脸：``[N, 12]``，每个因子在 [0, 1] → uint8 ``[N, 3, image_size, image_size]``。

    形状是到边界的有符号距离，由距离得到覆盖率（抗锯齿），再由远及近一层层叠上去。
    只用加减乘除、比较与 :func:`_root`，它们处处给出同样的位，所以同样的因子在任何机器上画出同样的字节。

    Args:
        factors: 列的含义依次见 :data:`FACE_FACTORS`；0.5 是居中的取值。
        image_size: 边长（像素），≥ 8。

    Raises:
        ValueError: 形状不是 ``[N, 12]``，或有因子不在 [0, 1]。
    """
    if factors.dim() != 2 or factors.shape[1] != len(FACE_FACTORS):
        raise ValueError(f"因子应为 [N, {len(FACE_FACTORS)}]，收到 {list(factors.shape)}；各列依次是 {'、'.join(FACE_FACTORS)}。")
    if not bool(((factors >= 0) & (factors <= 1)).all()):
        raise ValueError("每个因子应在 0 与 1 之间，收到的有出界或 NaN；请先 clamp(0, 1)。")
    out = torch.empty(len(factors), 3, image_size, image_size, dtype=torch.uint8)
    chunk = max(1, 2**17 // image_size**2)  # 一块的中间结果留在缓存里
    for start in range(0, len(factors), chunk):
        out[start : start + chunk] = _draw_chunk(factors[start : start + chunk].float().cpu(), image_size)
    return out


def _draw_chunk(factors: Tensor, size: int) -> Tensor:
    skin, hue, length, width, gap, eye, gaze, brow, curve, mouth, pose, back = (factors[:, i].reshape(-1, 1, 1) for i in range(len(FACE_FACTORS)))
    view = 0.9  # 画面半宽；形状的坐标以此为界
    axis = ((torch.arange(size, dtype=torch.float32) * 2 + 1) / size - 1) * view  # 像素中心
    x, y = axis.reshape(1, 1, size), axis.reshape(1, size, 1)  # y 向下
    canvas = _hue(back) * 0.3 + 0.6 - y.unsqueeze(1) * 0.06  # [n, 3, size, size]
    canvas = canvas.expand(-1, -1, size, size).clone()

    def rows(top: float, bottom: float) -> slice:
        return slice(max(0, int((top / view + 1) / 2 * size) - 1), min(size, int((bottom / view + 1) / 2 * size) + 2))

    def paint(distance: Tensor, color: Tensor | tuple[float, float, float], where: slice = slice(None), alpha: float = 1.0):
        if isinstance(color, tuple):
            color = torch.tensor(color, dtype=torch.float32).reshape(1, 3, 1, 1)
        cover = ((0.5 - distance * (size / 2 / view)).clamp(0, 1) * alpha).unsqueeze(1)
        part = canvas[:, :, where]
        part += cover * (color - part)

    def ellipse(cx, cy, rx, ry, where: slice = slice(None)) -> Tensor:
        u, v = (x - cx) / rx, (y[:, where] - cy) / ry
        norm = _root(u * u + v * v)
        u, v = u / rx, v / ry
        return norm * (norm - 1) / (_root(u * u + v * v) + 1e-6)

    light, dark = (torch.tensor(rgb, dtype=torch.float32).reshape(1, 3, 1, 1) for rgb in ((1.0, 0.86, 0.74), (0.47, 0.29, 0.19)))
    skin_color = dark + skin.unsqueeze(1) * (light - dark)
    shade = skin_color * 0.82
    hair_color = _hue(hue) * 0.5 + 0.12
    turn = (pose - 0.5) * 0.24  # 五官随头转动的水平位移；耳朵与后发反向
    rx, ry, cy = 0.45 + (width - 0.5) * 0.16, 0.56, 0.02

    # 后发：头后的椭圆，向下延伸到 length
    bottom = 0.1 + length * 0.75
    box_x, box_y = (x + turn * 0.3).abs() - (rx + 0.1), (y - (bottom - 0.2) / 2).abs() - (bottom + 0.2) / 2
    corner_x, corner_y = (box_x + 0.2).clamp(min=0), (box_y + 0.2).clamp(min=0)
    box = _root(corner_x * corner_x + corner_y * corner_y) - 0.2
    paint(torch.minimum(ellipse(-turn * 0.3, cy - 0.1, rx + 0.12, ry + 0.08), box), hair_color * 0.8)
    # 衣服、脖子、耳朵、头
    paint(ellipse(0.0, 1.16, 0.78, 0.46, rows(0.6, 1)), (0.24, 0.33, 0.48), rows(0.6, 1))
    neck = rows(0.3, 0.9)
    paint(ellipse(0.0, 0.55, 0.17, 0.3, neck), shade, neck)
    ears = rows(-0.2, 0.3)
    for side in (-1, 1):
        paint(ellipse(side * (rx - 0.01) - turn * 0.25, cy + 0.05, 0.09, 0.13, ears), shade, ears)
    head = ellipse(0.0, cy, rx, ry)
    paint(head, skin_color)
    # 刘海：头顶之内、发际线之上
    hairline = -0.27 - (x - turn * 1.2) * (x - turn * 1.2) * 0.55 + (x - turn) * 0.12
    top = rows(-0.8, 0.2)
    paint(torch.maximum(ellipse(0.0, cy - 0.04, rx + 0.05, ry + 0.07, top), y[:, top] - hairline), hair_color, top)
    # 眼睛与眉毛
    eye_rx, eye_ry = 0.085 + eye * 0.055, 0.06 + eye * 0.07
    band = rows(-0.32, 0.22)
    for side in (-1, 1):
        cx = turn + side * (0.15 + gap * 0.08)
        eye_y = cy - 0.01
        paint(ellipse(cx, eye_y, eye_rx + 0.018, eye_ry + 0.018, band), skin_color * 0.45, band)
        white = ellipse(cx, eye_y, eye_rx, eye_ry, band)
        paint(white, (0.98, 0.98, 0.98), band)
        pupil_x = cx + (gaze - 0.5) * 0.13
        paint(torch.maximum(ellipse(pupil_x, eye_y, eye_ry * 0.68, eye_ry * 0.68, band), white), (0.1, 0.09, 0.12), band)
        lift = (brow - 0.5) * 0.9 * side
        arc = (x - cx) * lift - 0.09 - eye_ry + (x - cx) * (x - cx) * 1.5
        paint(torch.maximum((y[:, band] - eye_y - arc).abs() / _root(lift * lift + 1) - 0.032, (x - cx).abs() - 0.12), hair_color * 0.55, band)
    # 鼻子、腮红、嘴
    low = rows(0.02, 0.55)
    paint(ellipse(turn * 1.25, 0.19, 0.05, 0.065, low), shade, low)
    for side in (-1, 1):
        paint(ellipse(turn + side * 0.27, 0.22, 0.09, 0.06, low), (0.95, 0.45, 0.42), low, alpha=0.28)
    half = 0.11 + mouth * 0.12
    bend = (curve - 0.35) * half * 1.5
    t = (x - turn) / half
    slope = bend * 2 * t / half
    mouth_line = (y[:, low] - 0.365 - bend * (0.5 - t * t)).abs() / _root(slope * slope + 1) - 0.034
    paint(torch.maximum(mouth_line, (x - turn).abs() - half), (0.66, 0.18, 0.2), low)
    return (canvas.clamp(0, 1) * 255 + 0.5).to(torch.uint8)


def _root(x: Tensor) -> Tensor:
    """float32 的平方根，舍入正确，与机器无关。

    IEEE 754 规定开方要舍入正确，库却未必照办：AMD 的 CPU 上，float32 的 ``torch.sqrt`` 有五分之一错在末位，
    float64 的也有错。先在 float64 里开方就不怕了：设 √x 在 [1, 2) 里，m 是两个相邻 float32 的中点，则 m = M·2⁻²⁴，
    M 是奇数，m² 是 2⁻⁴⁸ 的奇数倍，x 是偶数倍，至少差 2⁻⁴⁸；于是 √x 离 m 至少 2⁻⁵⁰，是 float64 末位的四倍。
    所以 float64 里错一两个末位，舍入到 float32 的结果也不变。
    """
    return x.double().sqrt().float()


def _hue(h: Tensor) -> Tensor:
    """色相 ``[n, 1, 1]``（0–1 绕色环一周）→ 饱和的 RGB ``[n, 3, 1, 1]``。"""
    h = h.unsqueeze(1) * 6
    return torch.cat([(h - 3).abs() - 1, 2 - (h - 2).abs(), 2 - (h - 4).abs()], dim=1).clamp(0, 1)
