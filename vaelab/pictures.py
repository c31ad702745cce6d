"""图片文件夹：找到图片，解码成 uint8，写进缓存；解码只做一次，以后直接内存映射。"""

from __future__ import annotations

import hashlib
import io
import json
import math
import mmap
import os
import secrets
import stat
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import psutil
import torch
from filelock import FileLock  # torch 自身的依赖，装了 torch 就有
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm.auto import tqdm

from vaelab.images import ImageSet

# PIL 登记了扩展名、却不是位图的格式：文档、矢量图、视频、气象数据。
_NOT_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MCIDAS", "MPEG", "PALM", "PDF", "WMF"}
# 只列缺解码器的手机格式：不列，它们会被当作无关文件悄悄略过。
_PHONE_SUFFIXES = {".heic", ".heif"}
_MAX_PIXELS = 2**26  # 8192×8192；再大的不解码，以免一个小文件撑满内存
_CACHE_VERSION = 1


def find_pictures(folder: Path) -> tuple[dict[str, os.stat_result | None], tuple[str, ...]]:
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


def shuffled(names: dict[str, os.stat_result | None], seed: int) -> list[str]:
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
        raise ValueError(f"{folder.absolute()} 里读得出的图片应至少有 2 张（训练、测试各一），实际 {kept} 张；{''.join(notes)}请放入更多完好的图片。")
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {**header, "shape": (kept, *tail)})
    test = kept_lead if 0 < kept_lead < kept else max(1, round(kept / 10))
    return {"shape": [kept, *tail], "test": test, "notes": notes}


def decoded_set(
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
    decode = partial(_decode, folder, order, lead, progress=progress, image_size=image_size, channels=channels, crop=crop)

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


def read_pictures(path: str | os.PathLike, image_size: int, channels: int = 3, *, limit: int | None = None) -> tuple[Tensor, tuple[str, ...]]:
    """一张图片或一个文件夹里的图片，不划分，一张也行，不写缓存。

    Args:
        path: 图片文件，或放着图片的文件夹（按名字的先后）。
        image_size, channels: 同 :func:`vaelab.data.load`。
        limit: 至多要几张；够了就不再解码。

    Returns:
        uint8 ``[N, C, image_size, image_size]``（N ≥ 1），与该让使用者知道的话。

    Raises:
        ValueError, OSError: 不在、没有权限、一张也读不出；信息说明怎么办。
    """
    place = Path(path).expanduser()
    notes: tuple[str, ...] = ()
    if place.is_dir():
        files, notes = find_pictures(place)
        paths = [place / name for name in sorted(files)]
    elif place.exists():
        paths = [place]
    else:
        raise FileNotFoundError(f"没有文件或文件夹 {place.absolute()}；请检查路径的拼写。")
    Image.init()
    rows, skipped = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for each in paths:
            result = _try_picture(each, image_size=image_size, channels=channels, crop=None)
            if isinstance(result, str):
                skipped.append(f"{each.name}（{result or '内容不是认得的图片'}）")
            else:
                rows.append(torch.from_numpy(result))
            if len(rows) == limit:
                break
    if skipped:
        notes += (f"跳过 {len(skipped)} 个读不出的文件：{'、'.join(skipped[:5])}。",)
    if not rows:
        raise ValueError(f"{place.absolute()} 里没有读得出的图片；{''.join(notes)}请换一张完好的 .jpg 或 .png。")
    return torch.stack(rows), notes


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
