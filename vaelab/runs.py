"""运行文件夹：每次训练的结果放在哪里，数据从哪里来。"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vaelab.checkpoint import CHECKPOINT, load_checkpoint
from vaelab.data import NAMES, load
from vaelab.images import ImageSet

RUNS = Path("runs")
DATA_DEFAULTS = {"data": "faces", "root": "data", "image_size": 64, "channels": None, "count": 10_000, "data_seed": 0}


def choose_out(given: dict) -> tuple[Path, dict | None]:
    """结果文件夹，以及续训时的检查点。不续训就绝不写进已有结果的文件夹。"""
    if given.get("resume"):
        out = Path(given["out"]) if "out" in given else latest_run()
        return out, load_checkpoint(out)
    if "out" in given:
        out = Path(given["out"])
        if (out / CHECKPOINT).exists():
            raise ValueError(f"{out} 里已有训练结果；加 --resume 接着训练，或用 --out 换一个文件夹。")
        return out, None
    name = str(given.get("data", DATA_DEFAULTS["data"]))
    name = name if name in NAMES else Path(name).expanduser().resolve().name or "images"
    out, number = RUNS / name, 1
    while (out / CHECKPOINT).exists():
        number += 1
        out = RUNS / f"{name}-{number}"
    return out, None


def latest_run() -> Path:
    found = sorted(RUNS.glob(f"*/{CHECKPOINT}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"{RUNS.resolve()} 里还没有训练结果；请先运行 python vanilla_vae.py，或写明运行文件夹。")
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
