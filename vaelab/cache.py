"""解码缓存：像素写进 .npy，以后直接内存映射；有几份、多大、怎么清。"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
from filelock import FileLock, Timeout  # torch 自身的依赖，装了 torch 就有

from vaelab.files import command, shown, system_reason

_LARGE = 20 * 2**30  # 缓存合起来超过这么大，或磁盘只剩不到 _SCARCE，就提一句怎么清
_SCARCE = 2**30


def cache_place(cache_dir: str | os.PathLike | None = None) -> Path:
    """缓存在哪里：``cache_dir``，其次环境变量 ``VAELAB_CACHE``，再其次 ``~/.cache/vaelab``。"""
    return Path(cache_dir or os.environ.get("VAELAB_CACHE") or "~/.cache/vaelab").expanduser().resolve()


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


def open_cache(cache: Path, key: str, is_current: Callable[[dict], bool]) -> tuple[np.ndarray, dict] | None:
    """缓存完好、记录又合 ``is_current`` 时，映射像素；否则 None。"""
    with suppress(OSError, ValueError, KeyError, TypeError, EOFError):
        record = json.loads((cache / f"{key}.json").read_text(encoding="utf-8"))
        if is_current(record):
            pixels = map_pixels(cache / record["file"])
            if list(pixels.shape) == record["shape"]:
                with suppress(OSError):  # 记下上次用的时间
                    os.utime(cache / f"{key}.json")
                return pixels, record
    return None


def build_cache(cache: Path, key: str, about: dict, decode: Callable[..., dict]) -> tuple[np.ndarray, dict]:
    """拿着锁解码一份；记录是 ``decode`` 所给的与 ``about``，最后才改名就位，所以中途被杀不会留下能被认出的半个缓存。"""
    for stale in cache.glob(f"{key}-*"):  # 拿着锁，所以它们属于过期的缓存或已死的进程
        with suppress(OSError):  # Windows 上别的进程还映射着的删不掉，留给下一次
            stale.unlink()
    path = cache / f"{key}-{secrets.token_hex(4)}.npy"
    record_path = path.with_suffix(".part")
    try:
        with open(path, "xb") as file:
            record = {**decode(file), **about, "file": path.name}
            file.flush()
            os.fsync(file.fileno())
        record_path.write_text(json.dumps(record), encoding="utf-8")
        os.replace(record_path, cache / f"{key}.json")
    except BaseException as error:
        path.unlink(missing_ok=True)
        record_path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = system_reason(error, advice=False)
            free = _readable(shutil.disk_usage(cache).free)
            advice = f"请腾出空间（{command('cache', '--clear')} 清掉旧的解码缓存），或用环境变量 VAELAB_CACHE 指定别处。"
            raise OSError(f"解码缓存写不进 {shown(cache)}（{reason}，磁盘还剩 {free}）；{advice}") from error
        raise
    return map_pixels(path), record


def size_note(cache: Path) -> tuple[str, ...]:
    """缓存太大、磁盘将满时提一句。"""
    with suppress(OSError):
        total, free = sum(path.stat().st_size for path in cache.glob("*.npy")), shutil.disk_usage(cache).free
        if total > _LARGE or (free < _SCARCE and total > free / 10):
            size, left = _readable(total), _readable(free)
            return (f"解码缓存 {shown(cache)} 共 {size}，磁盘还剩 {left}；{command('cache', '--clear')} 清掉它，用到时会重新解码。",)
    return ()


def cache_summary(cache_dir: str | os.PathLike | None = None) -> str:
    """缓存在哪里、有几份，各来自哪个文件夹、多少张、多大、上次何时用过；供人看的几行。"""
    cache = cache_place(cache_dir)
    rows, total = [], 0
    for key in _keys(cache):
        size, used = _size_and_use(cache, key)
        total += size
        what = "没有写完的一份"
        with suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads((cache / f"{key}.json").read_text(encoding="utf-8"))
            count, channels, height, width = record["shape"]
            folder = shown(os.fsdecode(bytes.fromhex(record["folder"]))) if "folder" in record else "（从前的版本）"
            what = f"{folder}，{count} 张，{width}×{height}，{channels} 通道"
        rows.append(f"  {_readable(size)}  上次用在 {time.strftime('%Y-%m-%d %H:%M', time.localtime(used))}  {what}")
    return "\n".join([f"解码缓存在 {shown(cache)}：{len(rows)} 份，共 {_readable(total)}。", *rows])


def clear_cache(cache_dir: str | os.PathLike | None = None, older_than_days: float | None = None) -> tuple[int, int]:
    """删掉解码缓存，用到时会重新解码；别的进程正在解码的不删，正在训练的不受影响（映射着的内容还在）。

    Args:
        cache_dir: 见 :func:`cache_place`。
        older_than_days: 只删这么多天没有用过的；None 全删。

    Returns:
        删了几份，共多少字节。
    """
    cache = cache_place(cache_dir)
    count = freed = 0
    for key in _keys(cache):
        size, used = _size_and_use(cache, key)
        if older_than_days is not None and time.time() - used < older_than_days * 86400:
            continue
        try:
            lock = FileLock(cache / f"{key}.lock", timeout=0).acquire()
        except (Timeout, OSError, NotImplementedError):
            continue
        with lock:  # 锁文件留着（0 字节）：删了它，两个进程就可能各锁各的
            with suppress(OSError):  # Windows 上映射着的删不掉
                for path in (cache / f"{key}.json", *cache.glob(f"{key}-*")):
                    path.unlink(missing_ok=True)
                count, freed = count + 1, freed + size
    return count, freed


def _keys(cache: Path) -> list[str]:
    """每一份的键；只认本项目写的名字，文件夹里别人的文件不碰。"""
    names = (re.fullmatch(r"([0-9a-f]{16})(\.json|-[0-9a-f]{8}\.(npy|part))", path.name) for path in cache.glob("*"))
    return sorted({name[1] for name in names if name})


def _size_and_use(cache: Path, key: str) -> tuple[int, float]:
    size, used = 0, 0.0
    for path in (cache / f"{key}.json", *cache.glob(f"{key}-*")):
        with suppress(OSError):
            status = path.stat()
            size, used = size + status.st_size, max(used, status.st_mtime)
    return size, used


def _readable(size: float) -> str:
    for unit in ("字节", "KB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "字节" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError
