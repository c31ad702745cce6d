"""vaelab.data：换算、真实的 MNIST、自己的图片文件夹、CelebA 的两种摆法、解码缓存。"""

import errno
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vaelab.cache import map_pixels
from vaelab.data import load
from vaelab.images import ImageSet, batches, to_float, to_uint8

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared" / "data"
needs_mnist = pytest.mark.skipif(not (SHARED / "MNIST").is_dir(), reason="没有 ../shared/data/MNIST")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VAELAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    """八张不同颜色的 BMP（未压缩：改颜色不改文件大小），修改时间都一样，于是只有名字可以区分它们。"""
    for i in range(8):
        paint(tmp_path / "pictures" / f"{i}.bmp", (20 * i, 0, 0))
        os.utime(tmp_path / "pictures" / f"{i}.bmp", (10**9, 10**9))
    return tmp_path / "pictures"


def paint(path, colour, size=(8, 8), mode="RGB", **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **save)


def get(folder, **options):
    return load(folder, **{"image_size": 8, "progress": False, **options})


def reds(images):
    """train 与 test 各图中央像素的红色值，从小到大。"""
    return sorted(torch.cat([images.train, images.test])[:, 0, 4, 4].tolist())


# ---------------------------------------------------------------- 换算、容器、分批


def test_float_round_trip_is_exact_and_spans_minus_one_to_one():
    levels = torch.arange(256, dtype=torch.uint8)
    assert to_float(levels).dtype == torch.float32
    assert (to_float(levels)[0], to_float(levels)[-1]) == (-1, 1)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    nudged = to_float(levels) + 0.49 / 127.5  # 四舍五入而不是截尾，界外截到边界
    assert torch.equal(to_uint8(nudged), levels)
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]
    with pytest.raises(TypeError, match="uint8"):
        to_float(torch.zeros(3))
    with pytest.raises(TypeError, match="浮点"):
        to_uint8(levels)


def test_image_set_refuses_what_does_not_fit():
    images, labels = torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)
    ImageSet("好", images, images, labels, labels, train_factors=torch.zeros(3, 0), test_factors=torch.zeros(3, 0))
    for wrong in (
        {"train": images.float()},
        {"test": images[:, :, :2]},
        {"test": images[:0]},
        {"train_labels": labels},
        {"train_labels": labels[:2], "test_labels": labels},
        {"train_factors": torch.zeros(3, 2), "test_factors": torch.zeros(3, 2)},
    ):
        with pytest.raises(ValueError, match="应"):
            ImageSet(**{"name": "坏", "train": images, "test": images, **wrong})


@given(total=st.integers(1, 40), size=st.integers(1, 40), drop=st.booleans(), seed=st.integers(0, 9) | st.none())
def test_batches_visit_every_image_once(total, size, drop, seed):
    images = torch.arange(total, dtype=torch.uint8).view(-1, 1, 1, 1)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    if drop and size > total:
        with pytest.raises(ValueError, match="batch_size"):
            next(batches(images, size, generator, drop))
        return
    parts = list(batches(images, size, generator, drop))
    seen = torch.cat(parts).flatten().tolist()
    assert len(seen) == (total - total % size if drop else total) == len(set(seen))
    assert all(len(part) == size for part in parts[: total // size])
    if generator is None:
        assert seen == sorted(seen)
    else:
        again = batches(images, size, torch.Generator().manual_seed(seed), drop)
        assert torch.cat(list(again)).flatten().tolist() == seen
        assert total < 20 or seen != sorted(seen)


# ---------------------------------------------------------------- torchvision 的数据


def idx(path, skip):
    return np.frombuffer(path.read_bytes(), np.uint8, offset=skip)


@needs_mnist
def test_real_mnist_is_the_official_bytes():
    raw = SHARED / "MNIST" / "raw"
    whole = load("mnist", root=SHARED, image_size=28)
    larger = load("mnist", root=SHARED, image_size=32)
    for part, stem in (("train", "train"), ("test", "t10k")):
        digits = idx(raw / f"{stem}-images-idx3-ubyte", 16).reshape(-1, 1, 28, 28)
        labels = idx(raw / f"{stem}-labels-idx1-ubyte", 8)
        assert np.array_equal(getattr(whole, part).numpy(), digits)
        assert np.array_equal(getattr(whole, f"{part}_labels").numpy(), labels)
        resized = getattr(larger, part)
        assert resized.shape == (len(digits), 1, 32, 32)
        for i in range(0, len(digits), 999):  # 跨过分块的边界，与 PIL 的缩放比
            expected = Image.fromarray(digits[i, 0]).resize((32, 32), Image.Resampling.BILINEAR)
            gap = np.abs(np.asarray(expected, np.int16) - resized[i].numpy())
            assert gap.max() <= 1
    assert whole.label_names[whole.train_labels[0]] == "5"


def test_cifar_layout_and_grey(tmp_path, monkeypatch):
    """真 CIFAR-10 不在这里：按它的文件格式写几张，只放过 torchvision 的 MD5 检查。"""
    import pickle

    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (base / name).write_bytes(pickle.dumps({"data": pixels.reshape(6, -1), "labels": [3] * 6}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": ["x"] * 10}))
    colour = load("cifar10", root=tmp_path, image_size=32)
    assert np.array_equal(colour.train[:6].numpy(), pixels) and len(colour.train) == 30
    assert colour.label_names[colour.test_labels[0]] == "猫"
    grey = load("cifar10", root=tmp_path, image_size=32, channels=1)
    by_pil = np.asarray(Image.fromarray(pixels[0].transpose(1, 2, 0)).convert("L"), np.int16)
    assert np.abs(grey.train[0, 0].numpy() - by_pil).max() <= 1


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "celeba"])
def test_absent_set_says_where_it_looked_and_downloads_nothing(name, tmp_path):
    with pytest.raises(FileNotFoundError, match="--download") as error:
        load(name, root=tmp_path / "none")
    assert str((tmp_path / "none").resolve()) in str(error.value)
    assert not (tmp_path / "none").exists()


def test_idx_files_of_ones_own_and_truncated_ones(tmp_path):
    """按 idx 格式写一份小的 Fashion-MNIST：灰度变三通道；截断之后是一句话的错误。"""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for stem in ("train", "t10k"):
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, 5, 28, 28) + pixels.tobytes())
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 5) + bytes([9, 8, 7, 6, 5]))
    images = load("fashion_mnist", root=tmp_path, image_size=28, channels=3)
    assert np.array_equal(images.test.numpy(), np.repeat(pixels[:, None], 3, axis=1))
    assert images.label_names[images.train_labels[0]] == "短靴"
    os.truncate(raw / "t10k-images-idx3-ubyte", 1000)
    with pytest.raises(FileNotFoundError, match="没有完整的 FashionMNIST"):
        load("fashion_mnist", root=tmp_path)


# ---------------------------------------------------------------- 自己的图片


def ramp(dtype, top):
    """左半边 0，右半边 ``top``。"""
    return Image.fromarray(np.repeat(np.array([[0] * 4 + [top] * 4], dtype), 8, axis=0))


def palette(index_transparent):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return image, {"transparency": 1} if index_transparent else {}


def animation():
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    return first, {"save_all": True, "append_images": [second]}


def rotated():
    """存的时候左上角是红的，Orientation = 6：看的时候要顺时针转 90°，红角到右上。"""
    image = Image.new("RGB", (64, 64), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    return image, {"exif": exif, "quality": 95}


LEFT, RIGHT = (1, 4), (6, 4)  # (x, y)，在 8×8 的结果里
KINDS = {
    "grey.png": (Image.new("L", (9, 8), 77), {}, {LEFT: (77, 77, 77)}),
    "one_bit.png": (Image.new("1", (8, 8), 1), {}, {LEFT: (255, 255, 255)}),
    "la.png": (Image.new("LA", (8, 8), (0, 0)), {}, {LEFT: (255, 255, 255)}),
    "palette.png": (*palette(False), {LEFT: (200, 100, 50)}),
    "palette_transparent.png": (*palette(True), {LEFT: (255, 255, 255)}),
    "rgba_clear.png": (Image.new("RGBA", (8, 8), (0, 0, 0, 0)), {}, {LEFT: (255, 255, 255)}),
    "rgba_half.png": (Image.new("RGBA", (8, 8), (255, 0, 0, 128)), {}, {LEFT: (255, 127, 127)}),
    "grey16.png": (ramp(np.uint16, 65535), {}, {LEFT: (0, 0, 0), RIGHT: (255, 255, 255)}),
    "grey16_middle.png": (ramp(np.uint16, 128 * 257), {}, {RIGHT: (128, 128, 128)}),
    "grey16_dark.tif": (ramp(np.uint16, 257), {}, {RIGHT: (1, 1, 1)}),
    "int32.tif": (ramp(np.int32, 65535), {}, {LEFT: (0, 0, 0), RIGHT: (255, 255, 255)}),
    "float.tif": (ramp(np.float32, 0.5), {}, {LEFT: (0, 0, 0), RIGHT: (128, 128, 128)}),
    "cmyk.jpg": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), {"quality": 95}, {LEFT: (255, 0, 0)}),
    "animated.gif": (*animation(), {LEFT: (255, 0, 0)}),
    "animated.webp": (*animation(), {LEFT: (255, 0, 0)}),
    "rotated.jpg": (*rotated(), {(6, 1): (255, 0, 0), (1, 1): (0, 0, 255), (6, 6): (0, 0, 255)}),
    "NAMELESS": (Image.new("RGB", (8, 8), (1, 2, 3)), {"format": "PNG"}, {LEFT: (1, 2, 3)}),
    "png_inside.jpg": (Image.new("RGB", (8, 8), (1, 2, 3)), {"format": "PNG"}, {LEFT: (1, 2, 3)}),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_mode_shows_its_true_colours(name, tmp_path):
    image, save, expected = KINDS[name]
    for side in ("a", "b"):  # 至少要两张：一张进 train，一张进 test
        (tmp_path / "in" / side).mkdir(parents=True)
        image.save(tmp_path / "in" / side / name, **save)
    images = get(tmp_path / "in")
    assert images.train.shape == images.test.shape == (1, 3, 8, 8)
    assert images.notes == ("读得出的 2 张内容都相同，测试不会说明什么。",)  # a 与 b 里是同一张
    slack = 6 if name.endswith((".jpg", ".webp")) else 0  # 有损压缩
    for (x, y), colour in expected.items():
        for pixels in (images.train[0], images.test[0]):
            assert np.abs(pixels[:, y, x].numpy().astype(int) - colour).max() <= slack, (x, y, pixels[:, y, x])


def test_centre_is_kept_and_huge_jpeg_is_drafted_right(tmp_path):
    for name, size in (("wide.jpg", (1200, 400)), ("tall.jpg", (400, 1200)), ("tiny.png", (3, 1))):
        image = Image.new("RGB", size, (255, 0, 0))
        side = min(size)
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        image.paste((0, 255, 0), (left, top, left + side, top + side))
        (tmp_path / "in").mkdir(exist_ok=True)
        image.save(tmp_path / "in" / name)
    images = get(tmp_path / "in")
    middle = torch.cat([images.train, images.test])[:, :, 1:-1, 1:-1]
    assert len(middle) == 3
    assert middle[:, 1].min() >= 250 and middle[:, 0].max() <= 6
    assert get(tmp_path / "in", channels=1).train.shape[1] == 1


def claim_size(path, width, height):
    """把一张 PNG 的头改成号称 width×height。"""
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    path.write_bytes(data)


def test_bad_files_are_named_and_the_rest_is_used(folder):
    Image.effect_noise((64, 64), 90).save(folder / "cut.jpg")
    os.truncate(folder / "cut.jpg", (folder / "cut.jpg").stat().st_size // 2)
    Image.effect_noise((64, 64), 90).save(folder / "cut.png")
    os.truncate(folder / "cut.png", (folder / "cut.png").stat().st_size // 2)
    for name, width in (("bomb.png", 17_000), ("bigger_bomb.png", 30_000)):
        paint(folder / name, 0, mode="L")
        claim_size(folder / name, width, width)
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("不是图片", encoding="utf-8")
    (folder / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    for ignored in ("notes.txt", "labels.csv", "paper.pdf", "README", ".hidden.png", "__MACOSX/x.jpg", ".git/y.png"):
        (folder / ignored).parent.mkdir(exist_ok=True)
        (folder / ignored).write_text("不必提起", encoding="utf-8")
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        images = get(folder)
    assert not leaked and reds(images) == [20 * i for i in range(8)]
    aside, needs, note = images.notes
    assert aside == "没有进 1 个缩略图或回收站文件夹：__MACOSX。"
    assert needs == "没有读 1 个 HEIC，装上 pillow-heif 就能读：phone.HEIC。"
    assert note.startswith("跳过 6 个") and note.endswith("…。") and note.count("（") == 5

    (folder / "phone.HEIC").unlink()
    (folder / "text.jpg").unlink()
    _, note = get(folder).notes
    assert set(note.removeprefix("跳过 5 个读不出的文件：").removesuffix("。").split("、")) == {
        "bomb.png（像素太多，上限是 268 百万像素）",
        "bigger_bomb.png（像素太多，上限是 268 百万像素）",
        "cut.jpg（截断或损坏）",
        "cut.png（截断或损坏）",
        "empty.jpg（空文件）",
    }


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="这里没有管道文件")
def test_links_and_pipes_do_not_hang(folder):
    os.mkfifo(folder / "pipe.png")
    (folder / "deep").mkdir()
    for name in ("up", "again"):  # 两个环：只靠系统的层数上限，要走 2 的 40 次方步
        (folder / "deep" / name).symlink_to(folder, target_is_directory=True)
    (folder / "self").symlink_to(folder / "self")
    (folder / "lost.png").symlink_to(folder / "nowhere.png")
    images = get(folder)
    assert reds(images) == [20 * i for i in range(8)]
    assert images.notes == ("跳过 1 个读不出的文件：lost.png（链接断开或文件已不在）。",)


@contextmanager
def unprivileged():
    """root 不受权限约束，暂时换成别的用户。"""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="这里没有 POSIX 权限")
def test_no_permission(folder):
    folder.chmod(0)
    try:
        with unprivileged(), pytest.raises(PermissionError, match="没有权限打开"):
            get(folder)
    finally:
        folder.chmod(0o700)


def test_clear_errors(tmp_path, folder):
    with pytest.raises(ValueError, match="mnist"):
        load("mnits")
    with pytest.raises(ValueError, match="你要的也许是 celeba"):
        load("CelebA")
    with pytest.raises(ValueError, match="faces、mnist、fashion_mnist、cifar10、celeba"):
        load("")
    with pytest.raises(FileNotFoundError, match="没有文件夹"):
        get(tmp_path / "nowhere" / "at_all")
    with pytest.raises(NotADirectoryError, match="应为文件夹"):
        get(folder / "0.bmp")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "readme.txt").touch()
    with pytest.raises(ValueError, match="没有图片"):
        get(tmp_path / "bare")
    (tmp_path / "bare" / "a.jpg").touch()
    with pytest.raises(ValueError, match="实际 0 张；跳过 1 个读不出的文件：a.jpg（空文件）"):
        get(tmp_path / "bare")
    paint(tmp_path / "bare" / "b.png", (1, 2, 3))
    with pytest.raises(ValueError, match="至少有 2 张.*实际 1 张"):
        get(tmp_path / "bare")
    with pytest.raises(ValueError, match="不应放在图片文件夹"):
        get(folder, cache_dir=folder / "cache")
    for wrong in ({"image_size": 0}, {"channels": 2}):
        with pytest.raises(ValueError, match="应为"):
            get(folder, **wrong)
    with pytest.raises(TypeError, match="数据来源"):
        load(3)


@settings(max_examples=15, deadline=None)
@given(n=st.integers(2, 40), seed=st.integers(0, 2**40), bad=st.integers(0, 5))
def test_every_picture_is_in_train_or_test_exactly_once(n, seed, bad):
    with tempfile.TemporaryDirectory() as base:
        pictures = Path(base, "in")
        for i in range(n):
            paint(pictures / str(i % 3) / "深" / f"{i}.png", (5 * i, 0, 0), size=(2, 2))
        for i in range(bad):
            (pictures / f"{i}.png").touch()
        first, second = (get(pictures, seed=seed, cache_dir=Path(base, c), image_size=5) for c in "ab")
        assert reds(first) == [5 * i for i in range(n)]
        assert len(first.test) == max(1, round(n / 10))
        assert torch.equal(first.train, second.train) and torch.equal(first.test, second.test)
        assert first.train.is_contiguous() and first.test.is_contiguous()
        del first, second  # Windows 上映射着的文件删不掉


# ---------------------------------------------------------------- CelebA（画的假图，只借它的文件名）

OFFICIAL = {1: 10, 162770: 20, 162771: 30, 182637: 40, 182638: 50, 202599: 60}


def fake_celeba(folder, numbers=OFFICIAL):
    for number, grey in numbers.items():
        paint(folder / f"{number:06}.jpg", (grey,) * 3, size=(178, 218))


@pytest.mark.parametrize("nest", ["celeba/img_align_celeba", "img_align_celeba", "."])
def test_celeba_by_official_numbers(nest, tmp_path):
    fake_celeba(tmp_path / "root" / nest)
    images = load("celeba", root=tmp_path / "root", progress=False)
    assert images.train[:, 0, 0, 0].tolist() == [10, 20] and images.test[:, 0, 0, 0].tolist() == [50, 60]
    assert "2 张验证图片" in images.notes[0] and images.train.shape[1:] == (3, 64, 64)


def test_celeba_partition_file_wins_and_subset_falls_back(tmp_path):
    fake_celeba(tmp_path / "celeba" / "img_align_celeba")
    listing = tmp_path / "celeba" / "list_eval_partition.txt"
    listing.write_text("".join(f"{n:06}.jpg {2 if n == 1 else 0}\n" for n in OFFICIAL), encoding="utf-8")
    images = load("celeba", root=tmp_path, progress=False)
    assert images.test[:, 0, 0, 0].tolist() == [10] and images.train[:, 0, 0, 0].tolist() == [20, 30, 40, 50, 60]

    fake_celeba(tmp_path / "subset", {n: n for n in range(1, 31)})
    subset = load("celeba", root=tmp_path / "subset", progress=False)
    assert reds(subset) == list(range(1, 31)) and len(subset.test) == 3
    assert "没有官方划分的测试图片" in subset.notes[0]


def test_celeba_pixels_equal_the_usual_transform(tmp_path):
    from torchvision import transforms

    image = Image.merge("RGB", [Image.effect_noise((178, 218), 80) for _ in range(3)])
    for number in (1, 202599):
        (tmp_path / "root").mkdir(exist_ok=True)
        image.save(tmp_path / "root" / f"{number:06}.jpg")
    usual = transforms.Compose([transforms.CenterCrop(148), transforms.Resize(32), transforms.PILToTensor()])
    images = load("celeba", root=tmp_path / "root", image_size=32, progress=False)
    assert torch.equal(images.train[0], usual(Image.open(tmp_path / "root" / "000001.jpg")))


# ---------------------------------------------------------------- 缓存


def repaint_secretly(path, colour):
    """换像素，文件大小与修改时间不变。"""
    before = path.stat()
    paint(path, colour)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_new_pixels_of_the_same_size_and_time_are_seen(folder):
    original = reds(get(folder))
    repaint_secretly(folder / "3.bmp", (255, 0, 0))
    assert reds(get(folder)) == [0, 20, 40, 80, 100, 120, 140, 255] != original


def test_second_load_does_not_decode_and_cannot_harm_the_cache(folder, capfd):
    original = reds(get(folder, progress=True))
    assert "解码图片" in capfd.readouterr().err
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = get(folder, progress=True)
    assert reds(images) == original and "解码图片" not in capfd.readouterr().err
    images.train.zero_()
    assert reds(get(folder)) == original


@pytest.mark.parametrize("change", ["add", "remove", "repaint", "rename", "size", "channels", "seed"])
def test_change_is_noticed(folder, cache, change):
    get(folder)
    options, expected = {}, [20 * i for i in range(8)]
    if change == "add":
        paint(folder / "sub" / "new.png", (200, 0, 0))
        expected.append(200)
    elif change == "remove":
        (folder / "7.bmp").unlink()
        expected.pop()
    elif change == "repaint":
        paint(folder / "7.bmp", (150, 0, 0))
        os.utime(folder / "7.bmp", (0, 0))
        expected[-1] = 150
    elif change == "rename":
        (folder / "7.bmp").rename(folder / "seven.bmp")
    else:
        options = {"size": {"image_size": 6}, "channels": {"channels": 1}, "seed": {"seed": 5}}[change]
    images = get(folder, **options)
    if change == "channels":
        assert images.train.shape[1] == 1
    else:
        assert reds(images) == sorted(expected)
    if not options and os.name == "posix":
        assert len(list(cache.glob("*.npy"))) == 1  # 旧的已清掉


@pytest.mark.parametrize("damage", ["short", "headless", "gone", "record", "rows"])
def test_damaged_cache_is_rebuilt(folder, cache, damage):
    expected = reds(get(folder))
    (pixels,), (record,) = cache.glob("*.npy"), cache.glob("*.json")
    if damage == "rows":  # 头完好，却不是记录所说的那个数组
        np.save(pixels, np.zeros((3, 3, 8, 8), np.uint8))
    elif damage == "gone":
        pixels.unlink()
    elif damage == "record":
        record.write_text('["半个', encoding="utf-8")
    else:
        os.truncate(pixels, pixels.stat().st_size - 1 if damage == "short" else 20)
    assert reds(get(folder)) == expected


def test_unwritable_cache_falls_back_to_memory(folder, tmp_path):
    (tmp_path / "file").touch()
    images = get(folder, cache_dir=tmp_path / "file" / "cache")
    assert reds(images) == [20 * i for i in range(8)]
    assert "不能写" in images.notes[0]


LOAD_CELEBA = """
import sys
from vaelab.data import load
images = load("celeba", root=sys.argv[1])
print(len(images.train), len(images.test), int(images.train.sum()))
"""


def start_decoding(root, cache):
    """另起一个进程载入 ``root``，等到它已写出一些像素才返回。"""
    process = subprocess.Popen(
        [sys.executable, "-c", LOAD_CELEBA, str(root)],
        cwd=REPO,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    before, deadline = set(cache.glob("*.npy")), time.monotonic() + 100
    while not any(path.stat().st_size > 30_000 for path in set(cache.glob("*.npy")) - before):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    return process


def test_kill_9_while_decoding_leaves_nothing_that_counts(tmp_path, cache, capfd):
    """真的进程、真的 SIGKILL；再来两个进程，后到的等先到的，只解码一次。"""
    root = tmp_path / "root"
    root.mkdir()
    Image.radial_gradient("L").resize((1200, 1200)).convert("RGB").save(root / "000001.jpg")
    for i in range(2, 61):
        shutil.copy(root / "000001.jpg", root / f"{i:06}.jpg")
    victim = start_decoding(root, cache)
    victim.kill()
    victim.communicate()
    (half,) = cache.glob("*.npy")
    assert half.stat().st_size < 60 * 3 * 64 * 64 and not list(cache.glob("*.json"))

    other = start_decoding(root, cache)
    images = load("celeba", root=root)
    assert "解码图片" not in capfd.readouterr().err  # 这个进程没有解码，用的是那个进程的
    assert images.train.shape == (54, 3, 64, 64) and images.test.shape == (6, 3, 64, 64)
    assert (images.train == images.test[0]).all() and images.test[0].float().std() > 5
    reply, log = other.communicate(timeout=100)
    assert reply == f"54 6 {int(images.train.sum())}\n" and "解码图片" in log
    assert len(list(cache.glob("*.npy"))) == 1 and not half.exists()


def test_full_disk_is_a_clear_error_and_leaves_nothing(folder, cache):
    """用文件大小的限额代替写满的磁盘：同样是写到一半时系统报错。"""
    resource = pytest.importorskip("resource", reason="这里没有文件大小的限额")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="解码缓存写不进.*VAELAB_CACHE") as error:
            get(folder, image_size=64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.__cause__.errno == errno.EFBIG
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]
    assert len(get(folder, image_size=64).train) == 7


@pytest.mark.skipif(sys.platform == "win32", reason="Windows 没有稀疏文件的便捷办法")
def test_a_map_larger_than_memory_opens_and_is_never_written(tmp_path):
    """私有、可写的映射比内存大时，系统默认拒绝；这里的文件是稀疏的，不占磁盘。"""
    path, rows = tmp_path / "big.npy", 2 * psutil.virtual_memory().total // 3072
    with open(path, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (rows, 3, 32, 32)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + rows * 3072)
    pixels = torch.from_numpy(map_pixels(path))
    assert pixels.shape == (rows, 3, 32, 32) and pixels[[0, rows // 2, rows - 1]].sum() == 0
    pixels[-1] = 7
    assert torch.from_numpy(map_pixels(path))[-1].sum() == 0
    os.truncate(path, 1000)
    with pytest.raises(ValueError):
        map_pixels(path)
