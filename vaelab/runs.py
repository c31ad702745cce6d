"""运行文件夹：每次训练的结果放在哪里，数据从哪里来。"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from vaelab.checkpoint import CHECKPOINT, checkpoint_file, load_checkpoint
from vaelab.config import DATA_DEFAULTS
from vaelab.data import NAMES, load
from vaelab.files import LOCK, hold, program, shown
from vaelab.images import ImageSet

RUNS = Path("runs")


@contextmanager
def claim(given: dict) -> Iterator[tuple[Path, Path | None]]:
    """占住结果文件夹，给出它与续训的检查点文件（``--out`` 可以是更早的一份）；不续训就绝不写进已有结果的文件夹。

    没有指明时在 ``runs/`` 里找第一个没有人用的名字：先占住，再看里面，所以同时开始的几个训练各得一个。
    一份检查点也没有写下就离开，占位时建的文件夹不留下。

    Raises:
        ValueError: 指明的文件夹里已有结果，或就是图片所在的文件夹。
        OSError: 它正被另一个训练占着，或不能写。
    """
    if given.get("resume"):
        file = checkpoint_file(Path(given["out"]).expanduser() if "out" in given else latest_run())
        load_checkpoint(file)  # 先看有没有：没有就不建文件夹
        with hold(file.parent):
            yield file.parent, file
        return
    data = str(given.get("data", DATA_DEFAULTS["data"]))
    if "out" in given:
        out = Path(given["out"]).expanduser()
        if data not in NAMES and out.resolve() == Path(data).expanduser().resolve():
            raise ValueError(f"结果不能写进图片所在的文件夹 {shown(out)}：它会成为运行文件夹，里面的图不再算数据；请用 --out 换一个位置。")
        names = iter([out])
    else:
        name = data if data in NAMES else Path(data).expanduser().resolve().name or "images"
        name = "".join(c if c.isprintable() else "_" for c in name)  # 换行、控制符、坏的 UTF-8 只会添麻烦
        names = (RUNS / (name if number == 1 else f"{name}-{number}") for number in count(1))
    for out in names:
        new = not out.exists()
        held = hold(out)
        try:
            held.__enter__()
        except BlockingIOError:
            if "out" in given:
                raise
            continue
        try:
            if (out / CHECKPOINT).exists() and "out" in given:
                raise ValueError(f"{shown(out)} 里已有训练结果；加 --resume 接着训练，或用 --out 换一个文件夹。")
            if "out" not in given and any(entry.name != LOCK for entry in out.iterdir()):
                continue
            yield out, None
            return
        finally:
            held.__exit__(None, None, None)
            if new:
                _forget(out)


def _forget(out: Path) -> None:
    """除了占位的锁什么也没有，就删掉这个文件夹，与因此空了的 ``runs``。"""
    with suppress(OSError):
        if all(entry.name == LOCK for entry in out.iterdir()):
            (out / LOCK).unlink(missing_ok=True)
            out.rmdir()
            if out.parent == RUNS:
                RUNS.rmdir()


def latest_run() -> Path:
    found = sorted(RUNS.glob(f"*/{CHECKPOINT}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"{RUNS.resolve()} 里还没有训练结果；请先运行 {program()}，或写明运行文件夹。")
    return found[-1].parent


def load_data(extra: dict, download: bool = False, say: Callable[[str], None] = print) -> ImageSet:
    data = load(
        extra["data"],
        root=extra["root"],
        image_size=extra["image_size"],
        channels=extra["channels"],
        count=extra["count"],
        seed=extra["data_seed"],
        download=download,
    )
    for note in data.notes:
        say(f"注意：{note}")
    return data
