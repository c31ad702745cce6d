"""读入数据：几种来源，一种形状。

无论来自公式、torchvision、CelebA 还是你自己的图片文件夹，:func:`load` 都给出一个 :class:`vaelab.images.ImageSet`：
uint8 张量 ``[N, C, H, W]``，分成训练与测试两份。
"""

from __future__ import annotations

import difflib
import gzip
import math
import os
import re
import stat
import struct
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from vaelab.faces import faces
from vaelab.files import shown
from vaelab.images import ImageSet
from vaelab.pictures import decoded_set, find_pictures, shuffled
from vanilla_vae import positive_int

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
    decode = partial(decoded_set, image_size=image_size, channels=channels or 3, seed=seed, cache_dir=cache_dir, progress=progress)
    return _celeba(Path(root), download, seed, decode) if source == "celeba" else _own_pictures(source, seed, decode)


def _torchvision(class_name: str, root: Path, download: bool, **which):
    """建一个 torchvision 数据集；缺失、残缺、断网时各数据集报的类型不一，这里统一成一句话。"""
    from torchvision import datasets

    try:
        return getattr(datasets, class_name)(root, download=download, **which)
    except Exception as error:
        if download:
            message = f"{class_name} 没能下载到 {shown(root.resolve())}（{error}）；请检查网络，或自行取得它的文件放在那里。"
            raise OSError(message) from error
        there = _names(root.iterdir()) if root.is_dir() else ""
        what = f"那里有 {there}" if there else "那里是空的" if root.is_dir() else "没有这个文件夹"
        raise FileNotFoundError(
            f"在 {shown(root.resolve())} 里没有完整的 {class_name}（{what}）；请加 --download（在 Python 里是 download=True）下载，"
            "或把解压后的文件按 torchvision 的布局放入，或用 --root（root=…）指出它在哪里。"
        ) from error


def _torchvision_set(name: str, root: Path, image_size: int, channels: int | None, download: bool) -> ImageSet:
    class_name, label_names = _TORCHVISION[name]
    idx = None if name == "cifar10" else _find_idx(class_name, root)
    if idx is not None and len(idx) < 4 and not download:
        lacking = "、".join(f"{stem}-{what}-idx{dims}-ubyte" for stem, what, dims in _IDX if (stem, what) not in idx)
        raise FileNotFoundError(
            f"在 {shown(root.resolve())} 里没有完整的 {class_name}：找到了 {_names(idx.values())}，缺 {lacking}（有没有 .gz 都可以）；"
            "请把它补在一起，或加 --download（download=True）下载。"
        )
    pair = []
    for is_train in (True, False):
        if idx is not None and len(idx) == 4:
            images, labels = (_read_idx(idx["train" if is_train else "t10k", what], class_name) for what in ("images", "labels"))
            if len(images) != len(labels):
                raise ValueError(f"{shown(idx['train', 'images'].parent)} 里的图像 {len(images)} 张，标签 {len(labels)} 个，应一样多；请重新下载。")
        else:
            part = _torchvision(class_name, root, download, train=is_train)
            images, labels = torch.as_tensor(part.data), torch.as_tensor(part.targets)  # 灰度 [N, H, W]，彩色 [N, H, W, C]
        images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
        pair.append((_fit(images, image_size, channels), labels.to(torch.int64)))
    (train_images, train_labels), (test_images, test_labels) = pair
    return ImageSet(name, train_images, test_images, train_labels, test_labels, label_names)


# MNIST 与 Fashion-MNIST 的四个文件
_IDX = (("train", "images", 3), ("train", "labels", 1), ("t10k", "images", 3), ("t10k", "labels", 1))


def _find_idx(class_name: str, root: Path) -> dict[tuple[str, str], Path] | None:
    """四个 idx 文件在哪里：名字里是点或横线、压缩着没有、``root`` 偏了一级、解压成了文件夹，都认；一个也没有则 None。

    MNIST 与 Fashion-MNIST 的文件同名，所以路径里写着另一个的不要。
    """
    others = {"mnist", "fashionmnist", "kmnist", "qmnist", "emnist"} - {class_name.lower()}
    best: dict[tuple[str, str], Path] = {}
    for nest in (f"{class_name}/raw", class_name, f"{class_name.lower()}/raw", class_name.lower(), "raw", "", f"../{class_name}/raw", "../raw"):
        folder = root / nest
        if others & {re.sub(r"[-_ ]", "", part.lower()) for part in folder.resolve().parts[-2:]}:
            continue
        found: dict[tuple[str, str], Path] = {}
        with suppress(OSError):
            inside = sorted(folder.iterdir())
            for path in (*inside, *(p for each in inside if each.is_dir() and "ubyte" in each.name.lower() for p in sorted(each.iterdir()))):
                match = re.fullmatch(r"(train|t10k|test)-(images|labels)[-._]idx[13]-ubyte(\.gz)?", path.name.lower())
                if match and path.is_file():
                    found.setdefault(("train" if match[1] == "train" else "t10k", match[2]), path)
        if len(found) > len(best):
            best = found
    return best or None


def _read_idx(path: Path, class_name: str) -> Tensor:
    """一个 idx 文件（http://yann.lecun.com/exdb/mnist 的格式）→ uint8；按内容认 gzip，不看名字。"""
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        dims = data[3]
        shape = struct.unpack_from(f">{dims}I", data, 4)
        if data[:3] != b"\0\0\x08" or dims not in (1, 3) or len(data) != 4 + 4 * dims + math.prod(shape):
            raise ValueError("大小与头里所说的不符")
    except (ValueError, IndexError, struct.error, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise FileNotFoundError(
            f"{shown(path.parent.resolve())} 里没有完整的 {class_name}：{shown(path.name)} 截断或损坏；请重新取得它，或加 --download（download=True）下载。"
        ) from error
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=4 + 4 * dims).reshape(shape)


def _names(paths: Iterable[Path]) -> str:
    names = sorted(path.name for path in paths)
    return "、".join(shown(name) for name in names[:5]) + ("…" if len(names) > 5 else "")


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
        places = "、".join(shown(root.resolve() / nest) for nest in nests)
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
    return decode("celeba", folder, files, shuffled(files, seed), lead=0, crop=148, notes=notes)


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
        raise PermissionError(f"没有权限打开 {shown(folder)}；请检查它与上级文件夹的读取权限。") from error
    except (OSError, ValueError):
        if Path(source).name != str(source) and source:
            raise FileNotFoundError(f"没有文件夹 {shown(folder.absolute())}；请检查路径的拼写。") from None
        close = difflib.get_close_matches(str(source).lower(), NAMES, n=1)
        hint = f"你要的也许是 {close[0]}" if close else f"可用的名字有 {'、'.join(NAMES)}"
        raise ValueError(
            f"没有名为 {shown(str(source))!r} 的数据（{'、'.join(NAMES)}），也没有这个文件夹；{hint}，或给出图片文件夹的路径。"
        ) from None
    if not is_folder:
        raise NotADirectoryError(f"{shown(folder)} 是一个文件，数据来源应为文件夹；请给出放着图片的文件夹。")
    files, notes = find_pictures(folder)
    return decode(folder.resolve().name, folder, files, shuffled(files, seed), lead=0, crop=None, notes=notes)
