"""一个文件怎样变成像素：认格式、查文件是否完整、摆正、取中央的正方形、换到 sRGB、缩放。

读不出的说出原因，并分清是文件坏了、缺解码器，还是系统一时出错：后两种下次还要再试。
"""

from __future__ import annotations

import errno
import functools
import importlib
import io
import os
import re
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import psutil
from PIL import Image, ImageCms, TiffImagePlugin, UnidentifiedImageError

# PIL 登记了扩展名、却不是位图的格式：文档、矢量图、视频、气象数据；FITS 的 BZERO 与 BSCALE，PIL 不理会。
_NOT_PICTURES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MCIDAS", "MPEG", "PALM", "PDF", "WMF"}
_PLUGINS = ("pillow_heif", "pillow_avif", "pillow_jxl")  # 装了就用，没装也不要
# PIL 的格式名 → 给人看的名字、扩展名、文件开头的样子、装什么
_NEED_PLUGIN = {
    "HEIF": ("HEIC", {".heic", ".heif", ".hif", ".heics"}, rb".{4}ftyp(hei|hev|mif1|msf1)", "pillow-heif"),
    "AVIF": ("AVIF", {".avif", ".avifs"}, rb".{4}ftypavi", "11.3 以上的 Pillow"),
    "JXL": ("JPEG XL", {".jxl"}, rb"\xff\x0a|\0\0\0\x0cJXL ", "pillow-jxl-plugin"),
}
# 扩展名不像图片的文件，只有开头是这些才当作图片
_MAGIC = rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|RIFF.{4}WEBP|BM.{4}\0\0\0\0|II\*\0|MM\0\*|.{4}ftyp(hei|hev|mif1|msf1|avi)|\0\0\0\x0c(jP|JXL) "
# SampleFormat、几位、PIL 的 mode 与 raw mode（{} 处大端是 B）
_GREY_TIFF = [(3, 64, "F", "F;64{}F"), (3, 32, "F", "F;32{}F"), (1, 32, "I", "I;32{}"), (2, 32, "I", "I;32{}S"), (2, 16, "I", "I;16{}S")]
_GREY_TIFF += [(1, 16, "I;16", "I;16{}")]
_SPARED = 16  # 中间没写上、结尾却在的文件，留着的结尾至多算这么长
MAX_PIXELS = 2**28  # 16384×16384（JPEG 按缩小解码之后的大小算）；再大的不解码，以免一个小文件撑满内存
MAX_BYTES = 2**30  # 查完整要把压缩的文件整个读进来

_SYSTEM_REASONS = {
    errno.EIO: "磁盘或网络盘读写出错",
    errno.ENOMEM: "内存不够",
    errno.ENOENT: "链接断开或文件已不在",
    errno.EACCES: "没有读取权限",
    errno.EPERM: "没有读取权限",
    errno.ELOOP: "链接绕成了圈",
    errno.EMFILE: "打开的文件太多",
    errno.ENOTCONN: "网络盘断开",
    errno.ETIMEDOUT: "网络盘没有回应",
    getattr(errno, "ESTALE", -1): "网络盘上的文件已换过",
}


class Unreadable(NamedTuple):
    """读不出的文件：``reason`` 给人看，空串表示它本来就不像图片，不必提起；``retry`` 见下。

    ``retry`` 为 ``"system"``：系统一时出错，下次再试；``"decoder"``：解码器变了再试；``""``：文件变了再试。
    """

    reason: str
    retry: str = ""


class Wide(NamedTuple):
    """没有约定白点的图：浮点与有符号的、32 位的整数，要看过同一批的其余各张才知道什么是白。

    Attributes:
        values: float32 ``[C, image_size, image_size]``，原来的单位。
        kind: 同一种才一起定白：``"float"``、``"int32"``、``"int16"``、``"int8"``。
        whole: 值都是整数。
        inverted: 0 是白（TIFF 的 WhiteIsZero）。
    """

    values: np.ndarray
    kind: str
    whole: bool
    inverted: bool


class _Damaged(Exception):
    pass


class _OwnFigure(Exception):
    pass


@functools.cache
def _register() -> None:
    """登记全部格式，装着的插件也算。"""
    for name in _PLUGINS:
        with suppress(Exception):  # 没装，或装坏了
            plugin = importlib.import_module(name)
            getattr(plugin, "register_heif_opener", lambda: None)()
    Image.init()
    for order, big in ((b"II", ""), (b"MM", "B")):  # PIL 的表里没有、却会解的灰度 TIFF
        for white_is_zero in (0, 1):
            for kind, bits, mode, raw in _GREY_TIFF:
                mode, raw = f"{mode}{big}" if bits == 16 and kind == 1 else mode, raw.format(big)
                TiffImagePlugin.OPEN_INFO.setdefault((order, white_is_zero, (kind,), 1, (bits,), ()), (mode, raw))


def formats() -> list[str]:
    """此刻解得出的格式，常见的在前；须在开线程之前调用一次。使用者可能后来自己又登记了新的，所以每次重新列。"""
    _register()
    return [kind for kind in Image.OPEN if kind not in _NOT_PICTURES]


def picture_suffixes() -> frozenset[str]:
    """图片的扩展名，小写，带点；缺解码器的也算，为的是能说出来。"""
    _register()
    return _suffixes(len(Image.EXTENSION))


@functools.cache
def _suffixes(registered: int) -> frozenset[str]:
    """``registered`` 只用来在登记了新格式之后重算；每个文件都要问一次，不能每次都列。"""
    known = {suffix for suffix, kind in Image.EXTENSION.items() if kind not in _NOT_PICTURES}
    return frozenset(known.union(*(suffixes for _, suffixes, _, _ in _NEED_PLUGIN.values())))


class _Budget:
    """同时在解码的图片合起来占的内存有界：小图一起解，大图排队，比上限还大的独自解。"""

    def __init__(self, total: int) -> None:
        self._total, self._used, self._changed = total, 0, threading.Condition()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        size = min(size, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._used + size <= self._total)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


_budget = _Budget(min(2**30, psutil.virtual_memory().total // 4))


@contextmanager
def no_pixel_limit() -> Iterator[None]:
    """PIL 打开 1.8 亿像素以上的就报错，哪怕 JPEG 可以缩小着解码；大小由这里的 MAX_PIXELS 管。"""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def decode_picture(path: Path, *, image_size: int, channels: int, crop: int | None = None) -> np.ndarray | Wide | Unreadable:
    """解码一个文件 → uint8 ``[C, image_size, image_size]``；白点未定的给出 :class:`Wide`，读不出的给出原因。

    取中央的正方形（边长至多 ``crop`` 像素），再缩放。
    """
    try:
        with open(path, "rb") as file:
            head = file.read(32)
            if path.suffix.lower() not in picture_suffixes() and not re.match(_MAGIC, head, re.DOTALL):
                return Unreadable("")
            if not head:
                return Unreadable("空文件")
            if re.match(b"PF\\s", head):
                return _fit_wide(_colour_pfm(file), "float", False, image_size, channels, crop)
            if missing := _missing_plugin(path, head):
                return missing
            size = file.seek(0, os.SEEK_END)
            if size > MAX_BYTES and not re.match(rb"II[*+]\0|MM\0[*+]|BM|P\d", head):  # 这几种不压缩、或有许多页
                return Unreadable(f"文件太大，压缩的图片上限是 {MAX_BYTES / 2**30:.0f} GB")
            zeros = _zero_tail(file)
            with _budget.hold(size):
                _require_whole(file, head, zeros)
            zeros = max(zeros, _zero_tail(file, _SPARED))
            try:
                return _read(file, zeros, image_size, channels, crop)
            except (_Damaged, _OwnFigure, MemoryError, Image.DecompressionBombError):
                raise
            except Exception:
                for bare in _without_metadata(file, head):  # 附带的信息坏了，不该赔上好好的像素
                    with suppress(Exception):
                        return _read(bare, 0, image_size, channels, crop)
                raise
    except _OwnFigure:
        return Unreadable("本项目画的图，不是数据")
    except Image.DecompressionBombError:
        return Unreadable(f"像素太多，上限是 {MAX_PIXELS / 1e6:.0f} 百万像素")
    except _Damaged as error:
        return Unreadable(str(error))
    except MemoryError:
        return Unreadable("内存不够", "system")
    except UnidentifiedImageError:
        if re.match(rb"II[*+]\0|MM\0[*+]", head):
            return Unreadable("TIFF 里的数 PIL 读不了，例如 16 位或彩色的浮点；请先转成 8 或 16 位的整数", "decoder")
        return Unreadable("内容不是认得的图片", "decoder")
    except OSError as error:
        if error.errno is None:  # 没有系统的错误号：是解码器说的
            return Unreadable("截断或损坏")
        return Unreadable(_SYSTEM_REASONS.get(error.errno) or f"系统错误 {errno.errorcode.get(error.errno, error.errno)}", "system")
    except Exception as error:  # 各种格式的解码器遇到坏数据时抛出的类型五花八门
        return Unreadable("截断或损坏" if isinstance(error, (SyntaxError, EOFError)) else f"损坏：{type(error).__name__}")


def _missing_plugin(path: Path, head: bytes) -> Unreadable | None:
    """缺解码器的格式：看内容；扩展名是它、内容却是 JPEG 的（手机常这样导出）照读。"""
    for kind, (name, suffixes, magic, package) in _NEED_PLUGIN.items():
        by_name = path.suffix.lower() in suffixes and not re.match(_MAGIC, head, re.DOTALL)
        if kind not in Image.OPEN and (by_name or re.match(magic, head, re.DOTALL)):
            return Unreadable(f"{name}，装上 {package} 就能读", "decoder")
    return None


def _read(file: BinaryIO, zeros: int, image_size: int, channels: int, crop: int | None) -> np.ndarray | Wide:
    file.seek(0)
    start = file.read(8)
    file.seek(0)
    # 最常见的两种直接开：让 PIL 逐个格式去试，要花解码一张小图的十分之一
    known = ["JPEG"] if start.startswith(b"\xff\xd8\xff") else ["PNG"] if start.startswith(b"\x89PNG\r\n") else formats()
    with Image.open(file, formats=known) as image:
        if str(image.info.get("Software", "")).startswith("vaelab"):
            raise _OwnFigure
        if image.format == "TIFF":
            _mend_tiles(image)
        if image.format == "JPEG2000" and len(image.getbands()) > 1:
            _require_eight_bits(file)
        raw, box = _tile(image)
        if crop is None:
            image.draft(None, (2 * image_size, 2 * image_size))  # JPEG 可以直接解码成 1/2、1/4、1/8 大小
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        tags = getattr(image, "tag_v2", {})
        kind, bits, inverted = _numbers(image, raw, tags)
        with _budget.hold(image.width * image.height * (8 if kind or image.mode not in ("1", "L", "P") else 2)):
            image.load()
            if zeros and _stops_midway(image, zeros / max(1, file.seek(0, os.SEEK_END))):
                raise _Damaged("后面一段全是零，没有写完")
            profile = image.info.get("icc_profile") or _gamma(image)
            whole = _without_idle_alpha(_on_whole_canvas(image, box or _webp_box(file, image)), image.format)
            square = _square(_upright(whole), crop, image_size)
    if kind == "uint":  # 16 位（或 12 位）的灰度，白有约定
        values = np.asarray(square)
        grey = (values.astype(np.float32) * (255 / (2**bits - 1))).round().clip(0, 255).astype(np.uint8)
        if isinstance(key := image.info.get("transparency"), int):
            grey[values == key] = 0 if inverted else 255
        square = Image.fromarray(255 - grey if inverted else grey)
    elif kind:
        values = np.asarray(square)
        values = values.view(np.int8) if kind == "int8" else values.view(np.uint32) if bits == 32 else values
        return _fit_wide(_finite(values, tags)[..., None], kind, inverted, image_size, channels, None)
    elif square.has_transparency_data:
        alpha = square.convert("RGBA").getchannel("A")
        colour = _to_srgb(square.convert("L" if square.mode in ("L", "LA") else "RGB"), profile)
        square, profile = Image.new("RGB", square.size, "white"), None
        square.paste(colour, mask=alpha)
    # CelebA 用通行做法的双线性，数值才能与别人的比；自己的图片用更清晰的 Lanczos。
    resample = Image.Resampling.BILINEAR if crop else Image.Resampling.LANCZOS
    if square.mode not in ("RGB", "L", "CMYK", "LAB"):
        square = square.convert("RGB")
    small = _to_srgb(square.resize((image_size, image_size), resample), profile)
    pixels = np.asarray(small.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(image_size, image_size, channels).transpose(2, 0, 1)


def _tile(image: Image.Image) -> tuple[str, tuple[int, ...] | None]:
    """像素在文件里的排法（PIL 的 raw mode），与 GIF 第一帧占画布的哪一块；顺便把 PNG 的透明色换算到 8 位。"""
    tile = image.tile[0] if getattr(image, "tile", None) else None
    arguments = tile[3] if tile else None
    raw = arguments if isinstance(arguments, str) else arguments[0] if isinstance(arguments, tuple) and arguments else ""
    key = image.info.get("transparency")
    if image.format == "PNG" and isinstance(key, tuple) and raw == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in key)
    elif image.format == "PNG" and isinstance(key, int) and raw in ("L;2", "L;4"):
        image.info["transparency"] = key * (85 if raw == "L;2" else 17)
    return str(raw), tuple(tile[1]) if tile and image.format == "GIF" else None


def _mend_tiles(image: Image.Image) -> None:
    """补上 PIL 读 TIFF 的两处错：压缩的大端数，libtiff 已换成本机的次序，它又换一遍；分面存放的 16 位彩色，它当作 8 位。"""
    big = image.tag_v2.prefix == b"MM"  # type: ignore[attr-defined]
    deep = 16 in _as_tuple(image.tag_v2.get(258))  # type: ignore[attr-defined]
    tiles = getattr(image, "tile", [])
    for index, tile in enumerate(tiles):
        codec, extent, offset, arguments = tile
        raw = arguments[0]
        if codec == "libtiff":
            raw = re.sub(r"(;\d+)B", r"\1N", raw)
        elif len(raw) == 1 and deep and len(image.getbands()) > 1:
            raw += ";16B" if big else ";16L"
        tiles[index] = getattr(tile, "_make", tuple)((codec, extent, offset, (raw, *arguments[1:])))  # 老的 Pillow 里是元组


def _require_eight_bits(file: BinaryIO) -> None:
    """PIL 把更深的彩色 JPEG 2000 舍入到 8 位时会溢出：白成了黑。"""
    file.seek(0)
    found = re.search(rb"ihdr.{10}(.)|\A\xff\x4f\xff\x51.{38}(.)", file.read(4096), re.DOTALL)
    if found and 8 < ((found[1] or found[2])[0] & 127) + 1 <= 38:  # 255 是各不相同
        raise _Damaged("多于 8 位的彩色 JPEG 2000，PIL 会把白解成黑；请先转成 8 位，或转成 PNG")


def _without_idle_alpha(image: Image.Image, kind: str | None) -> Image.Image:
    """BMP、TGA、ICO 的第四个字节常只是填的零，不是透明。"""
    if kind in ("BMP", "DIB", "TGA", "ICO") and image.mode == "RGBA" and not image.getchannel("A").getbbox():
        return image.convert("RGB")
    return image


def _numbers(image: Image.Image, raw: str, tags) -> tuple[str, int, bool]:
    """灰度的数是哪一种：``"uint"`` 白有约定，其余见 :class:`Wide`，8 位的是空串；几位；0 是不是白。"""
    is_tiff = image.format == "TIFF"
    signed = is_tiff and 2 in _as_tuple(tags.get(339))
    bits = max(_as_tuple(tags.get(258)) or (16,)) if is_tiff else 16
    inverted = is_tiff and tags.get(262) == 0
    if image.mode == "F":
        return "float", 0, inverted
    if image.mode.startswith("I;16"):
        return "uint", bits, inverted
    if image.mode == "I":
        if image.format in ("PNG", "PPM"):
            return "uint", 16, False
        return ("int16" if is_tiff and bits == 16 else "int32"), 32 if is_tiff and bits == 32 and not signed else 0, inverted
    return ("int8", 0, inverted) if signed and image.mode == "L" and bits == 8 else ("", 8, False)


def _as_tuple(value) -> tuple:
    return () if value is None else value if isinstance(value, tuple) else (value,)


def _finite(values: np.ndarray, tags) -> np.ndarray:
    """NaN 与 GeoTIFF 里“没有数据”的值换成最小的数，无穷大换成最大的数。"""
    values = values.astype(np.float32)
    with suppress(TypeError, ValueError):
        values[values == np.float32(tags.get(42113))] = np.nan  # GDAL_NODATA
    values[np.abs(values) > 1e30] *= np.inf
    good = values[np.isfinite(values)]
    low, high = (float(good.min()), float(good.max())) if good.size else (0.0, 0.0)
    return np.nan_to_num(values, nan=low, posinf=high, neginf=low)


def _fit_wide(values: np.ndarray, kind: str, inverted: bool, image_size: int, channels: int, crop: int | None) -> Wide:
    """``[H, W, 1 或 3]`` 的数 → :class:`Wide`；缩放不许越出原来的范围，否则 Lanczos 会造出界外的数。"""
    whole = bool((values == np.rint(values)).all())
    planes = []
    for plane in values.transpose(2, 0, 1):
        square = _square(Image.fromarray(np.ascontiguousarray(plane)), crop, image_size)
        small = np.asarray(square.resize((image_size, image_size), Image.Resampling.LANCZOS))
        planes.append(small.clip(plane.min(), plane.max()))
    stacked = np.stack(planes)
    if channels == 1 < len(stacked):
        stacked = np.tensordot(np.float32([0.299, 0.587, 0.114]), stacked, 1)[None]
    return Wide(np.ascontiguousarray(np.broadcast_to(stacked, (channels, image_size, image_size)), np.float32), kind, whole, inverted)


def _colour_pfm(file: BinaryIO) -> np.ndarray:
    """彩色的 PFM（PIL 只读灰度的）：三行文字，然后自下而上的 float32；比例为负是小端，它的大小不改变比值。"""
    file.seek(0)
    header = re.match(rb"PF\s+(\d+)\s+(\d+)\s+([-+.\deE]+)\s", file.read(200))
    if not header:
        raise _Damaged("PFM 的头损坏")
    width, height, scale = int(header[1]), int(header[2]), float(header[3])
    if width * height > MAX_PIXELS // 4:
        raise Image.DecompressionBombError
    file.seek(header.end())
    data = file.read(12 * width * height)
    if not width * height or len(data) < 12 * width * height:
        raise _Damaged("截断或损坏")
    values = np.frombuffer(data, "<f4" if scale < 0 else ">f4").reshape(height, width, 3)[::-1]
    return _finite(values, {})


def _square(image: Image.Image, crop: int | None, image_size: int) -> Image.Image:
    """中央的正方形；大图先按整数倍缩小，省去一份原样大小的副本。"""
    side = min(crop or image.width, image.width, image.height)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    factor = side // (4 * image_size)
    if side >= 4096 and factor > 1 and image.mode in ("L", "RGB", "RGBA", "CMYK", "F") and "transparency" not in image.info:
        return image.reduce(factor, box)
    return image.crop(box)


def _upright(image: Image.Image) -> Image.Image:
    """按 EXIF 的方向摆正；EXIF 坏了就当没有。"""
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # 坏的 EXIF 抛出什么都有可能
        return image
    turns = Image.Transpose
    turn = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_270,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_90,
    }.get(orientation)
    return image if turn is None else image.transpose(turn)


def _on_whole_canvas(image: Image.Image, box: tuple[int, ...] | None) -> Image.Image:
    """第一帧不满画布时，其余是透明的，照规矩放在白纸上；PIL 给的是调色板的第 0 色或黑色。"""
    if box is None or box == (0, 0, *image.size):
        return image
    canvas = Image.new("RGBA", image.size, "white")
    frame = image.convert("RGBA").crop(box)
    canvas.alpha_composite(frame, box[:2])
    return canvas


def _webp_box(file: BinaryIO, image: Image.Image) -> tuple[int, ...] | None:
    """动画 WebP 的第一帧占画布的哪一块；不是动画则 None。"""
    if image.format != "WEBP" or not getattr(image, "is_animated", False):
        return None
    file.seek(12)
    while len(header := file.read(8)) == 8:
        name, size = header[:4], struct.unpack("<I", header[4:])[0]
        if name == b"ANMF":
            left, top, width, height = (int.from_bytes(file.read(3), "little") for _ in range(4))
            return 2 * left, 2 * top, 2 * left + width + 1, 2 * top + height + 1
        file.seek(size + size % 2, os.SEEK_CUR)
    return None


# ---------------------------------------------------------------- 颜色


@functools.lru_cache(maxsize=64)
def _srgb_transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """由 ``profile`` 到 sRGB；已是 sRGB、配置文件坏了或不配这种图，都是 None。"""
    try:
        source = ImageCms.createProfile("LAB") if profile is None else ImageCms.ImageCmsProfile(io.BytesIO(profile))
        intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent, flags)
    except Exception:  # 坏的配置文件抛出什么都有可能
        return None
    if mode in ("RGB", "L"):  # 几种颜色都不动，就是 sRGB
        swatch = np.random.default_rng(0).integers(0, 256, (8, 8, 3) if mode == "RGB" else (8, 8), dtype=np.uint8)
        probe = Image.fromarray(swatch)
        after = np.asarray(ImageCms.applyTransform(probe, transform), np.int16)
        if np.abs(after - np.asarray(probe.convert("RGB"), np.int16)).max() <= 2:
            return None
    return transform


def _gamma(image: Image.Image) -> float | None:
    """PNG 自己写明的 γ（gAMA），没有写明颜色、又与 sRGB 的 1/2.2 不同时才有。"""
    gamma = image.info.get("gamma") if image.format == "PNG" and "srgb" not in image.info else None
    return gamma if gamma and 0.1 < gamma < 10 and abs(2.2 * gamma - 1) > 0.05 else None


def _to_srgb(image: Image.Image, profile: bytes | float | None) -> Image.Image:
    """``profile`` 是 ICC 配置文件，或 PNG 的 γ。"""
    if isinstance(profile, float):
        levels = [round(255 * (value / 255) ** (1 / (2.2 * profile))) for value in range(256)]
        return image.point(levels * len(image.getbands()))
    if profile or image.mode == "LAB":
        transform = _srgb_transform(None if image.mode == "LAB" else profile, image.mode)
        if transform is not None:
            return ImageCms.applyTransform(image, transform)
    return image


# ---------------------------------------------------------------- 文件完整吗


def _zero_tail(file: BinaryIO, spared: int = 0) -> int:
    """最后 ``spared`` 个字节之前有多少个连着的零；不到 16 个不算。复制到一半、断电的文件，常是大小对、后面全是零。"""
    position = size = max(0, file.seek(0, os.SEEK_END) - spared)
    block = 16
    while position > 0:
        file.seek(max(0, position - block))
        left = len(file.read(position - file.tell()).rstrip(b"\0"))
        start = max(0, position - block)
        if left:
            position = start + left
            break
        position, block = start, 2**20
    return size - position if size - position >= 16 else 0


def _require_whole(file: BinaryIO, head: bytes, zeros: int) -> None:
    """看压缩数据的字节，不看像素：全黑的、底部整片同色的真图不会误伤。"""
    if head.startswith(b"\x89PNG\r\n"):
        for name, body, checksum in _png_chunks(file):
            if name == b"IDAT" and zlib.crc32(body, zlib.crc32(name)) != checksum:
                raise _Damaged("数据与校验和不符，损坏")
    elif head.startswith(b"\xff\xd8"):
        file.seek(0)
        if _jpeg_has_hole(file.read()):
            raise _Damaged("有一段全是零，没有写完")
    elif zeros and head.startswith(b"GIF8"):
        file.seek(-zeros - 1, os.SEEK_END)
        if file.read(1) != b";":
            raise _Damaged("后面一段全是零，没有写完")
    elif re.match(rb"RIFF.{4}WEBPVP8L|.{4}ftyp|\0\0\0\x0c(jP|JXL) |\xff\x4f\xff\x51|\xff\x0a|qoif", head, re.DOTALL):
        file.seek(0)
        data = file.read()
        if bytes(max(64, len(data) // 32)) in data:  # 这些格式压缩得紧，好的文件里没有连着的许多零
            raise _Damaged("有一段全是零，没有写完")


def _first_scan(data: bytes) -> int:
    """JPEG 里第一个扫描（SOS）的位置，跳过各段（里面的缩略图也有自己的扫描）；没有则是文件的长度。"""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        if data[position + 1] == 0xDA:
            return position
        position += 1 if data[position + 1] == 0xFF else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return len(data)


def _jpeg_has_hole(data: bytes) -> bool:
    """压缩数据里有没有一段没写上的零。

    全零的码总是霍夫曼表里的第一个符号。只有 DC 的第一个是“不变”、AC 的第一个是“块到此为止”，一片同色才会写成连串的零，
    而且每一块至多几位；别的情形，或零比全部块都写成同色所要的还多，就是没写完。
    """
    scan = _first_scan(data)
    hole = data.find(bytes(64), scan)
    if hole < 0:
        return False
    # 压缩数据里的 FF 后面总是 00 或 RSTn，所以 FFD9 就是结尾；它后面补的零不要紧。
    end = data.find(b"\xff\xd9", scan)
    if end < 0 or end < hole:
        return end < 0
    run = next(iter(re.compile(rb"\0+").finditer(data, hole))).end() - hole
    blocks, flat, baseline, position = 1, True, True, 2
    while position < scan:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        body = data[position + 4 : position + 2 + length]
        if marker == 0xC4:
            while len(body) > 17:
                flat, body = flat and body[17] == 0, body[17 + sum(body[1:17]) :]
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC8, 0xCC):
            height, width = struct.unpack(">HH", body[1:5])
            blocks, baseline = body[5] * (width // 8 + 2) * (height // 8 + 2), marker in (0xC0, 0xC1)
        position += 1 if marker == 0xFF else 2 + length
    return (baseline and not flat) or 8 * run > 8 * blocks


def _stops_midway(image: Image.Image, share: float) -> bool:
    """末尾的零是不是没有写完：不压缩的格式看像素停在一行当中，WebP 看零那一段解出来的是不是同一种颜色。

    真图的黑边总在一行的两端之间，或从行首开始。WebP 的算术编码里，一片同色本来就写成零，解出来也同色；
    没有写完的，预测方式还是原来的，解出来是由上面拖下来的条纹。
    """
    pixels = np.asarray(image)
    if image.format == "WEBP":
        rows = int(share * len(pixels)) - 16  # 宏块是 16 行
        return share > 1 / 32 and rows > 0 and int(np.ptp(pixels[-rows:].reshape(-1, pixels.shape[-1]), axis=0).max()) > 8
    if image.format not in ("BMP", "DIB", "PPM", "TIFF", "TGA", "DDS"):
        return False
    lit: np.ndarray = pixels.reshape(*pixels.shape[:2], -1).any(axis=2)
    if image.format in ("BMP", "DIB", "TGA") or (image.format == "PPM" and image.mode == "F"):  # 自下而上
        lit = lit[::-1]
    lit[-1, -_SPARED:] = False
    rows = lit.any(axis=1).nonzero()[0]
    if len(rows) == 0 or not 0 < (last := int(rows[-1])) < len(lit) * 7 / 8:
        return False
    cut = int(lit[last].nonzero()[0][-1]) + 1
    return cut < lit.shape[1] and lit[last, :cut].mean() > 0.9 and lit[last - 1, cut:].mean() > 0.9


def _png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes, int]]:
    """PNG 的各块：名字、内容、校验和；到 IEND 或读不下去为止。"""
    file.seek(8)
    while len(header := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", header)
        body = file.read(length)
        tail = file.read(4)
        if len(tail) < 4 or not name.isalpha():
            return
        yield name, body, int.from_bytes(tail, "big")
        if name == b"IEND":
            return


def _without_metadata(file: BinaryIO, head: bytes) -> Iterator[BinaryIO]:
    """去掉附带信息的 PNG 或 JPEG，先留着颜色与方向，再什么也不留。"""
    if head.startswith(b"\x89PNG\r\n"):
        for kept in ((b"IHDR", b"PLTE", b"tRNS", b"iCCP", b"eXIf", b"IDAT", b"IEND"), (b"IHDR", b"PLTE", b"IDAT", b"IEND")):
            parts = [head[:8]]
            for name, body, checksum in _png_chunks(file):
                if name in kept and (name in (b"IHDR", b"PLTE", b"IDAT") or zlib.crc32(name + body) == checksum):
                    parts += [struct.pack(">I", len(body)), name, body, struct.pack(">I", checksum)]
            yield io.BytesIO(b"".join(parts))
    elif head.startswith(b"\xff\xd8"):
        file.seek(0)
        data = file.read()
        parts, position, scan = [data[:2]], 2, _first_scan(data)
        while position < scan < len(data):
            length = 1 if data[position + 1] == 0xFF else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
            if data[position + 1] not in (*range(0xE1, 0xEE), 0xEF, 0xFE):  # APP0 与 Adobe 的 APP14 关系到颜色
                parts.append(data[position : position + length])
            position += length
        yield io.BytesIO(b"".join([*parts, data[scan:]]))
