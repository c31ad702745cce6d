"""图像：uint8 与浮点的换算，装图像的容器，分批。

图像在模型里是 [-1, 1] 的浮点数，在模型外是 uint8；:func:`to_float` 与 :func:`to_uint8` 是唯一的一对换算。
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from vanilla_vae import positive_int


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

    def digest(self) -> str:
        """内容的散列（32 个十六进制数字）：只取决于像素、形状、划分与次序，与机器、缓存、在内存里还是映射着都无关。"""
        self.require_whole()
        digest = hashlib.blake2b(repr((tuple(self.train.shape), tuple(self.test.shape))).encode(), digest_size=16)
        for images in (self.train, self.test):
            for chunk in images.split(1000):  # 分块：比内存大的映射也算得
                digest.update(chunk.contiguous().cpu().numpy().data)
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"ImageSet({self.name!r}, train={list(self.train.shape)}, test={list(self.test.shape)})"


def _describe(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def batch_rows(
    total: int,
    batch_size: int,
    generator: Generator | None = None,
    drop_last: bool = True,
    shard: tuple[int, int] = (0, 1),
    device: torch.device | None = None,
) -> Iterator[Tensor]:
    """走一遍 ``total`` 张图，逐批给出行号 ``[B]``，int64，在 ``device`` 上。

    给了 ``generator`` 就打乱，否则按原来的顺序。``drop_last`` 丢掉末尾不满的一批，使每一步的批一样大。
    ``shard = (k, n)`` 只给出每一批均分成 n 份之后的第 k 份（从 0 数），供 n 个进程各取一份。
    """
    if drop_last and total < positive_int("batch_size", batch_size):
        raise ValueError(f"batch_size 应不大于图片数 {total}，收到 {batch_size}；请减小它，否则一步也不会训练。")
    if generator is None:
        order = torch.arange(total)
    else:
        order = torch.randperm(total, generator=generator, device=generator.device)
    order = order.to(device)
    stop = total - total % batch_size if drop_last else total
    index, parts = shard
    for start in range(0, stop, batch_size):
        yield order[start : start + batch_size].tensor_split(parts)[index]


def batches(
    images: Tensor,
    batch_size: int,
    generator: Generator | None = None,
    drop_last: bool = True,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[Tensor]:
    """走一遍 ``images``，逐批给出 uint8 ``[B, C, H, W]``；其余同 :func:`batch_rows`。"""
    for rows in batch_rows(len(images), batch_size, generator, drop_last, shard, images.device):
        yield images[rows]
