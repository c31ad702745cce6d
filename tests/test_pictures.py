"""vaelab.decode、vaelab.pictures、vaelab.cache：怪图，一批一批的浮点图，副本，读不出的再试，缓存看与清。"""

import gzip
import os
import shutil
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_pictures import odd_pictures, photograph, saved, write_odd_pictures
from PIL import Image, ImageFile

from vaelab.cache import cache_summary, clear_cache
from vaelab.data import load
from vaelab.decode import Unreadable, decode_picture
from vaelab.files import shown
from vaelab.pictures import read_pictures

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VAELAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def get(folder, **options):
    return load(folder, **{"image_size": 16, "progress": False, **options})


def corners(pixels):
    return [pixels[:, y, x].tolist() for y in (4, 12) for x in (4, 12)]


def plain_pictures(folder, count):
    """各不相同的 ``count`` 张。"""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (i % 256, i // 256, 77)).save(folder / f"{i:04}.png")
    return folder


ODD = odd_pictures()


@pytest.mark.parametrize("name", ODD)
def test_every_odd_picture_is_right_or_named(name, tmp_path):
    data, expected, slack = ODD[name]
    (tmp_path / "in" / name).parent.mkdir(parents=True)
    (tmp_path / "in" / name).write_bytes(data)
    if expected is None:
        with pytest.raises(ValueError, match=Path(name).name):
            read_pictures(tmp_path / "in", 16)
        return
    images, notes = read_pictures(tmp_path / "in", 16)
    assert np.abs(np.array(corners(images[0])) - expected).max() <= slack, (corners(images[0]), notes)


def test_odd_pictures_among_many(tmp_path):
    plain_pictures(tmp_path / "in", 200)
    expected = write_odd_pictures(tmp_path / "in")
    images = get(tmp_path / "in")
    good = [name for name, (wanted, _) in expected.items() if wanted is not None]
    assert len(images.train) + len(images.test) == 200 + len(good)
    notes = "".join(images.notes)
    assert not [name for name in expected if name not in good and Path(name).name not in notes]
    rows = np.array([corners(row) for row in torch.cat([images.train, images.test])])
    for name in good:
        wanted, slack = expected[name]
        assert (np.abs(rows - np.array(wanted)).max(axis=(1, 2)) <= slack).any(), name


# ---------------------------------------------------------------- 没写完的与真的一片同色


def flat_below(kind, side, share, colour, **options):
    """上面有纹理、下面 ``share`` 一片同色的真图。"""
    pixels = np.array(photograph(side=side))
    pixels[round(side * (1 - share)) :] = colour
    return saved(Image.fromarray(pixels), kind, **options)


WAYS = {
    "jpeg": ("JPEG", {}),
    "jpeg optimised": ("JPEG", {"optimize": True}),
    "jpeg progressive": ("JPEG", {"progressive": True}),
    "webp": ("WEBP", {"method": 0}),
    "webp lossless": ("WEBP", {"lossless": True}),
    "png": ("PNG", {}),
    "bmp": ("BMP", {}),
    "ppm": ("PPM", {}),
    "gif": ("GIF", {}),
    "tiff": ("TIFF", {}),
    "tiff lzw": ("TIFF", {"compression": "tiff_lzw"}),
    "tiff deflate": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    "tga": ("TGA", {}),
    "jpeg 2000": ("JPEG2000", {}),
}


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=6, deadline=None)
@given(
    side=st.sampled_from([16, 100, 256]),
    share=st.sampled_from([0, 0.1, 0.5, 0.9, 1]),
    colour=st.sampled_from([(0, 0, 0), (255, 255, 255), (9, 99, 199)]),
)
def test_a_true_flat_picture_is_not_taken_for_an_unfinished_one(way, side, share, colour, tmp_path_factory):
    kind, options = WAYS[way]
    path = tmp_path_factory.mktemp("flat") / "x.img"
    path.write_bytes(flat_below(kind, side, share, colour, **options))
    path = path.rename(path.with_suffix({"TGA": ".tga", "PPM": ".ppm", "JPEG2000": ".jp2"}.get(kind, ".png")))
    result = decode_picture(path, image_size=16, channels=3)
    assert not isinstance(result, Unreadable), result
    if share >= 0.5 and side > 16:  # 小图里 JPEG 的块跨着分界
        assert np.abs(result[:, -3].T.astype(int) - colour).max() <= 12


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=6, deadline=None)
@given(start=st.floats(0.3, 0.85), seed=st.integers(0, 5))
def test_an_unfinished_file_is_seen(way, start, seed, tmp_path_factory):
    kind, options = WAYS[way]
    data = saved(photograph(seed), kind, **options)
    cut = int(len(data) * start)
    path = tmp_path_factory.mktemp("cut") / f"x.{'tga' if kind == 'TGA' else 'ppm' if kind == 'PPM' else 'jp2' if kind == 'JPEG2000' else 'png'}"
    path.write_bytes(data[:cut] + bytes(len(data) - cut))
    result = decode_picture(path, image_size=16, channels=3)
    at_row_end = kind in ("BMP", "PPM", "TIFF", "TGA") and not options and (cut - len(data)) % 768 in range(-16, 17)
    assert isinstance(result, Unreadable) or at_row_end  # 恰好停在一行末尾的，与真的黑边没有分别


# ---------------------------------------------------------------- 一批一起定白


def floats_in(folder, **frames):
    """每张是一个平均值为给定数的、略有起伏的浮点图。"""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (low, high) in frames.items():
        pixels = np.linspace(low, high, 32 * 32, dtype=np.float32).reshape(32, 32)
        Image.fromarray(pixels).save(folder / f"{name}.tif")
    return folder


def test_white_is_chosen_for_the_series(tmp_path):
    a = floats_in(tmp_path / "a", dark=(0, 0.9), middle=(0, 90.5), bright=(0, 254.5))
    images, notes = read_pictures(a, 16, channels=1)
    assert [row.max().item() for row in images] == pytest.approx([250, 0, 88], abs=8)  # bright、dark、middle
    assert len(notes) == 1 and "dark.tif" in notes[0] and "几乎全黑" in notes[0]
    b = floats_in(tmp_path / "b", one=(0, 1), two=(0, 0.3))
    images, notes = read_pictures(b, 16, channels=1)
    assert [row.max().item() for row in images] == pytest.approx([250, 75], abs=8) and notes == ()
    images, notes = read_pictures(floats_in(tmp_path / "c", one=(-1, 1), two=(-1, 0)), 16, channels=1)
    assert images[1].max() <= 130 and images[0].max() >= 245 and "-1 为黑、1 为白" in notes[0]
    images, notes = read_pictures(floats_in(tmp_path / "d", depth=(0.5, 8.5)), 16, channels=1)
    assert images.max() >= 245 and "没有约定的白" in notes[0]
    assert torch.equal(read_pictures(a, 16)[0], torch.cat([read_pictures(a, 16)[0]]))


# ---------------------------------------------------------------- 找图


def test_copies_links_thumbnails_and_own_runs_are_no_data(tmp_path):
    folder = plain_pictures(tmp_path / "in", 10)
    for aside in ("@eaDir", "#recycle", "$RECYCLE.BIN", ".Trash-1000", "深/__MACOSX", "lost+found"):
        (folder / aside).mkdir(parents=True)
        photograph(1).save(folder / aside / "thumb.png")
    shutil.copy(folder / "0003.png", folder / "0003 - 副本.png")
    os.link(folder / "0004.png", folder / "hard.png")
    if os.name == "posix":
        (folder / "a_link.png").symlink_to("0002.png")
    (folder / "runs" / "x").mkdir(parents=True)
    (folder / ".IMG_1.jpg.icloud").write_bytes(b"bplist00")
    (folder / "runs" / "x" / "checkpoint.pt").touch()
    photograph(2).save(folder / "runs" / "x" / "samples.png")
    images = get(folder)
    assert len(images.train) + len(images.test) == 10
    notes = "".join(images.notes)
    for word in ("@eaDir", "runs/x", "0003", "hard.png", "a_link.png", "IMG_1.jpg.icloud"):
        assert word in notes
    assert "0002.png" not in notes  # 留下的是真的那个，不是链接


def test_two_copies_alone_are_kept(tmp_path):
    photograph(3).save(plain_pictures(tmp_path / "in", 0) / "a.png")
    shutil.copy(tmp_path / "in" / "a.png", tmp_path / "in" / "b.png")
    assert "内容都相同" in get(tmp_path / "in").notes[0]
    os.remove(tmp_path / "in" / "b.png")
    with pytest.raises(ValueError, match="实际 1 张"):
        get(tmp_path / "in")
    assert len(read_pictures(tmp_path / "in", 16)[0]) == len(read_pictures(tmp_path / "in" / "a.png", 16)[0]) == 1
    assert not list((tmp_path / "cache").glob("*.npy"))


@given(st.text(st.characters(blacklist_characters="/\0\\"), min_size=1))
def test_names_are_shown_on_one_line_without_control(name):
    text = shown(name)
    assert all(c.isprintable() or unicodedata.category(c) == "Zs" for c in text)
    assert text.encode("utf-8") and shown("照片　(1).jpg") == "照片　(1).jpg"


@pytest.mark.skipif(sys.platform != "linux", reason="别的系统不许这样的文件名")
def test_hostile_names_in_notes(tmp_path):
    folder = plain_pictures(tmp_path / "in", 3)
    for name in (b"a\nb.png", b"\xff\xfe.png", "gnp.\u202egpj.png".encode()):
        (folder / os.fsdecode(name)).write_bytes(b"bad")
    (note,) = get(folder).notes
    assert "a\\nb.png" in note and "\\xff\\xfe.png" in note and "\\u202e" in note and note.isprintable()


@pytest.mark.skipif(sys.platform != "linux", reason="只有 Linux 限得住一个进程的内存，别处也未必有稀疏文件")
def test_a_huge_file_is_named_and_not_read_into_memory(tmp_path):
    path = tmp_path / "huge.jpg"
    path.write_bytes(saved(photograph(), "JPEG"))
    os.truncate(path, 3 * 2**30)  # 稀疏文件，不占磁盘
    limited = (
        "import resource, sys, vaelab.decode as d; from pathlib import Path; d.formats();"
        "size = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize() + 2**30;"
        "resource.setrlimit(resource.RLIMIT_AS, (size, size));"
        "print(d.decode_picture(Path(sys.argv[1]), image_size=16, channels=3).reason)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPO), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", limited, str(path)], env=environment, capture_output=True, encoding="utf-8", cwd=REPO)
    assert "上限是 1 GB" in done.stdout, done.stderr


# ---------------------------------------------------------------- 再试，记住，清掉


FAILING = """
import errno, sys
from pathlib import Path
failing = True
def hook(event, arguments):
    if failing and event == "open" and "slow" in str(arguments[0]):
        raise OSError(errno.EIO, "Input/output error")
sys.addaudithook(hook)
from vaelab.data import load
def report():
    images = load(sys.argv[1], image_size=8, progress=False)
    print(len(images.train) + len(images.test), *[path.name for path in Path(sys.argv[2]).glob("*.npy")], *images.notes)
report()
report()
failing = False
report()
"""


def test_an_error_of_the_system_is_named_and_tried_again(tmp_path, cache):
    folder = plain_pictures(tmp_path / "in", 20)
    for i in (3, 7):
        (folder / f"{i:04}.png").rename(folder / f"slow{i}.png")
    environment = {**os.environ, "PYTHONPATH": str(REPO), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", FAILING, str(folder), str(cache)]
    output = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=True, cwd=REPO).stdout
    first, second, third = output.splitlines()
    assert first.startswith("18 ") and "磁盘或网络盘读写出错" in first and "损坏" not in first
    assert second == first  # 还是读不出：不重新解码其余的
    assert third.startswith("20 ") and third.endswith(".npy") and third.split()[1] not in first


def test_a_decoder_registered_later_is_used(tmp_path):
    folder = plain_pictures(tmp_path / "in", 5)
    (folder / "new.png").write_bytes(b"NEWKIND\0" + bytes(range(1, 99)))
    assert "new.png" in get(folder).notes[0]

    class NewKind(ImageFile.ImageFile):
        format = "NEWKIND"

        def _open(self):
            self._size, self._mode = (8, 8), "L"
            self.tile = [("raw", (0, 0, 8, 8), 8, ("L", 0, 1))]

    Image.register_open("NEWKIND", NewKind, lambda head: head.startswith(b"NEWKIND"))
    try:
        images = get(folder)
        assert images.notes == () and len(images.train) + len(images.test) == 6
    finally:
        Image.ID.remove("NEWKIND")
        del Image.OPEN["NEWKIND"]


def test_summary_and_clearing(tmp_path, cache):
    one, two = plain_pictures(tmp_path / "一", 5), plain_pictures(tmp_path / "二", 7)
    expected = get(one)
    get(two)
    (cache / "别人的.npy").touch()
    summary = cache_summary()
    assert str(cache) in summary and "2 份" in summary and f"{two.resolve()}，7 张，16×16，3 通道" in summary
    assert clear_cache(older_than_days=1) == (0, 0)
    locks = list(cache.glob("*.lock"))
    with FileLock(locks[0]):
        count, freed = clear_cache()
    assert count == 1 and freed > 5 * 768
    assert clear_cache()[0] == 1 and not list(cache.glob("*.json")) and (cache / "别人的.npy").exists()
    assert expected.train.float().mean() > 0  # 映射着的还能用
    assert "0 份" in cache_summary() and "0 份" in cache_summary(tmp_path / "nowhere")
    assert get(one).digest() == expected.digest()


def test_digest_depends_on_content_only(tmp_path):
    folder = plain_pictures(tmp_path / "in", 12)
    mapped = get(folder)
    (tmp_path / "file").touch()
    in_memory = get(folder, cache_dir=tmp_path / "file" / "x")
    moved = get(shutil.copytree(folder, tmp_path / "elsewhere"))
    strided = replace(mapped, train=mapped.train.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), mapped=None)
    assert mapped.digest() == in_memory.digest() == moved.digest() == strided.digest()
    others = [replace(mapped, train=mapped.train.flip(0)), replace(mapped, train=mapped.test, test=mapped.train), get(folder, seed=1)]
    changed = mapped.train.clone()
    changed[-1, -1, -1, -1] += 1
    others += [replace(mapped, train=changed), get(folder, image_size=8)]
    assert len({mapped.digest(), *(other.digest() for other in others)}) == 6


# ---------------------------------------------------------------- MNIST 的各种放法

IDX = {
    f"{stem}-{what}-idx{dims}-ubyte": head + bytes(range(size))
    for stem in ("train", "t10k")
    for what, dims, head, size in (("images", 3, b"\0\0\x08\3\0\0\0\5\0\0\0\2\0\0\0\2", 20), ("labels", 1, b"\0\0\x08\1\0\0\0\5", 5))
}


@pytest.mark.parametrize("place", ["MNIST/raw", "MNIST", "raw", ".", "mnist/raw"])
@pytest.mark.parametrize("name", ["{}", "dots", "{}.gz", "unpacked"])
def test_mnist_held_in_many_ways(place, name, tmp_path):
    for file, data in IDX.items():
        path = tmp_path / place / {"dots": file.replace("-idx", ".idx"), "unpacked": f"{file}/{file}"}.get(name, name.format(file))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    images = load("mnist", root=tmp_path, image_size=2)
    assert images.train.flatten().tolist() == list(range(20)) and images.test_labels.tolist() == list(range(5))
    if "MNIST" in place:
        with pytest.raises(FileNotFoundError, match="FashionMNIST"):  # 同名的文件不会认错
            load("fashion_mnist", root=tmp_path / "MNIST")


def test_mnist_says_what_it_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="那里是空的"):
        load("mnist", root=tmp_path)
    (tmp_path / "mnist.npz").touch()
    with pytest.raises(FileNotFoundError, match="mnist.npz"):
        load("mnist", root=tmp_path)
    (tmp_path / "train-images.idx3-ubyte.gz").write_bytes(IDX["train-images-idx3-ubyte"])
    with pytest.raises(FileNotFoundError, match="找到了 train-images.idx3-ubyte.gz，缺 train-labels-idx1-ubyte、t10k"):
        load("mnist", root=tmp_path)
