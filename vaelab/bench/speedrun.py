"""到达同样的测试 ELBO 要多久：从通常的循环出发，一级一级的阶梯。"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import torch

from vaelab.bench.contest import Contest, ratio
from vaelab.bench.recipes import BATCH, Recipe, train_on_faces, train_to_the_end
from vaelab.config import MODEL_DEFAULTS
from vaelab.data import load
from vaelab.images import ImageSet
from vaelab.processes import pick_device

SEARCH = [(lr, weight) for lr in (3e-4, 1e-3, 3e-3) for weight in (2.5e-4, 2.5e-5)] + [(3e-3, 2.5e-6), (1e-2, 2.5e-5)]
# 通常的循环：批 64，学习率固定，取搜索里最好的一组。
USUAL = Recipe("通常的循环", usual=True, keep_memory=False, schedule=False, lr=3e-3, kld_weight=2.5e-5, epochs=20)


def ladder(device: str = "cpu") -> list[Recipe]:
    """阶梯：从通常的循环出发，一级多改一样。epochs 是在验证集上够得着目标的轮数，事先定下。

    CPU 上时间随图数走，小批用的图最少；GPU 上这么小的模型时间随步数走（发射，见 11 章第 10 节），大批用的步数最少。
    """
    rungs = [USUAL]

    def add(name: str, predicted: float, **changes: object) -> None:
        rungs.append(replace(rungs[-1], name=name, predicted=predicted, **changes))

    if device == "cuda":
        add("批 128，学习率先升后降，σ² 取最优", 1.5, batch_size=128, schedule=True, lr=1e-2, kld_weight="optimal", epochs=24)
        add("数据在 GPU 上，channels_last，融合的 Adam", 3.0, usual=False, precision="fp32")
        add("自动选的精度", 1.0, precision="auto")
        add("编译，一步录成一张 CUDA 图", 3.0, compile="on")
        return rungs
    add("批 16，学习率先升后降", 2.0, batch_size=16, schedule=True, lr=5e-3, epochs=10)
    add("σ² 取最优", 1.2, kld_weight="optimal", epochs=8)
    add("留住释放的内存", 1.3, keep_memory=True)
    add("channels_last、融合的 Adam", 1.2, usual=False, precision="fp32")
    add("自动选的精度", 1.5, precision="auto")
    return rungs


def _without_test(data: ImageSet) -> ImageSet:
    """训练集再分出十分之一作验证，充当测试集：调参时只看它。"""
    keep = len(data.train) * 9 // 10
    return ImageSet("faces", data.train[:keep], data.train[keep:])


def quality(recipe: Recipe, validate: bool) -> Iterator[float]:
    """照 ``recipe`` 在默认的脸上训练到底；交出测试（或验证）ELBO。与快慢无关，所以只用一个线程，好几个一起跑。"""
    torch.set_num_threads(1)
    data = load("faces", image_size=64, progress=False)
    data = _without_test(data) if validate else data
    total = recipe.epochs * (len(data.train) // recipe.batch_size)
    yield train_to_the_end(recipe, data, MODEL_DEFAULTS, total)


def qualities(recipes: list[Recipe], validate: bool = False) -> list[float]:
    """各 ``recipe`` 的 :func:`quality`，每个核上同时跑一个；只差在内存分配器上的，算的是同样的数，只跑一次。"""

    def run(recipe: Recipe) -> float:
        with Contest({"run": (quality, recipe, validate)}) as contest:
            return contest.go("run")[1]

    same = [replace(recipe, name="", predicted=1.0, keep_memory=not recipe.usual) for recipe in recipes]
    different = list(dict.fromkeys(same))
    with ThreadPoolExecutor(1 if torch.cuda.is_available() else os.cpu_count()) as pool:
        found = dict(zip(different, pool.map(run, different)))
    return [found[each] for each in same]


def search_usual(epochs: int = 3) -> dict:
    """为通常的循环找学习率与 KL 权重：每一组训练几轮，看验证 ELBO。"""
    tried = qualities([replace(USUAL, lr=lr, kld_weight=weight, epochs=epochs) for lr, weight in SEARCH], validate=True)
    found = [{"lr": lr, "kld_weight": weight, "validation_elbo": round(elbo, 1)} for (lr, weight), elbo in zip(SEARCH, tried)]
    for each in found:
        print(f"通常的循环 lr {each['lr']:g}，权重 {each['kld_weight']:g}，{epochs} 轮：验证 ELBO {each['validation_elbo']}", flush=True)
    return {"epochs": epochs, "tried": found, "best": max(found, key=lambda each: each["validation_elbo"])}


def bench_speedrun(rounds: int, steps: int, search: bool) -> dict:
    """目标是通常的循环 20 轮到达的测试 ELBO；阶梯的每一级先交错测速，再各自训练到底，得出快了几倍。"""
    result: dict = {"search": search_usual()} if search else {}
    rungs = ladder(pick_device().type)
    jobs = {recipe.name: (train_on_faces, recipe, MODEL_DEFAULTS, 10_000, 10**9) for recipe in rungs}
    with Contest(jobs) as contest:
        seconds = contest.race(rounds, steps, warmup=5)
    rows: list[dict] = []
    for recipe, elbo in zip(rungs, qualities(rungs)):
        each = ratio(seconds[USUAL.name], [s * BATCH / recipe.batch_size for s in seconds[recipe.name]])  # 每张图
        images = recipe.epochs * (9000 // recipe.batch_size) * recipe.batch_size
        speedup = each["median"] * (USUAL.epochs * (9000 // BATCH) * BATCH) / images
        row = {"name": recipe.name, "predicted": recipe.predicted, "throughput": each, "images": images}
        row |= {"elbo": round(elbo, 1), "speedup": round(speedup, 2), "recipe": asdict(recipe)}
        rows.append(row)
        print(f"{recipe.name}：每秒图数 {each['median']:.2f} 倍，{images} 张，测试 ELBO {elbo:.1f}，共快 {speedup:.2f} 倍", flush=True)
    target = rows[0]["elbo"]
    missed = [row["name"] for row in rows if row["elbo"] < target]
    print(f"目标 {target:.1f} nat/图：" + (f"没有到达的有 {'、'.join(missed)}" if missed else "每一级都到达了"), flush=True)
    return {**result, "target_elbo": target, "ladder": rows}
