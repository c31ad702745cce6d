"""速度与内存怎样随批大小、边长、宽度、图片数增长。"""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import torch

from vaelab.bench.contest import Contest, wait_for_device
from vaelab.bench.recipes import BATCH, FULL, Recipe, steps_of
from vaelab.cache import map_pixels
from vaelab.data import load
from vaelab.images import ImageSet
from vaelab.processes import pick_device


def _grow(model_args: dict, image_size: int, batch_size: int) -> Iterator[tuple[float, int]]:
    """先走两步热身，再走几步；交出 (图/秒, 峰值内存字节)。"""
    device = pick_device()
    before = _peak_bytes(device)
    data = load("faces", image_size=image_size, count=batch_size + max(2, batch_size // 9) + 1, progress=False)
    steps = 6
    walk = steps_of(Recipe("", batch_size=batch_size), data, model_args, total=2 + steps)
    speed = _images_per_s(walk, steps, batch_size)
    yield speed, _peak_bytes(device) - before


def _images_per_s(walk: Iterator, steps: int, batch_size: int) -> float:
    """先走两步热身，再走 ``steps`` 步，量每秒几张。"""
    for _ in range(2):
        next(walk)
    wait_for_device()
    started = time.perf_counter()
    for _ in range(steps):
        next(walk)
    wait_for_device()
    return steps * batch_size / (time.perf_counter() - started)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _grow_images(folder: str, count: int) -> Iterator[tuple[float, int]]:
    """``count`` 张图在一个内存映射的文件里，打乱着训练几十步；内存只计进程自己的，不计系统可随时收回的文件页。"""
    path = Path(folder, f"{count}.npy")
    block = load("faces", image_size=32, count=1112, progress=False).train.numpy()  # 1000 张，重复着写
    pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, 3, 32, 32))
    for start in range(0, count, len(block)):
        pixels[start : start + len(block)] = block[: count - start]
    pixels.flush()
    del pixels
    data = ImageSet("many", torch.from_numpy(map_pixels(path)), torch.from_numpy(block[:10].copy()), mapped=(path, path.stat().st_size))
    model_args = {"latent_dim": 16, "hidden_dims": [16, 32, 64]}
    steps = min(150, count // BATCH - 2)
    walk = steps_of(Recipe("", precision="fp32", data_on="host"), data, model_args, total=2 + steps)
    own = _own_bytes()
    speed = _images_per_s(walk, steps, BATCH)
    yield speed, _own_bytes() - own


def _own_bytes() -> int:
    """进程自己的内存，不含内存映射的文件。"""
    memory = psutil.Process().memory_info()
    return memory.rss - getattr(memory, "shared", 0)


def bench_scale(largest: int, folder: str | None = None) -> dict:
    """速度与峰值内存随规模的变化；每一点各在自己的进程里。``largest``：图片数到 10 的几次方。"""
    half = [16, 32, 64, 128, 256]
    axes = {
        "batch_size": [(n, (_grow, FULL, 64, n)) for n in (8, 16, 32, 64, 128, 256)],
        "image_size": [(n, (_grow, FULL, n, 16)) for n in (32, 64, 128, 256)],
        "width": [(k, (_grow, {"latent_dim": 128, "hidden_dims": [k * w // 16 for w in half]}, 64, 32)) for k in (4, 8, 16, 32, 64)],
    }
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as place:
        axes["images"] = [(10**k, (_grow_images, place, 10**k)) for k in range(3, largest + 1)]
        result: dict[str, list] = {}
        for name, points in axes.items():
            result[name] = []
            for x, job in points:
                with Contest({"point": job}) as contest:
                    speed, peak = contest.go("point")[1]
                result[name].append({"x": x, "images_per_s": round(speed, 1), "peak_bytes": int(peak)})
                relative = speed / result[name][0]["images_per_s"]
                print(f"{name} = {x}：速度是第一点的 {relative:.2f} 倍，内存 {peak / 1e6:.0f} MB", flush=True)
    return result
