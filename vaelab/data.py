"""图像数据：几种来源，一种形状。

无论来自公式、torchvision、CelebA 还是你自己的图片文件夹，:func:`load` 都给出一个 :class:`ImageSet`：
uint8 张量 ``[N, C, H, W]``，分成训练与测试两份。自己的图片只解码一次，写进缓存，以后直接内存映射。

图像在模型里是 [-1, 1] 的浮点数，在模型外是 uint8；:func:`to_float` 与 :func:`to_uint8` 是唯一的一对换算。
"""

import difflib
import hashlib
import io
import json
import math
import mmap
import os
import re
import secrets
import stat
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import psutil
import torch
from filelock import FileLock  # torch 自身的依赖，装了 torch 就有
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Generator, Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from vanilla_vae import positive_int

# ---------------------------------------------------------------- 换算、容器、分批


def to_float(images: Tensor) -> Tensor:
    """uint8 图像 [0, 255] → float32 [-1, 1]，形状不变：x / 127.5 − 1，与解码器末端的 Tanh 同一值域。"""
    if images.dtype != torch.uint8:
        raise TypeError(f"to_float 应收到 uint8 图像，收到 {images.dtype}；已是 [-1, 1] 的浮点图像不必再换算。")
    return images.to(torch.float32).div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """浮点图像 [-1, 1] → uint8 [0, 255]，形状不变；四舍五入，界外的值截到边界，是 :func:`to_float` 的逆。"""
    if not images.is_floating_point():
        raise TypeError(f"to_uint8 应收到 [-1, 1] 的浮点图像，收到 {images.dtype}；uint8 图像不必再换算。")
    return images.to(torch.float32).add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet:
    """一份数据：训练与测试图像，以及来源里有的标签或生成因子。

    Attributes:
        name: 数据的名字。
        train, test: uint8 ``[N, C, H, W]``，在内存里或内存映射。
        train_labels, test_labels: int64 ``[N]``，类别编号；``label_names`` 是各类的名字。
        train_factors, test_factors: float32 ``[N, F]``，生成每张图所用的连续因子；``factor_names`` 是各列的名字。
        notes: 该让使用者知道的话，例如跳过了哪些文件。
        mapped: 图像若内存映射自文件，那个文件与它应有的字节数；在内存里则为 None。

    Raises:
        ValueError: 形状、类型或张数对不上。
    """

    name: str
    train: Tensor
    test: Tensor
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None
    label_names: tuple[str, ...] = ()
    train_factors: Tensor | None = None
    test_factors: Tensor | None = None
    factor_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    mapped: tuple[Path, int] | None = None

    def __post_init__(self) -> None:
        for side, images in (("train", self.train), ("test", self.test)):
            if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.dim() != 4 or not len(images):
                raise ValueError(f"{side} 应为非空的 uint8 张量 [N, C, H, W]，收到 {_describe(images)}；请先转换。")
            n, f = len(images), len(self.factor_names)
            for field, dtype, shape in (("labels", torch.int64, (n,)), ("factors", torch.float32, (n, f))):
                value = getattr(self, f"{side}_{field}")
                if (value is None) != (getattr(self, f"train_{field}") is None):
                    raise ValueError(f"train_{field} 与 test_{field} 应都给出或都省略，收到的只有一个；请补上另一个。")
                if value is not None and (value.dtype != dtype or value.shape != shape):
                    wanted = f"{dtype} {list(shape)}"
                    raise ValueError(f"{side}_{field} 应为 {wanted}，收到 {_describe(value)}；请使它与图像一一对应。")
        if self.train.shape[1:] != self.test.shape[1:]:
            shapes = f"{list(self.train.shape)} 与 {list(self.test.shape)}"
            raise ValueError(f"train 与 test 的图像应同样大小，收到 {shapes}；请先缩放到一致。")

    def require_whole(self) -> None:
        """内存映射的文件若变短了就报 OSError；不先查，读到没有的那一段，系统会直接结束进程（SIGBUS）。"""
        if self.mapped is None:
            return
        path, size = self.mapped
        with suppress(FileNotFoundError):  # 删掉了不要紧：映射着的内容还在
            if (now := path.stat().st_size) < size:
                raise OSError(f"解码缓存 {path} 应有 {size} 字节，现在只有 {now}：它在使用中被改短了；请重新运行，会重新解码。")

    def __repr__(self) -> str:
        return f"ImageSet({self.name!r}, train={list(self.train.shape)}, test={list(self.test.shape)})"


def _describe(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def batches(
    images: Tensor,
    batch_size: int,
    generator: Generator | None = None,
    drop_last: bool = True,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[Tensor]:
    """走一遍 ``images``，逐批给出 uint8 ``[B, C, H, W]``。

    给了 ``generator`` 就打乱，否则按原来的顺序。``drop_last`` 丢掉末尾不满的一批，使每一步的批一样大。
    ``shard = (k, n)`` 只给出每一批均分成 n 份之后的第 k 份（从 0 数），供 n 个进程各取一份。
    """
    total = len(images)
    if drop_last and total < positive_int("batch_size", batch_size):
        raise ValueError(f"batch_size 应不大于图片数 {total}，收到 {batch_size}；请减小它，否则一步也不会训练。")
    if generator is None:
        order = torch.arange(total)
    else:
        order = torch.randperm(total, generator=generator, device=generator.device)
    order = order.to(images.device)
    stop = total - total % batch_size if drop_last else total
    index, parts = shard
    for start in range(0, stop, batch_size):
        yield images[order[start : start + batch_size].tensor_split(parts)[index]]


# ---------------------------------------------------------------- 数据源


def faces(count: int, image_size: int, seed: int) -> ImageSet:
    """``count`` 张按公式画的卡通脸，十二个因子各自均匀分布；末尾的十分之一作测试。"""
    if count < 2:
        raise ValueError(f"count 应至少为 2（训练、测试各一张），收到 {count}；请加大它。")
    factors = torch.rand(count, len(FACE_FACTORS), generator=Generator().manual_seed(seed))
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


# 名字 → (torchvision 的类名, 各类的名字)
_TORCHVISION = {
    "mnist": ("MNIST", tuple("0123456789")),
    "fashion_mnist": (
        "FashionMNIST",
        ("T 恤", "裤子", "套头衫", "连衣裙", "外套", "凉鞋", "衬衫", "运动鞋", "包", "短靴"),
    ),
    "cifar10": ("CIFAR10", ("飞机", "汽车", "鸟", "猫", "鹿", "狗", "蛙", "马", "船", "卡车")),
}
NAMES = ("faces", *_TORCHVISION, "celeba")


def load(
    source: str | os.PathLike,
    *,
    root: str | os.PathLike = "data",
    image_size: int = 64,
    download: bool = False,
    channels: int | None = None,
    count: int = 10_000,
    seed: int = 0,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> ImageSet:
    """读入一份数据。

    Args:
        source: ``"faces"``、``"mnist"``、``"fashion_mnist"``、``"cifar10"``、``"celeba"``，或图片文件夹的路径。
        root: torchvision 数据与 CelebA 所在的文件夹。
        image_size: 图像边长（像素）。
        download: 没有时是否允许下载；只对 torchvision 的数据与 CelebA 有用。
        channels: 1（灰度）或 3（彩色）；None 保持来源的通道数，图片文件夹则为 3。
        count: 画多少张脸；只对 ``"faces"`` 有用。
        seed: 画脸与划分训练、测试集的种子；有官方划分的数据用官方划分。
        cache_dir: 解码缓存的位置；默认取环境变量 ``VAELAB_CACHE``，再默认 ``~/.cache/vaelab``。
        progress: 解码时是否显示进度条。

    Returns:
        训练、测试两份 uint8 ``[N, C, image_size, image_size]``。

    Raises:
        ValueError, TypeError, OSError: 参数不对，或数据不在、读不出；信息说明怎么办。
    """
    image_size = positive_int("image_size", image_size)
    if channels not in (None, 1, 3):
        raise ValueError(f"channels 应为 1（灰度）、3（彩色）或 None（保持原样），收到 {channels!r}；请改用其中之一。")
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"数据来源应为名字或文件夹的路径，收到 {type(source).__name__}；请传入如 'mnist' 的字符串。")
    if source == "faces":
        drawn = faces(positive_int("count", count), image_size, seed)
        train, test = (_fit(images, image_size, channels) for images in (drawn.train, drawn.test))
        return replace(drawn, train=train, test=test)
    if source in _TORCHVISION:
        return _torchvision_set(source, Path(root), image_size, channels, download)
    decode = partial(
        _decoded_set, image_size=image_size, channels=channels or 3, seed=seed, cache_dir=cache_dir, progress=progress
    )
    return _celeba(Path(root), download, seed, decode) if source == "celeba" else _own_pictures(source, seed, decode)


def _torchvision(class_name: str, root: Path, download: bool, **which):
    """建一个 torchvision 数据集；缺失、残缺、断网时各数据集报的类型不一，这里统一成一句话。"""
    from torchvision import datasets

    try:
        return getattr(datasets, class_name)(root, download=download, **which)
    except Exception as error:
        if download:
            message = f"{class_name} 没能下载到 {root.resolve()}（{error}）；请检查网络，或自行取得它的文件放在那里。"
            raise OSError(message) from error
        raise FileNotFoundError(
            f"在 {root.resolve()} 里没有完整的 {class_name}；请加 --download（在 Python 里是 download=True）下载，"
            "或把解压后的文件按 torchvision 的布局放入，或用 --root（root=…）指出它在哪里。"
        ) from error


def _torchvision_set(name: str, root: Path, image_size: int, channels: int | None, download: bool) -> ImageSet:
    class_name, label_names = _TORCHVISION[name]
    pair = []
    for is_train in (True, False):
        part = _torchvision(class_name, root, download, train=is_train)
        images = torch.as_tensor(part.data)  # 灰度 [N, H, W]，彩色 [N, H, W, C]
        images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
        pair.append((_fit(images, image_size, channels), torch.as_tensor(part.targets, dtype=torch.int64)))
    (train_images, train_labels), (test_images, test_labels) = pair
    return ImageSet(name, train_images, test_images, train_labels, test_labels, label_names)


def _fit(images: Tensor, image_size: int, channels: int | None) -> Tensor:
    """整块 uint8 ``[N, C, H, W]`` 换成所要的边长（双线性、抗锯齿）与通道数；不必换的原样返回。"""
    channels = channels or images.shape[1]
    if images.shape[1:] == (channels, image_size, image_size):
        return images.contiguous()
    fitted = torch.empty(len(images), channels, image_size, image_size, dtype=torch.uint8)
    grey_weights = torch.tensor([19595, 38470, 7471], dtype=torch.int32).view(1, 3, 1, 1)  # ITU-R BT.601 乘 2¹⁶，与 PIL 相同
    for start in range(0, len(images), 1000):  # 分块，中间结果才不会有整份数据那么大
        chunk = images[start : start + 1000]
        if channels == 1 < chunk.shape[1]:
            chunk = ((chunk * grey_weights).sum(dim=1, keepdim=True) + 2**15 >> 16).to(torch.uint8)
        if chunk.shape[2:] != (image_size, image_size):  # uint8 直接缩放是整数运算，各机器结果相同
            chunk = F.interpolate(chunk, (image_size, image_size), mode="bilinear", antialias=True)
        fitted[start : start + 1000] = chunk.expand(-1, channels, -1, -1)
    return fitted


def _celeba(root: Path, download: bool, seed: int, decode: Callable[..., ImageSet]) -> ImageSet:
    """CelebA：torchvision 的布局，或一个放着 000001.jpg … 的文件夹；中央 148 像素见方，与通行的做法一致。"""
    nests = ("celeba/img_align_celeba", "img_align_celeba", "img_align_celeba/img_align_celeba", "")
    folder, files = _find_celeba(root, nests)
    if not files and download:
        _torchvision("CelebA", root, download, split="all")
        folder, files = _find_celeba(root, nests)
    if not files:
        places = "、".join(str(root.resolve() / nest) for nest in nests)
        raise FileNotFoundError(
            f"没有找到 CelebA 的图片（000001.jpg …），找过 {places}；请解压 img_align_celeba.zip 并用 --root（root=…）"
            "指出所在的文件夹，或加 --download（download=True）试着下载。"
        )

    official = {}
    for listing in filter(Path.is_file, (place / "list_eval_partition.txt" for place in (folder, folder.parent))):
        pairs = re.findall(r"^(\d{6})\.jpg +([012])\s*$", listing.read_text(encoding="utf-8"), re.MULTILINE)
        official.update((number, int(part)) for number, part in pairs)
    sides: tuple[list[str], ...] = ([], [], [])  # 训练、验证、测试
    for name in sorted(files):
        number = name[:6]  # 没有官方划分文件时用官方的编号：1–162770、162771–182637、182638–202599
        sides[official.get(number, (int(number) > 162_770) + (int(number) > 182_637))].append(name)
    train, valid, test = sides
    if train and test:
        notes = (f"按官方划分；{len(valid)} 张验证图片没有用到。",) if valid else ("按官方划分。",)
        return decode("celeba", folder, files, test + train, lead=len(test), crop=148, notes=notes)
    missing = "测试" if train else "训练"
    notes = (f"这里没有官方划分的{missing}图片，改为按种子 {seed} 取十分之一作测试。",)
    return decode("celeba", folder, files, _shuffled(files, seed), lead=0, crop=148, notes=notes)


def _find_celeba(root: Path, nests: tuple[str, ...]) -> tuple[Path, dict[str, os.stat_result | None]]:
    for folder in (root / nest for nest in nests):
        with suppress(OSError), os.scandir(folder) as entries:
            found = (e for e in entries if re.fullmatch(r"\d{6}\.(jpg|png)", e.name) and e.is_file())
            if files := {e.name: e.stat() for e in found}:
                return folder, files
    return root, {}


def _own_pictures(source: str | os.PathLike, seed: int, decode: Callable[..., ImageSet]) -> ImageSet:
    folder = Path(source).expanduser()
    try:
        is_folder = stat.S_ISDIR(os.stat(os.path.expanduser(source)).st_mode)
    except PermissionError as error:
        raise PermissionError(f"没有权限打开 {folder}；请检查它与上级文件夹的读取权限。") from error
    except (OSError, ValueError):
        if Path(source).name != str(source) and source:
            raise FileNotFoundError(f"没有文件夹 {folder.absolute()}；请检查路径的拼写。") from None
        close = difflib.get_close_matches(str(source).lower(), NAMES, n=1)
        hint = f"你要的也许是 {close[0]}" if close else f"可用的名字有 {'、'.join(NAMES)}"
        raise ValueError(
            f"没有名为 {str(source)!r} 的数据（{'、'.join(NAMES)}），也没有这个文件夹；{hint}，或给出图片文件夹的路径。"
        ) from None
    if not is_folder:
        raise NotADirectoryError(f"{folder} 是一个文件，数据来源应为文件夹；请给出放着图片的文件夹。")
    files, notes = _find_pictures(folder)
    return decode(folder.resolve().name, folder, files, _shuffled(files, seed), lead=0, crop=None, notes=notes)


# ---------------------------------------------------------------- 画脸

FACE_FACTORS = (
    "skin", "hair_hue", "hair_length", "face_width", "eye_gap", "eye_size",
    "gaze", "brow", "mouth_curve", "mouth_width", "pose", "background",
)  # fmt: skip


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
    skin, hue, length, width, gap, eye, gaze, brow, curve, mouth, pose, back = (
        factors[:, i].reshape(-1, 1, 1) for i in range(len(FACE_FACTORS))
    )
    view = 0.9  # 画面半宽；形状的坐标以此为界
    axis = ((torch.arange(size, dtype=torch.float32) * 2 + 1) / size - 1) * view  # 像素中心
    x, y = axis.reshape(1, 1, size), axis.reshape(1, size, 1)  # y 向下
    canvas = _hue(back) * 0.3 + 0.6 - y.unsqueeze(1) * 0.06  # [n, 3, size, size]
    canvas = canvas.expand(-1, -1, size, size).clone()

    def rows(top: float, bottom: float) -> slice:
        return slice(max(0, int((top / view + 1) / 2 * size) - 1), min(size, int((bottom / view + 1) / 2 * size) + 2))

    def paint(distance: Tensor, color: Tensor | tuple[float, float, float], where: slice = slice(None), alpha: float = 1.0):
        if isinstance(color, tuple):
            color = torch.tensor(color).reshape(1, 3, 1, 1)
        cover = ((0.5 - distance * (size / 2 / view)).clamp(0, 1) * alpha).unsqueeze(1)
        part = canvas[:, :, where]
        part += cover * (color - part)

    def ellipse(cx, cy, rx, ry, where: slice = slice(None)) -> Tensor:
        u, v = (x - cx) / rx, (y[:, where] - cy) / ry
        norm = _root(u * u + v * v)
        u, v = u / rx, v / ry
        return norm * (norm - 1) / (_root(u * u + v * v) + 1e-6)

    light, dark = torch.tensor([1.0, 0.86, 0.74]).reshape(1, 3, 1, 1), torch.tensor([0.47, 0.29, 0.19]).reshape(1, 3, 1, 1)
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


# ---------------------------------------------------------------- 找图片、解码

# PIL 登记了扩展名、却不是位图的格式：文档、矢量图、视频、气象数据。
_NOT_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MCIDAS", "MPEG", "PALM", "PDF", "WMF"}
# 只列缺解码器的手机格式：不列，它们会被当作无关文件悄悄略过。
_PHONE_SUFFIXES = {".heic", ".heif"}
_MAX_PIXELS = 2**26  # 8192×8192；再大的不解码，以免一个小文件撑满内存
_CACHE_VERSION = 1


def _find_pictures(folder: Path) -> tuple[dict[str, os.stat_result | None], tuple[str, ...]]:
    """可能是图片的文件：相对路径 → stat（断开的链接为 None），以及要告诉使用者的话。"""
    suffixes = {s for s, kind in Image.registered_extensions().items() if kind not in _NOT_PICTURES} | _PHONE_SUFFIXES
    files: dict[str, os.stat_result | None] = {}
    seen, closed = set(), []
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=closed.append):
        real = os.path.realpath(parent)
        # 链接可以指回上级；真实路径只进一次，就不会绕圈。
        folders[:] = [] if real in seen else sorted(f for f in folders if f[0] != "." and f != "__MACOSX")
        if real in seen:
            continue
        seen.add(real)
        for name in names:
            path = Path(parent, name)
            suffix = path.suffix.lower()
            if name[0] == "." or (suffix and suffix not in suffixes):
                continue
            try:
                status = path.stat()
            except OSError:
                status = None
            if stat.S_ISREG(status.st_mode) if status else suffix:  # 管道与设备一打开就会等下去
                files[path.relative_to(folder).as_posix()] = status
    if closed and not files:
        raise PermissionError(f"没有权限打开 {closed[0].filename}；请检查它的读取权限。")
    if not files:
        raise ValueError(f"{folder.absolute()} 里没有图片；请放入 .jpg、.png 等图片，可以分在子文件夹里。")
    notes = (f"跳过 {len(closed)} 个没有权限打开的子文件夹：{closed[0].filename}…",) if closed else ()
    return files, notes


def _shuffled(names: dict[str, os.stat_result | None], seed: int) -> list[str]:
    """按散列排序：与随机数库的版本无关，而且增删一张图片不会打乱其余图片的先后。"""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}:".encode() + os.fsencode(name)).digest())


def _read_picture(path: Path, image_size: int, channels: int, crop: int | None) -> np.ndarray:
    """一个文件 → uint8 ``[C, image_size, image_size]``；取中央的正方形（边长至多 ``crop``）再缩放。"""
    with Image.open(path, formats=[kind for kind in Image.OPEN if kind not in _NOT_PICTURES]) as image:
        if crop is None:
            image.draft(None, (2 * image_size, 2 * image_size))  # JPEG 可以直接解码成 1/2、1/4、1/8 大小
        if image.width * image.height > _MAX_PIXELS:
            raise Image.DecompressionBombError
        scale_known = image.format in ("PNG", "PPM") or image.mode.startswith("I;16")
        ImageOps.exif_transpose(image, in_place=True)
        side = min(crop or image.width, image.width, image.height)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side))
    if square.mode[0] in "IF":  # 16 位、32 位整数与浮点；PIL 自己转换时会把 255 以上截掉
        values = np.nan_to_num(np.asarray(square).astype(np.float32))
        # 32 位整数与浮点没有约定的白：取 1、255、65535 中装得下的最小的，都装不下就取最大值。
        white = 65535 if scale_known else next((w for w in (1, 255, 65535) if values.max() <= w), values.max())
        square = Image.fromarray((values * (255 / white)).round().clip(0, 255).astype(np.uint8))
    elif square.has_transparency_data:
        square = square.convert("RGBA")
        square = Image.alpha_composite(Image.new("RGBA", square.size, "white"), square)
    # CelebA 用通行做法的双线性，数值才能与别人的比；自己的图片用更清晰的 Lanczos。
    resample = Image.Resampling.BILINEAR if crop else Image.Resampling.LANCZOS
    square = square.convert("RGB").resize((image_size, image_size), resample)
    pixels = np.asarray(square.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(image_size, image_size, channels).transpose(2, 0, 1)


def _try_picture(path: Path, **settings) -> np.ndarray | str:
    """解码一个文件；读不出时给出原因（空串表示它本来就不像图片，不必提起）。"""
    try:
        return _read_picture(path, **settings)
    except Image.DecompressionBombError:
        return "像素太多"
    except FileNotFoundError:
        return "链接断开或文件已不在"
    except PermissionError:
        return "没有读取权限"
    except UnidentifiedImageError:
        return "" if not path.suffix else "空文件" if path.stat().st_size == 0 else "内容不是认得的图片"
    except Exception as error:  # 各种格式的解码器遇到坏数据时抛出的类型五花八门
        return "截断或损坏" if isinstance(error, (OSError, SyntaxError)) else f"损坏：{type(error).__name__}"


def _decode(folder: Path, order: list[str], lead: int, file, progress: bool, **settings) -> dict:
    """并行解码，按 ``order`` 的先后把读得出的写进 ``file``（.npy 格式）。

    内存与图片数无关：每次只有一小段在解码，写完才取下一段。.npy 的头为行数留了位置，最后填上真实的行数。

    Returns:
        ``shape``、测试图片数 ``test``（它们排在最前）、``notes``。
    """
    tail = (settings["channels"], settings["image_size"], settings["image_size"])
    header = {"descr": "|u1", "fortran_order": False, "shape": (0, *tail)}
    np.lib.format.write_array_header_1_0(file, header)
    kept, kept_lead, skipped = 0, 0, []
    Image.init()  # 登记全部格式，要在开线程之前
    workers = min(16, os.cpu_count() or 1)
    bar = tqdm(total=len(order), desc="解码图片", unit="张", disable=not progress)
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool, bar:
        warnings.simplefilter("ignore")  # 坏文件由 notes 交代，PIL 的英文警告不必再出现
        for start in range(0, len(order), 16 * workers):
            names = order[start : start + 16 * workers]
            results = pool.map(partial(_try_picture, **settings), [folder / name for name in names])
            for row, (name, result) in enumerate(zip(names, results), start):
                bar.update()
                if isinstance(result, str):
                    skipped += [f"{name}（{result}）"] if result else []
                    continue
                file.write(result.tobytes())
                kept, kept_lead = kept + 1, kept_lead + (row < lead)
    listed = "、".join(skipped[:5]).encode("utf-8", "replace").decode()  # 文件名可能不是合法的 UTF-8
    notes = [f"跳过 {len(skipped)} 个读不出的文件：{listed}{'…' if len(skipped) > 5 else ''}。"] if skipped else []
    if kept < 2:
        raise ValueError(
            f"{folder.absolute()} 里读得出的图片应至少有 2 张（训练、测试各一），实际 {kept} 张；{''.join(notes)}"
            "请放入更多完好的图片。"
        )
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {**header, "shape": (kept, *tail)})
    test = kept_lead if 0 < kept_lead < kept else max(1, round(kept / 10))
    return {"shape": [kept, *tail], "test": test, "notes": notes}


# ---------------------------------------------------------------- 缓存


def _decoded_set(
    name: str,
    folder: Path,
    files: dict[str, os.stat_result | None],
    order: list[str],
    *,
    lead: int,
    crop: int | None,
    notes: tuple[str, ...],
    image_size: int,
    channels: int,
    seed: int,
    cache_dir: str | os.PathLike | None,
    progress: bool,
) -> ImageSet:
    """``folder`` 里的图片，按 ``order`` 的先后，前 ``lead`` 张作测试（0 表示取十分之一）；解码过就取自缓存。

    缓存是一对文件：像素 ``<键>-<随机>.npy`` 与记录 ``<键>.json``。记录写明像素在哪个文件、来自怎样的一批图片，
    它最后才改名就位，所以中途被杀不会留下能被认出的半个缓存；没有记录指着的像素文件，下次解码时清掉。
    """
    folder = folder.resolve()
    cache_dir = cache_dir or os.environ.get("VAELAB_CACHE") or "~/.cache/vaelab"
    cache = Path(cache_dir).expanduser().resolve()
    if cache.is_relative_to(folder):
        raise ValueError(f"缓存 {cache} 不应放在图片文件夹 {folder} 之内；请用环境变量 VAELAB_CACHE 指定别处。")
    key = hashlib.sha256(repr((os.fsencode(folder), image_size, channels, crop, seed)).encode()).hexdigest()[:16]
    digest = hashlib.sha256(f"{_CACHE_VERSION} {PIL.__version__} {lead}".encode())
    for item in order:
        status = files[item]
        digest.update(os.fsencode(item) + (f"\0{status.st_size}\0{status.st_mtime_ns}\0" if status else "\0").encode())
    manifest = digest.hexdigest()
    decode = partial(
        _decode, folder, order, lead, progress=progress, image_size=image_size, channels=channels, crop=crop
    )

    found = _open_cache(cache, key, manifest)
    if found is None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            lock = FileLock(cache / f"{key}.lock").acquire()  # 几个进程同时来，只有一个解码，其余等着用
        except (OSError, NotImplementedError) as error:
            notes += (f"缓存文件夹 {cache} 不能写（{error}），这次解码在内存里，下次要重新解码。",)
            buffer = io.BytesIO()
            record = decode(buffer)
            buffer.seek(0)
            found = np.load(buffer), {**record, "file": None}
        else:
            with lock:
                found = _open_cache(cache, key, manifest) or _build_cache(cache, key, manifest, decode)
    pixels, record = found
    path = record["file"] and cache / record["file"]
    images = torch.from_numpy(pixels)
    test = record["test"]
    mapped = None if path is None else (path, path.stat().st_size)
    return ImageSet(name, images[test:], images[:test], notes=(*notes, *record["notes"]), mapped=mapped)


def map_pixels(path: Path) -> np.ndarray:
    """内存映射一个 uint8 的 .npy；可以比内存还大。改动只在内存里，不会写回文件。

    Raises:
        ValueError: 文件短于头里所说，或不是 .npy。
    """
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        shape, _, _ = np.lib.format.read_array_header_1_0(file)
        if os.name == "nt":
            region = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        else:
            # 私有、可写的映射，系统要按它的大小预留内存，比内存大就拒绝；MAP_NORESERVE 说不必。
            reserve_nothing = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
            flags, prot = mmap.MAP_PRIVATE | reserve_nothing, mmap.PROT_READ | mmap.PROT_WRITE
            region = mmap.mmap(file.fileno(), 0, flags=flags, prot=prot)
        pixels = np.frombuffer(region, np.uint8, math.prod(shape), file.tell()).reshape(shape)
    if pixels.nbytes > psutil.virtual_memory().total / 2 and hasattr(region, "madvise"):
        region.madvise(mmap.MADV_RANDOM)  # 打乱着读、缓存装不下：每次只读要的那一页，不连着读后面的 128 KB
    return pixels


def _open_cache(cache: Path, key: str, manifest: str) -> tuple[np.ndarray, dict] | None:
    """缓存完好且与 ``manifest`` 相符时，映射像素（改动只在内存里，不会写回文件）；否则 None。"""
    with suppress(OSError, ValueError, KeyError, TypeError, EOFError):
        record = json.loads((cache / f"{key}.json").read_text(encoding="utf-8"))
        if record["manifest"] == manifest:
            pixels = map_pixels(cache / record["file"])
            if list(pixels.shape) == record["shape"]:
                return pixels, record
    return None


def _build_cache(cache: Path, key: str, manifest: str, decode: Callable[..., dict]) -> tuple[np.ndarray, dict]:
    for stale in cache.glob(f"{key}-*"):  # 拿着锁，所以它们属于过期的缓存或已死的进程
        with suppress(OSError):  # Windows 上别的进程还映射着的删不掉，留给下一次
            stale.unlink()
    path = cache / f"{key}-{secrets.token_hex(4)}.npy"
    record_path = path.with_suffix(".part")
    try:
        with open(path, "xb") as file:
            record = {**decode(file), "manifest": manifest, "file": path.name}
            file.flush()
            os.fsync(file.fileno())
        record_path.write_text(json.dumps(record), encoding="utf-8")
        os.replace(record_path, cache / f"{key}.json")
    except BaseException as error:
        path.unlink(missing_ok=True)
        record_path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise OSError(f"解码缓存写不进 {cache}（{reason}）；请腾出空间，或用环境变量 VAELAB_CACHE 指定别处。") from error
        raise
    return map_pixels(path), record
