"""图片文件夹：找到图片，解码成 uint8，合成一份数据；解码只做一次，以后取自缓存。"""

from __future__ import annotations

import filecmp
import hashlib
import io
import math
import os
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import PIL
import torch
from filelock import FileLock  # torch 自身的依赖，装了 torch 就有
from torch import Tensor
from tqdm.auto import tqdm

from vaelab.cache import build_cache, cache_place, open_cache, size_note
from vaelab.decode import Unreadable, Wide, decode_picture, formats, no_pixel_limit, picture_suffixes
from vaelab.files import shown
from vaelab.images import ImageSet

_CACHE_VERSION = 3
# 缩略图、回收站、压缩包的残留：里面的图是别处那些的副本，或是已经删掉的
_ASIDE = {"@eadir", "#recycle", "$recycle.bin", "recycler", "lost+found", "__macosx", ".thumbnails", "thumbs", "@recycle", "#snapshot"}
# 不解码、但要数出来的：相机的原始数据（里面的 TIFF 只是缩略图）、矢量图、视频
_LEFT_OUT = {
    "RAW（请用 rawpy 或相机的软件先转成 JPEG）": (
        ".nef .nrw .cr2 .cr3 .crw .arw .srf .sr2 .dng .orf .rw2 .raf .pef .srw .x3f .3fr .fff .iiq .rwl .mrw .kdc .dcr .erf .mef .mos"
    ),
    "矢量图（请先导出为 PNG）": ".svg .svgz .ai .cdr",
    "视频（请先截成图片）": ".mp4 .mov .avi .mkv .webm .m4v .wmv .flv .mts .m2ts .3gp",
    "编辑软件的工程（请先导出为 PNG）": ".psb .xcf .kra .clip .afphoto .procreate .sai2",
    "医学影像（请先转成 PNG）": ".dcm .nii",
    "HDR（请先转成 TIFF 或 PNG）": ".exr .hdr",
    "天文影像 FITS（请先用 astropy 转成 TIFF）": ".fits .fit .fts",
}
_KIND_LEFT_OUT = {suffix: kind for kind, suffixes in _LEFT_OUT.items() for suffix in suffixes.split()}
_RUN_MARK = "checkpoint.pt"  # 有它的文件夹是一次训练的结果，里面的图不是数据

Files = dict[str, os.stat_result | None]


def _listed(names: Iterable[str], count: int) -> str:
    """列出前几个名字，多的用省略号。"""
    names = list(names)
    return "、".join(shown(name) for name in names[:count]) + ("…" if len(names) > count else "")


def find_pictures(folder: Path) -> tuple[Files, tuple[str, ...]]:
    """可能是图片的文件：相对路径 → stat（断开的链接为 None），以及要告诉使用者的话。

    扩展名不认得的也算，留给解码时看内容；缩略图、回收站与本项目的运行文件夹不进去；指向同一个文件的只留一个。
    """
    suffixes = picture_suffixes()
    files: Files = {}
    seen, closed, aside, runs, linked = set(), [], [], [], []
    left_out: dict[str, list[str]] = {}
    same: dict[tuple[int, int, int], str] = {}
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=closed.append):
        real, here = os.path.realpath(parent), Path(parent)
        # 链接可以指回上级；真实路径只进一次，就不会绕圈。
        if real in seen:
            folders[:] = []
            continue
        if _RUN_MARK in names:
            runs.append(here.relative_to(folder).as_posix())
            folders[:] = []
            continue
        seen.add(real)
        aside += [(here / f).relative_to(folder).as_posix() for f in sorted(folders) if _is_aside(f)]
        folders[:] = sorted(f for f in folders if f[0] != "." and not _is_aside(f))
        for name in sorted(names):
            path = here / name
            suffix, relative = path.suffix.lower(), path.relative_to(folder).as_posix()
            if name[0] == ".":
                if suffix == ".icloud":
                    left_out.setdefault("还在 iCloud 上的文件（请先下载）", []).append(relative)
                continue
            if suffix in _KIND_LEFT_OUT and suffix not in suffixes:
                left_out.setdefault(_KIND_LEFT_OUT[suffix], []).append(relative)
                continue
            try:
                status = path.stat()
            except OSError:
                status = None
            if not (stat.S_ISREG(status.st_mode) if status else suffix in suffixes):  # 管道与设备一打开就会等下去
                continue
            if status and status.st_ino:
                first = same.setdefault((status.st_dev, status.st_ino, status.st_size), relative)
                if first != relative:
                    if not path.is_symlink() and (folder / first).is_symlink():  # 留下真的那个
                        same[status.st_dev, status.st_ino, status.st_size] = relative
                        del files[first]
                        files[relative], relative = status, first
                    linked.append(relative)
                    continue
            files[relative] = status
    notes = []
    if closed:
        notes.append(f"跳过 {len(closed)} 个没有权限打开的子文件夹：{shown(closed[0].filename)}…。")
    if aside:
        notes.append(f"没有进 {len(aside)} 个缩略图或回收站文件夹：{_listed(aside, 10)}。")
    if runs:
        notes.append(f"没有进 {len(runs)} 个本项目的运行文件夹，里面的图不是数据：{_listed(runs, 3)}。")
    if linked:
        notes.append(f"{len(linked)} 个链接指向这里已有的图片，只留一张：{_listed(linked, 3)}。")
    notes += [f"没有读 {len(found)} 个 {kind}：{_listed(found, 3)}。" for kind, found in left_out.items()]
    if not files:
        if closed:
            raise PermissionError(f"没有权限打开 {shown(closed[0].filename)}；请检查它的读取权限。")
        raise ValueError(f"{shown(folder.absolute())} 里没有图片；{''.join(notes)}请放入 .jpg、.png 等图片，可以分在子文件夹里。")
    return files, tuple(notes)


def _is_aside(name: str) -> bool:
    return name.casefold() in _ASIDE or name.casefold().startswith(".trash")


def shuffled(names: Files, seed: int) -> list[str]:
    """按散列排序：与随机数库的版本无关，而且增删一张图片不会打乱其余图片的先后。"""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}:".encode() + os.fsencode(name)).digest())


# ---------------------------------------------------------------- 没有约定白点的图


class _Scale(NamedTuple):
    """从 ``black`` 到 ``white`` 的数变成 0 到 255；``note`` 是要说的话，空串不必说。"""

    black: float
    white: float
    note: str


# 可能的白，由小到大；8 位、12 位、16 位、32 位的满格
_WHITES = {
    "float": (1.0, 255.0, 65535.0),
    "int32": (255.0, 65535.0, 2.0**31 - 1, 2.0**32 - 1),
    "int16": (255.0, 4095.0, 32767.0),
    "int8": (127.0,),
}
_KIND_NAMES = {"float": "浮点", "int32": "32 位整数", "int16": "有符号 16 位", "int8": "有符号 8 位"}


def _choose_scale(sample: np.ndarray, kind: str, whole: bool) -> _Scale:
    """由同一批的像素定黑与白：装得下绝大多数像素的最小的白；个别像素越界不改变它。

    只有 0 与 1 的浮点图像是一批 0–255 里暗的那几张，所以整数值的浮点图至少按 255；有许多负数的（CT）按两端拉开。
    """
    low, high = (float(q) for q in np.quantile(sample, (0.005, 0.995)))
    whites = [w for w in _WHITES[kind] if not (whole and w == 1)]
    white = next((w for w in whites if high <= 1.1 * w), high)
    if low < -0.05 * white or (kind != "float" and low < 0):
        if kind == "float" and not whole and low >= -1.1 and high <= 1.1:
            low, high = -1.0, 1.0
        return _Scale(low, high if high > low else low + 1, "里有负数")
    if not whole and white > whites[0] and high < white / 16:  # 例如深度图 0–10 米：按 255 只会是一片黑
        white = high
    return _Scale(0.0, white or 1.0, "" if white in whites else "没有约定的白")


def _to_bytes(wide: Wide, scale: _Scale) -> np.ndarray:
    levels = (wide.values - np.float32(scale.black)) * np.float32(255 / (scale.white - scale.black))
    grey = levels.round().clip(0, 255).astype(np.uint8)
    return 255 - grey if wide.inverted else grey


class _Waiting:
    """等着定白点的图：像素写在临时文件里，看完全系列才换算；内存与张数无关。

    同一个文件夹里扩展名相同、数的种类也相同的，是一批。
    """

    def __init__(self, folder: str | None) -> None:
        self._folder = folder
        self._spill: IO[bytes] | None = None  # 多数文件夹里没有这样的图，用不着
        self._batches: dict[tuple[str, str, str], list[tuple[int, int, str, Wide]]] = {}  # 第几个写下的、行号、名字、去掉像素的 Wide
        self._shape: tuple[int, ...] = ()
        self._count = 0

    def add(self, row: int, name: str, wide: Wide) -> None:
        path = Path(name)
        batch = self._batches.setdefault((wide.kind, str(path.parent), path.suffix.lower()), [])
        batch.append((self._count, row, name, wide._replace(values=np.empty(0, np.float32))))
        self._spill = self._spill or tempfile.TemporaryFile(dir=self._folder)
        self._spill.write(wide.values.tobytes())
        self._shape, self._count = wide.values.shape, self._count + 1

    def _each(self, batch: list[tuple[int, int, str, Wide]]) -> Iterable[tuple[int, str, Wide]]:
        assert self._spill is not None
        size = 4 * math.prod(self._shape)
        for index, row, name, wide in batch:
            self._spill.seek(index * size)
            yield row, name, wide._replace(values=np.frombuffer(self._spill.read(size), np.float32).reshape(self._shape))

    def settle(self, write: Callable[[int, np.ndarray], object]) -> list[str]:
        """定白点，``write(行号, uint8 像素)`` 写到各自的行；返回要说的话。"""
        notes = []
        for (kind, *_), batch in self._batches.items():
            step = max(1, len(batch) * math.prod(self._shape) // 2**22)  # 至多看四百万个像素
            sample = np.concatenate([wide.values.ravel()[::step] for _, _, wide in self._each(batch)])
            scale = _choose_scale(sample, kind, all(wide.whole for *_, wide in batch))
            dark = []
            for row, name, wide in self._each(batch):
                write(row, _to_bytes(wide, scale))
                if 0 < (wide.values.max() - scale.black) * 255 < 2 * (scale.white - scale.black):
                    dark.append(name)
            what = f"{len(batch)} 张{_KIND_NAMES[kind]}图（{_listed([name for _, _, name, _ in batch], 2)}）"
            if scale.note:
                notes.append(f"{what}{scale.note}，按 {scale.black:g} 为黑、{scale.white:g} 为白。")
            if dark:
                which = f"{len(dark)} 张{_KIND_NAMES[kind]}图"
                notes.append(f"{which}按这一批的 {scale.white:g} 为白，几乎全黑：{_listed(dark, 10)}；若另是一批或是蒙版，请分开放或先乘以 255。")
        if self._spill is not None:
            self._spill.close()
        return notes


# ---------------------------------------------------------------- 解码一批


def _skip_notes(skipped: dict[str, Unreadable]) -> list[str]:
    """缺解码器的按装什么分开说，其余合成一句。"""
    named = {name: each for name, each in skipped.items() if each.reason}
    needed = sorted({each.reason for each in named.values() if each.retry == "decoder" and "装上" in each.reason})
    notes = []
    for reason in needed:
        names = [name for name, each in named.items() if each.reason == reason]
        notes.append(f"没有读 {len(names)} 个 {reason}：{_listed(names, 3)}。")
    rest = [f"{shown(name)}（{each.reason}）" for name, each in named.items() if each.reason not in needed]
    if rest:
        notes.append(f"跳过 {len(rest)} 个读不出的文件：{'、'.join(rest[:30])}{'…' if len(rest) > 30 else ''}。")
    return notes


def _same_bytes(one: Path, other: Path) -> bool:
    try:
        return filecmp.cmp(one, other, shallow=False)
    except OSError:
        return False


def _decode(folder: Path, order: list[str], lead: int, file, progress: bool, unique: bool, **settings) -> dict:
    """并行解码，按 ``order`` 的先后把读得出的写进 ``file``（.npy 格式）。

    内存与图片数无关：每次只有一小段在解码，写完才取下一段。.npy 的头为行数留了位置，最后填上真实的行数。
    ``unique`` 时内容完全相同的副本只留一张：副本分进训练与测试两边，测试就不算数了。

    Returns:
        ``shape``、测试图片数 ``test``（它们排在最前）、``notes``，下次要再试的文件 ``retry``，
        与读不出、可能只缺解码器时的 ``formats``（否则为 None）。
    """
    tail = (settings["channels"], settings["image_size"], settings["image_size"])
    header = {"descr": "|u1", "fortran_order": False, "shape": (0, *tail)}
    np.lib.format.write_array_header_1_0(file, header)
    start_of_rows, kept, kept_lead = file.tell(), 0, 0
    skipped: dict[str, Unreadable] = {}
    first: dict[bytes, str] = {}
    copies: list[str] = []
    here = os.path.dirname(file.name) if isinstance(getattr(file, "name", None), str) else None
    waiting = _Waiting(here)
    known = sorted(formats())  # 登记全部格式，要在开线程之前

    def work(name: str) -> tuple[np.ndarray | Wide | Unreadable, bytes]:
        result = decode_picture(folder / name, **settings)
        if isinstance(result, Unreadable) or not unique:
            return result, b""
        pixels = result.values if isinstance(result, Wide) else result
        return result, hashlib.blake2b(pixels.tobytes(), digest_size=16).digest()

    workers = min(16, os.cpu_count() or 1)
    bar = tqdm(total=len(order), desc="解码图片", unit="张", disable=not progress)
    with warnings.catch_warnings(), no_pixel_limit(), ThreadPoolExecutor(workers) as pool, bar:
        warnings.simplefilter("ignore")  # 坏文件由 notes 交代，PIL 的英文警告不必再出现
        for start in range(0, len(order), 16 * workers):
            names = order[start : start + 16 * workers]
            for row, (name, (result, fingerprint)) in enumerate(zip(names, pool.map(work, names)), start):
                bar.update()
                if isinstance(result, Unreadable):
                    skipped[name] = result
                    continue
                # 像素相同的才去比文件的字节：每个文件都再读一遍，太慢
                if fingerprint and (twin := first.setdefault(fingerprint, name)) != name and _same_bytes(folder / twin, folder / name):
                    copies.append(f"{name} = {twin}")
                    continue
                if isinstance(result, Wide):
                    waiting.add(kept, name, result)
                    file.write(bytes(result.values.size))  # 占住这一行
                else:
                    file.write(result.tobytes())
                kept, kept_lead = kept + 1, kept_lead + (row < lead)
    notes = _skip_notes(skipped)
    if kept < 2 and copies:  # 只有一张图与它的副本：留着，至少能跑
        file.seek(0)
        file.truncate()
        record = _decode(folder, order, lead, file, False, False, **settings)
        record["notes"].append(f"读得出的 {record['shape'][0]} 张内容都相同，测试不会说明什么。")
        return record
    if copies:
        notes.append(f"{len(copies)} 张内容完全相同的副本只留一张：{_listed(copies, 3)}。")
    if not kept and not any(each.reason for each in skipped.values()):
        raise ValueError(f"{shown(folder.absolute())} 里没有图片；请放入 .jpg、.png 等图片，可以分在子文件夹里。")
    if kept < 2:
        place = shown(folder.absolute())
        raise ValueError(f"{place} 里读得出的图片应至少有 2 张（训练、测试各一），实际 {kept} 张；{''.join(notes)}请放入更多完好的图片。")

    def write(row: int, pixels: np.ndarray) -> None:
        file.seek(start_of_rows + row * pixels.nbytes)
        file.write(pixels.tobytes())

    notes += waiting.settle(write)
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {**header, "shape": (kept, *tail)})
    test = kept_lead if 0 < kept_lead < kept else max(1, round(kept / 10))
    retry = [os.fsencode(name).hex() for name, each in skipped.items() if each.retry == "system"]
    undecoded = any(each.retry == "decoder" for each in skipped.values())
    return {"shape": [kept, *tail], "test": test, "notes": notes, "retry": retry, "formats": known if undecoded else None}


def _manifest(files: Files, order: list[str], lead: int) -> str:
    """这一批文件的散列。修改时间与大小可以照抄（cp -p、rsync -t），ctime 不能；Windows 上它是创建时间，要加上文件编号。"""
    digest = hashlib.sha256(f"{_CACHE_VERSION} {PIL.__version__} {lead}".encode())
    for item in order:
        status = files[item]
        digest.update(os.fsencode(item) + b"\0")
        if status:
            number = status.st_ino if os.name == "nt" else 0  # 网络盘、U 盘上每次挂载编号都可能变
            digest.update(f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {number}\0".encode())
    return digest.hexdigest()


def decoded_set(
    name: str,
    folder: Path,
    files: Files,
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

    缓存是一对文件：像素 ``<键>-<随机>.npy`` 与记录 ``<键>.json``。记录写明像素在哪个文件、来自怎样的一批图片；
    没有记录指着的像素文件，下次解码时清掉。因系统一时出错而跳过的，每次再试；缺解码器的，登记的格式变了就重来。
    """
    folder = folder.resolve()
    cache = cache_place(cache_dir)
    if cache.is_relative_to(folder):
        raise ValueError(f"缓存 {shown(cache)} 不应放在图片文件夹 {shown(folder)} 之内；请用环境变量 VAELAB_CACHE 指定别处。")
    key = hashlib.sha256(repr((os.fsencode(folder), image_size, channels, crop, seed)).encode()).hexdigest()[:16]
    manifest = _manifest(files, order, lead)
    settings = {"image_size": image_size, "channels": channels, "crop": crop}
    decode = partial(_decode, folder, order, lead, progress=progress, unique=crop is None, **settings)

    def is_current(record: dict) -> bool:
        if record["manifest"] != manifest or (record["formats"] is not None and record["formats"] != sorted(formats())):
            return False
        with warnings.catch_warnings(), no_pixel_limit():
            warnings.simplefilter("ignore")
            again = (decode_picture(folder / os.fsdecode(bytes.fromhex(each)), **settings) for each in record["retry"])
            return all(isinstance(result, Unreadable) and result.retry == "system" for result in again)

    found = open_cache(cache, key, is_current)
    if found is None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            lock = FileLock(cache / f"{key}.lock").acquire()  # 几个进程同时来，只有一个解码，其余等着用
        except (OSError, NotImplementedError) as error:
            notes += (f"缓存文件夹 {shown(cache)} 不能写（{error}），这次解码在内存里，下次要重新解码。",)
            buffer = io.BytesIO()
            record = decode(buffer)
            buffer.seek(0)
            found = np.load(buffer), {**record, "file": None}
        else:
            about = {"manifest": manifest, "folder": os.fsencode(folder).hex()}
            with lock:
                found = open_cache(cache, key, is_current) or build_cache(cache, key, about, decode)
    pixels, record = found
    path = record["file"] and cache / record["file"]
    images = torch.from_numpy(pixels)
    test = record["test"]
    mapped = None if path is None else (path, path.stat().st_size)
    return ImageSet(name, images[test:], images[:test], notes=(*notes, *record["notes"], *size_note(cache)), mapped=mapped)


def read_pictures(path: str | os.PathLike, image_size: int, channels: int = 3, *, limit: int | None = None) -> tuple[Tensor, tuple[str, ...]]:
    """一张图片或一个文件夹里的图片，不划分，一张也行，不写缓存。

    Args:
        path: 图片文件，或放着图片的文件夹（按名字的先后）。
        image_size, channels: 同 :func:`vaelab.data.load`。
        limit: 至多要几张；够了就不再解码。

    Returns:
        uint8 ``[N, C, image_size, image_size]``（N ≥ 1），与该让使用者知道的话。浮点等没有约定白点的图，按读到的这几张定白。

    Raises:
        ValueError, OSError: 不在、没有权限、一张也读不出；信息说明怎么办。
    """
    place = Path(path).expanduser()
    notes: tuple[str, ...] = ()
    try:
        is_folder = stat.S_ISDIR(place.stat().st_mode)
    except PermissionError as error:
        raise PermissionError(f"没有权限打开 {shown(place)}；请检查它与上级文件夹的读取权限。") from error
    except (OSError, ValueError):
        raise FileNotFoundError(f"没有文件或文件夹 {shown(place.absolute())}；请检查路径的拼写。") from None
    folder, names = place.parent, [place.name]
    if is_folder:
        files, notes = find_pictures(place)
        folder, names = place, sorted(files)
    formats()  # 登记全部格式
    rows: list[np.ndarray] = []
    skipped: dict[str, Unreadable] = {}
    waiting = _Waiting(None)
    with warnings.catch_warnings(), no_pixel_limit():
        warnings.simplefilter("ignore")  # 坏文件由 notes 交代
        for name in names:
            result = decode_picture(folder / name, image_size=image_size, channels=channels)
            if isinstance(result, Unreadable):
                skipped[name] = result if is_folder or result.reason else Unreadable("内容不是认得的图片")
            elif isinstance(result, Wide):
                waiting.add(len(rows), name, result)
                rows.append(np.empty(0, np.uint8))
            else:
                rows.append(result)
            if len(rows) == limit:
                break
    notes += (*_skip_notes(skipped), *waiting.settle(rows.__setitem__))
    if not rows:
        raise ValueError(f"{shown(place.absolute())} 里没有读得出的图片；{''.join(notes)}请换一张完好的 .jpg 或 .png。")
    return torch.from_numpy(np.stack(rows)), notes
