"""搬运：下一批图先取好，上一步的数后取回，计算不必等。"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from vaelab.images import ImageSet


def ahead(order: Iterator[Tensor], data: ImageSet, device: torch.device) -> Iterator[Tensor]:
    """要搬运的数据由另一个线程先取好一批，放在锁页内存里；在 CPU 的内存里、又在 CPU 上算的，原样给出。"""
    if device.type != "cuda" and data.mapped is None:
        yield from order
        return

    def fetch() -> Tensor | None:
        data.require_whole()
        images = next(order, None)
        return images.pin_memory() if images is not None and device.type == "cuda" else images

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(fetch)
        while (images := waiting.result()) is not None:
            waiting = pool.submit(fetch)
            yield images


def fetch_later(record: Tensor) -> Callable[[], list[float]]:
    """开始把设备上的几个数取回来；返回的函数等它们到齐，而不等排在后面的计算。

    CUDA 上直接 ``.item()`` 要等当前队列里的一切，包括刚排上的下一步；记一个事件，就只等到事件为止。
    """
    if record.device.type != "cuda":
        return record.tolist
    numbers = torch.empty(record.shape, dtype=record.dtype, pin_memory=True).copy_(record, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(record.device))

    def fetched() -> list[float]:
        arrived.synchronize()
        return numbers.tolist()

    return fetched
