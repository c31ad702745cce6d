"""真的杀、真的挤、真的写满：``python tools/stress.py [killed odd crowd full]``，打印 README 里的那张表，两个核上约十分钟。

- ``killed``：两个训练同时走，各在 20 个随机的时刻被 ``kill -9``；每次检查点都要能载入，续训到底，历史与权重都与没断过的相同。
- ``odd``：``tests/odd_pictures.py`` 里的每一种怪图（至少四十种）混在 2,000 张里；每一种要么读对，要么在话里有名字，2,000 张一张不少。
- ``crowd``：同一个文件夹里同时起十个训练；要有十份结果。
- ``full``：磁盘在 20 个随机的时刻被写满；出错的都要只有一句话，检查点能载入，腾出空间续训到底，与没断过的相同。
  磁盘是一块小的 tmpfs，在自己的挂载空间里（``unshare -rm``），只在 Linux 上有。

有一项不合，退出码是 1。
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from odd_pictures import write_odd_pictures  # noqa: E402
from PIL import Image  # noqa: E402

from vaelab.checkpoint import CHECKPOINT, load_checkpoint  # noqa: E402
from vaelab.data import load  # noqa: E402

TIMES, PICTURES, CROWD = 20, 2_000, 10
SMALL = (
    "--count 200 --image-size 16 --hidden-dims 4,8 --latent-dim 3 --epochs 400 --batch-size 20 --precision fp32 --device cpu --compile off".split()
)
NOT_COMPARED = {"images_per_s", "seconds"}


def vae(folder: Path, *arguments: object) -> subprocess.Popen:
    """在 ``folder`` 里另开一个进程运行命令行，一个线程。"""
    command = [sys.executable, str(ROOT / "vanilla_vae.py"), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "VAELAB_CACHE": str(folder / "cache")}
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")


def same(a: Path, b: Path) -> bool:
    """两次训练的历史（速度除外）与权重逐位相同。"""
    one, two = load_checkpoint(a), load_checkpoint(b)
    histories = [[{k: v for k, v in row.items() if k not in NOT_COMPARED} for row in each["history"]] for each in (one, two)]
    return histories[0] == histories[1] and all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())


def unbroken(folder: Path) -> Path:
    process = vae(folder, "train", *SMALL, "--out", "unbroken")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return folder / "unbroken"


def go_on(folder: Path, out: str) -> subprocess.Popen:
    """从头训练，或接着上一次。"""
    how = ["--resume"] if (folder / out / CHECKPOINT).exists() else SMALL
    return vae(folder, "train", *how, "--out", out)


def moving(process: subprocess.Popen, checkpoint: Path, chance: random.Random) -> None:
    """等到这个进程写下了检查点，再等一小段随机的时间。"""
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    while process.poll() is None and not (checkpoint.exists() and checkpoint.stat().st_mtime_ns != before):
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 0.4))


def killed(folder: Path) -> tuple[str, bool]:
    reference, loaded, deaths = unbroken(folder), [], []

    def one(out: str, seed: int) -> None:
        chance, checkpoint = random.Random(seed), folder / out / CHECKPOINT
        for _ in range(TIMES):
            process = go_on(folder, out)
            moving(process, checkpoint, chance)
            process.kill()
            process.communicate()
            deaths.append(process.returncode == -signal.SIGKILL)
            with suppress(ValueError, OSError):
                load_checkpoint(checkpoint)
                loaded.append(out)
        process = go_on(folder, out)
        process.communicate()

    pair = [threading.Thread(target=one, args=(out, seed)) for seed, out in enumerate(("first", "second"))]
    for thread in pair:
        thread.start()
    for thread in pair:
        thread.join()
    equal = sum(same(folder / out, reference) for out in ("first", "second"))
    said = f"杀了 2×{TIMES} 次（{sum(deaths)} 次正在走），检查点载入 {len(loaded)} 次，续训到底与没断过的逐位相同 {equal} 个"
    return said, len(loaded) == 2 * TIMES and equal == 2


def odd(folder: Path) -> tuple[str, bool]:
    pictures = folder / "pictures"
    pictures.mkdir()
    random_pixels = np.random.default_rng(0)
    for i in range(PICTURES):
        Image.fromarray(random_pixels.integers(0, 256, (24, 24, 3), np.uint8)).save(pictures / f"{i:04}.png")
    expected = write_odd_pictures(pictures)
    data = load(pictures, image_size=16, progress=False, cache_dir=folder / "cache")
    images, notes = torch.cat([data.train, data.test]), "".join(data.notes)
    rows = images[:, :, (4, 4, 12, 12), (4, 12, 4, 12)].mT.int()  # 四个角的颜色，[N, 4, 3]
    readable = {name: (torch.tensor(corners), slack) for name, (corners, slack) in expected.items() if corners is not None}
    right = [name for name, (corners, slack) in readable.items() if ((rows - corners).abs().amax(dim=(1, 2)) <= slack).any()]
    named = [name for name in expected if name not in readable and Path(name).name in notes]
    wrong = [name for name in expected if name not in (*right, *named)]
    said = f"{PICTURES} 张里混进 {len(expected)} 种怪图：{len(right)} 种读对，{len(named)} 种读不出而有名字" + f"，不对的：{wrong}" * bool(wrong)
    return said, not wrong and len(expected) >= 40 and len(images) == PICTURES + len(readable)


def crowd(folder: Path) -> tuple[str, bool]:
    arguments = ["train", *SMALL, "--epochs", "2"]
    together = [vae(folder, *arguments) for _ in range(CROWD)]
    codes = [process.communicate() and process.returncode for process in together]
    whole = [path.parent.name for path in sorted((folder / "runs").glob(f"*/{CHECKPOINT}")) if load_checkpoint(path)["step"]]
    said = f"同时起 {CROWD} 个，{codes.count(0)} 个走完，{len(whole)} 个文件夹各有自己的结果"
    return said, codes == [0] * CROWD and len(whole) == CROWD


def full(folder: Path) -> tuple[str, bool]:
    reference = unbroken(folder)
    disk, script = folder / "disk", [sys.executable, __file__, "--on-disk", str(folder)]
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=3m none {disk} && exec {' '.join(script)}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        return f"没有跑：{done.stderr.strip().splitlines()[-1][:100]}", False
    sentences, loaded = map(int, done.stdout.split()[-2:])
    equal = same(folder / "copied", reference)
    said = f"写满 {TIMES} 次，{sentences} 次只有一句话，检查点载入 {loaded} 次，续训到底与没断过的{'逐位相同' if equal else '不同'}"
    return said, sentences == loaded == TIMES and equal


def on_disk(folder: Path) -> None:
    """``full`` 在挂好的小磁盘上做的：印出只有一句话的次数与载入的次数。"""
    disk, chance, sentences, loaded = folder / "disk", random.Random(0), 0, 0
    for _ in range(TIMES):
        process = go_on(disk, "run")
        moving(process, disk / "run" / CHECKPOINT, chance)
        with suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        _, errors = process.communicate()
        message = errors.strip().splitlines()[-1]
        sentences += process.returncode == 1 and "Traceback" not in errors and message.startswith("错误：") and message.endswith("。")
        (disk / "filler").unlink()
        with suppress(ValueError, OSError):
            load_checkpoint(disk / "run")
            loaded += 1
    go_on(disk, "run").communicate()
    shutil.copytree(disk / "run", folder / "copied")
    print(sentences, loaded)


PARTS = {"killed": ("kill -9", killed), "odd": ("怪图", odd), "crowd": ("同时开始", crowd), "full": ("磁盘写满", full)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="只做这几项（默认全部）")
    parser.add_argument("--on-disk", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.on_disk:
        on_disk(options.on_disk)
        return 0
    print("| 试验 | 结果 | |\n|---|---|---|", flush=True)
    bad = False
    for part in options.parts or PARTS:
        name, work = PARTS[part]
        with tempfile.TemporaryDirectory() as folder:
            said, good = work(Path(folder))
        bad |= not good
        print(f"| {name} | {said} | {'✓' if good else '✗'} |", flush=True)
    return int(bad)


if __name__ == "__main__":
    raise SystemExit(main())
