"""造出怪图：每一种都照公开的报告来，附上它应有的颜色；``tools`` 里的压力试验也用它。"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

SIDE = 64
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128))  # 左上、右上、左下、右下
GREYS = (0, 255, 128, 64)
WHITE = (255, 255, 255)


def quarters(values, dtype=np.uint8, side: int = SIDE) -> np.ndarray:
    """四个角各一种颜色（或一个数）的图。"""
    a, b, c, d = (np.broadcast_to(np.asarray(v, dtype), (side // 2, side // 2, *np.shape(v))) for v in values)
    return np.concatenate([np.concatenate([a, b], 1), np.concatenate([c, d], 1)])


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(colour_type: int, bits: int, rows: np.ndarray, *before: bytes) -> bytes:
    """不经 PIL 写的 PNG：``rows`` 是每行的字节，``before`` 是放在 IDAT 之前的块。"""
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, bits, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def tiff(pixels: np.ndarray, bits: int, sample_format: int = 1, photometric: int = 1, *, order: str = "<", packed: bool = False) -> bytes:
    """TIFF：灰度 ``[H, W]``，或分面存放的彩色 ``[C, H, W]``；PIL 自己不写有符号的、WhiteIsZero 的、大端压缩的、分面的。"""
    planes = [plane.astype(plane.dtype.newbyteorder(order)).tobytes() for plane in (pixels if pixels.ndim == 3 else [pixels])]
    strips = [zlib.compress(plane) for plane in planes] if packed else planes
    offsets = [8 + sum(map(len, strips[:index])) for index in range(len(strips))]
    count = len(strips)
    tags = [(256, [SIDE]), (257, [SIDE]), (258, [bits] * count), (259, [8 if packed else 1]), (262, [photometric]), (273, offsets)]
    tags += [(277, [count]), (278, [SIDE]), (279, list(map(len, strips))), (284, [2 if count > 1 else 1]), (339, [sample_format] * count)]
    lists, entries = b"".join(strips), b""
    for tag, values in tags:
        data = struct.pack(f"{order}{len(values)}I", *values)
        entries += struct.pack(f"{order}HHI", tag, 4, len(values)) + (data if len(values) == 1 else struct.pack(f"{order}I", 8 + len(lists)))
        lists += data if len(values) > 1 else b""
    head = b"II*\0" if order == "<" else b"MM\0*"
    return head + struct.pack(f"{order}I", 8 + len(lists)) + lists + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def pfm(pixels: np.ndarray, order: str, scale: float) -> bytes:
    name = b"PF" if pixels.ndim == 3 else b"Pf"
    sign = -scale if order == "<" else scale
    return b"%s\n%d %d\n%g\n" % (name, SIDE, SIDE, sign) + pixels[::-1].astype(order + "f4").tobytes()


def photograph(seed: int = 0, side: int = 256) -> Image.Image:
    """像照片一样有纹理的图，处处不是 0。"""
    noise = np.random.default_rng(seed).integers(30, 256, (side // 4, side // 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


def emptied(data: bytes, start: float = 0.5, keep_end: int = 0) -> bytes:
    """后面一段换成零，大小不变；``keep_end`` 个字节的结尾留着。"""
    cut = int(len(data) * start)
    return data[:cut] + bytes(len(data) - cut - keep_end) + data[len(data) - keep_end :]


def display_p3() -> bytes:
    """原色与 sRGB 不同的 RGB 配置文件（Display P3 的原色），由 sRGB 的改三个原色而来。"""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    columns = {b"rXYZ": (0.51512, 0.2412, -0.00105), b"gXYZ": (0.29198, 0.69225, 0.04189), b"bXYZ": (0.1571, 0.06657, 0.78407)}
    for index in range(struct.unpack(">I", profile[128:132])[0]):
        name, offset, _ = struct.unpack(">4sII", profile[132 + 12 * index : 144 + 12 * index])
        if name in columns:
            profile[offset + 8 : offset + 20] = struct.pack(">3i", *(round(value * 65536) for value in columns[name]))
    return bytes(profile)


def linear_grey() -> bytes:
    """γ 为 1 的灰度配置文件。"""
    white, curve = struct.pack(">4s4x3i", b"XYZ ", 63190, 65536, 54061), struct.pack(">4s4xIHxx", b"curv", 1, 256)
    body = struct.pack(">I4sII4sII", 2, b"wtpt", 156, 20, b"kTRC", 176, 16) + white + curve
    head = struct.pack(">I4sI4s4s4s", 128 + len(body), b"lcms", 0x02400000, b"mntr", b"GRAY", b"XYZ ") + bytes(12) + b"acsp"
    return (head + bytes(28) + white[8:]).ljust(128, b"\0") + body


def with_alpha_mask(bmp: bytes) -> bytes:
    """32 位的 BMP 换成写明透明度掩码的头（BITMAPV4HEADER）。"""
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    info = struct.pack("<I", 108) + bmp[18:30] + struct.pack("<I", 3) + bmp[34:54] + masks + bytes(52)
    return bmp[:10] + struct.pack("<I", 14 + len(info)) + info + bmp[54:]


def siz_of_16_bits(jpeg2000: bytes) -> bytes:
    """头里的位数改成 16 的彩色 JPEG 2000；PIL 解真的这种图，白会成了黑。"""
    data = bytearray(jpeg2000)
    siz = data.index(b"\xff\x4f\xff\x51")
    data[siz + 42 : siz + 51 : 3] = bytes([15] * 3)
    if b"ihdr" in data:
        data[data.index(b"ihdr") + 14] = 15
    return bytes(data)


def _animated_webp() -> bytes:
    """第一帧只占左上四分之一的动画 WebP，没有透明。"""
    frame = saved(Image.new("RGB", (SIDE // 2, SIDE // 2), (255, 0, 0)), "WEBP", quality=90)[12:]

    def three(value: int) -> bytes:
        return value.to_bytes(3, "little")

    def part(name: bytes, body: bytes) -> bytes:
        return name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)

    size = three(SIDE // 2 - 1)
    frames = part(b"ANMF", three(0) + three(0) + size + size + three(100) + b"\0" + frame)
    frames += part(b"ANMF", three(SIDE // 4) + three(SIDE // 4) + size + size + three(100) + b"\0" + frame)
    body = b"WEBP" + part(b"VP8X", b"\x02\0\0\0" + three(SIDE - 1) + three(SIDE - 1)) + part(b"ANIM", bytes(6)) + frames
    return b"RIFF" + struct.pack("<I", len(body)) + body


def odd_pictures() -> dict[str, tuple[bytes, tuple | None, int]]:
    """怪图的名字 → 文件的字节、四个角应有的颜色（None：不该当作好图，要在 notes 里有名字）、容许的误差。"""
    colour, grey = Image.fromarray(quarters(COLOURS)), quarters(GREYS)
    plain = saved(colour, "PNG")
    greys = tuple((g, g, g) for g in GREYS)
    rgb16 = quarters([tuple(c * 257 for c in each) for each in COLOURS], np.uint16).astype(">u2").reshape(SIDE, -1)
    grey16 = quarters([g * 257 for g in GREYS], np.uint16)
    two_bit = np.packbits(quarters([(a >> 1 & 1, a & 1) for a in (0, 3, 2, 1)]).reshape(SIDE, -1), axis=1)
    floats = quarters([g / 255 for g in GREYS], np.float32)
    overshoot = floats.copy()
    overshoot[3, 40] = 1.01
    signed = quarters((-1000, 1000, 0, 500), np.int16)
    jpeg = saved(colour, "JPEG", quality=95, subsampling=0)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 1, "说明"
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 3_000_000, zip=True)
    ours = PngImagePlugin.PngInfo()
    ours.add_text("Software", "vaelab 0.1")
    p3, srgb = display_p3(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    in_p3 = quarters(((234, 51, 35), (117, 251, 76), (0, 0, 245), (128, 128, 128)))
    palette = colour.quantize(4)
    small = Image.new("P", (SIDE // 2, SIDE // 2), 1)
    small.putpalette([9, 9, 9, 255, 0, 0])
    gif = bytearray(saved(small, "GIF", optimize=False))
    gif[6:10] = struct.pack("<HH", SIDE, SIDE)  # 画布大了，帧还是左上的四分之一
    photo = photograph()
    corner = ((255, 0, 0), WHITE, WHITE, WHITE)
    head = plain[:33]
    planes16 = np.moveaxis(quarters([tuple(c * 257 for c in each) for each in COLOURS], np.uint16), 2, 0)
    linear = tuple((round(255 * (g / 255) ** (1 / 2.2)),) * 3 for g in GREYS)
    opaque = Image.fromarray(np.dstack([grey, np.full_like(grey, 255)]))
    half_clear_rgb = Image.fromarray(np.dstack([quarters(COLOURS), np.full_like(grey, 128)]))
    half_clear = Image.fromarray(np.dstack([in_p3, np.full_like(grey, 128)]))
    idle = Image.fromarray(np.dstack([quarters(COLOURS), np.zeros_like(grey)]))
    idle_bmp = with_alpha_mask(saved(idle, "BMP"))
    half = {f"half_{kind.lower()}.{kind.lower()}": emptied(saved(photo, kind)) for kind in ("JPEG", "WEBP", "PNG", "TIFF", "BMP", "GIF", "PPM")}
    return {
        "plain.png": (plain, COLOURS, 0),
        "photo.jpg!w640": (jpeg, COLOURS, 6),
        "twitter.jpg_large": (jpeg + b"\0" * 99, COLOURS, 6),  # 结尾之后补的零不要紧
        "backup.jpeg~": (jpeg + b"~", COLOURS, 6),
        "NO_SUFFIX": (plain + b"\0", COLOURS, 0),
        "jpeg_in.heic": (jpeg + b"heic", COLOURS, 6),
        "p3.png": (saved(Image.fromarray(in_p3), "PNG", icc_profile=p3), COLOURS, 8),
        "p3.jpg": (saved(Image.fromarray(in_p3), "JPEG", icc_profile=p3, quality=95, subsampling=0), COLOURS, 12),
        "srgb.png": (saved(colour, "PNG", icc_profile=srgb), COLOURS, 0),
        "bad_icc.png": (saved(colour, "PNG", icc_profile=b"not a profile" * 9), COLOURS, 0),
        "bad_icc.jpg": (saved(colour, "JPEG", icc_profile=p3[:200], quality=95, subsampling=0), COLOURS, 6),
        "grey_with_rgb_icc.png": (saved(Image.fromarray(grey), "PNG", icc_profile=srgb), greys, 0),
        "cmyk.tif": (saved(colour.convert("CMYK"), "TIFF"), COLOURS, 2),
        "text.png": (saved(colour, "PNG", pnginfo=text), COLOURS, 0),
        "bad_exif.png": (head + chunk(b"eXIf", b"II*\0\xff\xff\xff\xff") + plain[33:], COLOURS, 0),
        "bad_ztxt.png": (head + chunk(b"zTXt", b"a\0\0" + b"broken") + plain[33:], COLOURS, 0),
        "bad_itxt.png": (head + chunk(b"iTXt", b"a\0\1\0\0\0\xff\xfe") + plain[33:], COLOURS, 0),
        "bad_crc.png": (head + chunk(b"tEXt", b"a\0b")[:-1] + b"?" + plain[33:], COLOURS, 0),
        "bad_xmp.jpg": (jpeg[:2] + b"\xff\xe1\0\x29http://ns.adobe.com/xap/1.0/\0<x:xmp\xff\xfe" + bytes(2) + jpeg[2:], COLOURS, 6),
        "bad_exif.jpg": (saved(colour, "JPEG", exif=exif.tobytes()[:30], quality=95, subsampling=0), COLOURS, 6),
        "linear_gamma.png": (png(0, 8, grey, chunk(b"gAMA", struct.pack(">I", 100_000))), linear, 1),
        "srgb_gamma.png": (png(0, 8, grey, chunk(b"gAMA", struct.pack(">I", 100_000)), chunk(b"sRGB", b"\0")), greys, 0),
        "linear_alpha.png": (saved(opaque, "PNG", icc_profile=linear_grey()), linear, 3),
        "p3_half_clear.png": (saved(half_clear, "PNG", icc_profile=p3), tuple(tuple(round((c + 255) / 2) for c in each) for each in COLOURS), 6),
        "trns_grey.png": (png(0, 8, grey, chunk(b"tRNS", b"\0\0")), (WHITE, *greys[1:]), 0),
        "trns_two_bit.png": (png(0, 2, two_bit, chunk(b"tRNS", b"\0\2")), ((0,) * 3, WHITE, WHITE, (85,) * 3), 0),
        "trns_grey16.png": (png(0, 16, grey16.astype(">u2"), chunk(b"tRNS", b"\0\0")), (WHITE, *greys[1:]), 0),
        "trns_rgb.png": (png(2, 8, quarters(COLOURS).reshape(SIDE, -1), chunk(b"tRNS", bytes([0, 255, 0, 0, 0, 0]))), (WHITE, *COLOURS[1:]), 0),
        "trns_rgb16.png": (png(2, 16, rgb16, chunk(b"tRNS", bytes([255, 255, 0, 0, 0, 0]))), (WHITE, *COLOURS[1:]), 0),
        "trns_palette.png": (saved(palette, "PNG", transparency=palette.getpixel((2, 2))), (WHITE, *COLOURS[1:]), 2),
        "white_is_zero.tif": (tiff(255 - grey, 8, photometric=0), greys, 0),
        "white_is_zero16.tif": (tiff(65535 - grey16, 16, photometric=0), greys, 0),
        "float/f.tif": (saved(Image.fromarray(floats), "TIFF"), greys, 1),
        "float/overshoot.tif": (saved(Image.fromarray(overshoot), "TIFF"), greys, 1),
        "float255/f.tif": (saved(Image.fromarray(floats * 255), "TIFF"), greys, 1),
        "nan.tiff": (saved(Image.fromarray(np.where(floats == 0, np.nan, floats)), "TIFF"), (greys[3], *greys[1:]), 1),  # NaN 当作最黑
        "float_white_is_zero/f.tif": (tiff(1 - floats, 32, 3, 0), greys, 1),
        "int16/ct.tif": (tiff(signed, 16, 2), ((0,) * 3, WHITE, (128,) * 3, (191,) * 3), 1),
        "int8/signed.tif": (tiff(quarters((-128, 127, 0, -64), np.int8), 8, 2), greys, 1),
        "uint32/u.tif": (tiff(quarters([g * 2**24 for g in GREYS], np.uint32), 32), greys, 2),
        "uint32_big/u.tif": (tiff(quarters([g * 2**24 for g in GREYS], np.uint32), 32, order=">", packed=True), greys, 2),
        "float_big/f.tif": (tiff(floats, 32, 3, order=">", packed=True), greys, 1),
        "float64/f.tif": (tiff(floats.astype(np.float64), 64, 3), greys, 1),
        "float64_big/f.tif": (tiff(floats.astype(np.float64), 64, 3, order=">", packed=True), greys, 1),
        "int16_big/i.tif": (tiff(quarters([g * 128 for g in GREYS], np.int16), 16, 2, order=">", packed=True), greys, 1),
        "int32_big/i.tif": (tiff(quarters([g * 2**23 for g in GREYS], np.int32), 32, 2, order=">", packed=True), greys, 2),
        "white_is_zero16_big.tif": (tiff(65535 - grey16, 16, photometric=0, order=">"), greys, 0),
        "planes16.tif": (tiff(planes16, 16, photometric=2), COLOURS, 0),
        "planes16_big.tif": (tiff(planes16, 16, photometric=2, order=">"), COLOURS, 0),
        "planes16_packed.tif": (tiff(planes16, 16, photometric=2, order=">", packed=True), COLOURS, 0),
        "float16.tif": (tiff(floats.astype(np.float16), 16, 3), None, 0),
        "float_colour.tif": (tiff(np.stack([floats] * 3), 32, 3, 2), None, 0),
        "pfm/little.pfm": (pfm(floats, "<", 1), greys, 1),
        "pfm/big.pfm": (pfm(floats, ">", 1), greys, 1),
        "pfm/scaled.pfm": (pfm(floats, "<", 255), greys, 1),
        "pfm/colour.pfm": (pfm(quarters([[c / 255 for c in each] for each in COLOURS], np.float32), ">", 1), COLOURS, 1),
        "pfm/deep/negative.pfm": (pfm(floats * 2 - 1, "<", 1), greys, 1),
        "partial.gif": (bytes(gif), corner, 0),
        "partial.webp": (_animated_webp(), corner, 8),
        "apng.png": (saved(colour, "PNG", save_all=True, append_images=[Image.new("RGB", colour.size)]), COLOURS, 0),
        "mpo.jpg": (saved(colour, "MPO", save_all=True, append_images=[photo], quality=95, subsampling=0), COLOURS, 6),
        "idle_alpha.bmp": (idle_bmp, COLOURS, 0),
        "idle_alpha.tga": (saved(idle, "TGA"), COLOURS, 0),
        "half_alpha.tga": (saved(half_clear_rgb, "TGA"), tuple(tuple(round((c + 255) / 2) for c in each) for each in COLOURS), 1),
        "black.bmp": (saved(Image.new("RGB", colour.size), "BMP"), ((0,) * 3,) * 4, 0),
        "black_below.ppm": (saved(Image.fromarray(quarters((*COLOURS[:2], (0,) * 3, (0,) * 3))), "PPM"), (*COLOURS[:2], (0,) * 3, (0,) * 3), 0),
        **{name: (data, None, 0) for name, data in half.items()},
        "hole.jpg": (emptied(saved(photo, "JPEG"), keep_end=2), None, 0),
        "hole_progressive.jpg": (emptied(saved(photo, "JPEG", progressive=True), keep_end=2), None, 0),
        "hole_optimised.jpg": (emptied(saved(photo, "JPEG", optimize=True), keep_end=2), None, 0),
        "deep.j2k": (siz_of_16_bits(saved(colour, "JPEG2000", no_jp2=True)), None, 0),
        "deep.jp2": (siz_of_16_bits(saved(colour, "JPEG2000")), None, 0),
        "hole.bmp": (emptied(saved(photo, "BMP"), 0.4, keep_end=2), None, 0),
        "hole.jp2": (emptied(saved(photo, "JPEG2000"), keep_end=2), None, 0),
        "last_quarter.webp": (emptied(saved(photo, "WEBP"), 0.75), None, 0),
        "lossless.webp": (emptied(saved(photo, "WEBP", lossless=True)), None, 0),
        "cut.jpg": (saved(photo, "JPEG")[:3000], None, 0),
        "cut.png": (saved(photo, "PNG")[:3000], None, 0),
        "empty.png": (b"", None, 0),
        "words.jpg": ("不是图片".encode(), None, 0),
        "ours.png": (saved(colour, "PNG", pnginfo=ours), None, 0),
        "camera.NEF": (b"MM\0*" + bytes(range(99)), None, 0),
        "phone.hif": (b"\0\0\0\x18ftypheix" + bytes(range(99)), None, 0),
        "x.jxl": (bytes.fromhex("ff0a") + bytes(range(99)), None, 0),
        "drawing.svg": (b"<svg/>", None, 0),
        "stars.fits": (b"SIMPLE  =                    T", None, 0),
        "film.mp4": (b"\0\0\0\x18ftypmp42", None, 0),
    }


def write_odd_pictures(folder: Path) -> dict[str, tuple[tuple | None, int]]:
    """把怪图写进 ``folder`` 与它的子文件夹（浮点图一批一个）；名字 → 四个角应有的颜色（None 是应当说出名字的）与误差。"""
    expected = {}
    for name, (data, corners, slack) in odd_pictures().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        expected[name] = corners, slack
    return expected
