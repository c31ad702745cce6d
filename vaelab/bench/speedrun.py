"""到达同样的测试 ELBO 要多久：从通常的循环出发，一级一级的阶梯。

办法，事先说好：

- 通常的循环看 ``IMAGES`` 张图。它的学习率、KL 权重、学习率的安排由搜索定，只看验证集（训练集的十分之一）；
  最好的一组，``SEEDS`` 颗种子走完之后测试 ELBO 的平均，就是目标，走完的时间就是它的时间。
- 一级只多改一样，动手之前写下预测与一行理由。改动配方的级，学习率与长度也只在验证集上定：几颗种子的平均够得着通常的循环的最短长度。
- 每一级用同样多的种子，每 ``EVERY`` 张图在测试集上评价一次，第一次不低于目标，就是到达；有一颗种子到不了，就算没有到达。
- 时间 = 准备 + 步数 × 每步。准备在全新的进程里量，含编译；每步的时间各级轮流着量。评价的时间都不算。
- 区间是全部种子与全部轮次里的最低与最高。
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import islice, product

import torch

from vaelab.bench.contest import Contest, ratio
from vaelab.bench.recipes import BATCH, CHANGES, USUAL, Cost, Recipe, measure, steps_of
from vaelab.config import MODEL_DEFAULTS
from vaelab.data import load
from vaelab.images import ImageSet
from vaelab.processes import pick_device
from vaelab.records import machine, read_records

IMAGES = 12_000
EVERY = 1_000
SEEDS = (0, 1, 2)
SEARCH = tuple(product((1e-3, 3e-3, 1e-2), (2.5e-4, 2.5e-5, 2.5e-6), (False, True)))  # 学习率，权重，升降
LENGTHS = (0.25, 1 / 3, 0.42, 0.5, 0.6, 0.75, 1.0)  # 改动配方的级试这些长度，占 IMAGES 的比例
Curve = list[tuple[int, float]]  # (看过几张图, ELBO)
Rung = tuple[Recipe, int, float, str]  # 做法、看几张图、预测比上一级快几倍、理由


def without_test(data: ImageSet) -> ImageSet:
    """训练集再分出十分之一作验证，充当测试集：调参时只看它。"""
    keep = len(data.train) * 9 // 10
    return ImageSet("faces", data.train[:keep], data.train[keep:])


def curve(recipe: Recipe, images: int, validate: bool) -> Iterator[Curve]:
    """照 ``recipe`` 在默认的脸上看 ``images`` 张；交出测试（或验证）ELBO 的曲线。与快慢无关，所以只用一个线程，好几个一起跑。"""
    torch.set_num_threads(1)
    data = load("faces", image_size=64, progress=False)
    data = without_test(data) if validate else data
    total, batch = images // recipe.batch_size, recipe.batch_size
    walk = steps_of(recipe, data, MODEL_DEFAULTS, total, every=0 if validate else max(1, EVERY // batch))
    found = [(done * batch, elbo) for done, elbo in enumerate(islice(walk, total), 1) if elbo is not None]
    yield [*found, (total * batch, float(next(walk)))]  # type: ignore[arg-type]


def curves(jobs: list[tuple[Recipe, int]], validate: bool) -> list[Curve]:
    """每个（做法，图数）的 :func:`curve`，每个核上（GPU 上是四个）同时跑；只差在不改变数的地方的，只跑一次。"""

    def run(job: tuple[Recipe, int]) -> Curve:
        with Contest({"run": (curve, *job, validate)}) as contest:
            return contest.go("run")[1]  # type: ignore[return-value]

    same = [(_numbers_of(recipe), images) for recipe, images in jobs]
    different = list(dict.fromkeys(same))
    with ThreadPoolExecutor(4 if torch.cuda.is_available() else os.cpu_count()) as pool:
        found = dict(zip(different, pool.map(run, different)))
    return [found[each] for each in same]


def _numbers_of(recipe: Recipe) -> Recipe:
    """数由什么决定：只改快慢（舍入除外）的都当作一样。"""
    precision = "fp32" if recipe.usual else recipe.precision
    return replace(recipe, name="", changes=(), keep_memory=True, compile="off", cuda_graphs="auto", precision=precision)


def final(found: list[Curve]) -> tuple[float, float]:
    """几颗种子走完之后的 ELBO：平均与标准差。"""
    last = [each[-1][1] for each in found]
    return statistics.mean(last), statistics.stdev(last)


def search_usual() -> tuple[Recipe, float, list[dict]]:
    """为通常的循环找学习率、权重与安排；返回最好的做法、它在几颗种子上的验证 ELBO，与试过的各组。"""
    recipes = [replace(USUAL, name="通常的循环", lr=lr, kld_weight=weight, schedule=schedule) for lr, weight, schedule in SEARCH]
    found = [each[-1][1] for each in curves([(recipe, IMAGES) for recipe in recipes], validate=True)]
    tried = [
        {"lr": lr, "kld_weight": weight, "schedule": schedule, "validation_elbo": round(elbo, 1)}
        for (lr, weight, schedule), elbo in zip(SEARCH, found)
    ]
    for each in sorted(tried, key=lambda each: each["validation_elbo"]):
        print(f"通常的循环 lr {each['lr']:g}，权重 {each['kld_weight']:g}，{'先升后降' if each['schedule'] else '不变'}：", end="")
        print(f"验证 ELBO {each['validation_elbo']}", flush=True)
    best = recipes[found.index(max(found))]
    return best, final(_seeds(best, IMAGES, validate=True))[0], tried


def _seeds(recipe: Recipe, images: int, validate: bool) -> list[Curve]:
    return curves([(replace(recipe, seed=seed), images) for seed in SEEDS], validate)


def shortest(variants: list[Recipe], target: float) -> tuple[Recipe, int]:
    """在验证集上：哪一个变体学得快，它至少要看几张图才够得着 ``target``；长度折半地找，都不够就用最长的。"""
    best = variants[0]
    if len(variants) > 1:
        ends = [tried[-1][1] for tried in curves([(each, IMAGES // 2) for each in variants], validate=True)]
        best = variants[ends.index(max(ends))]
    low, high = 0, len(LENGTHS) - 1
    while low < high:
        middle = (low + high) // 2
        reached = final(_seeds(best, round(LENGTHS[middle] * IMAGES), validate=True))[0] >= target
        low, high = (low, middle) if reached else (middle + 1, high)
    images = round(LENGTHS[low] * IMAGES)
    print(f"{best.name}：学习率 {best.lr:g}，看 {images} 张（在验证集上定）", flush=True)
    return best, images


def ladder(device: str, usual: Recipe, validation: float) -> list[Rung]:
    """各级。CPU 上时间随图数走，小批用的图最少；GPU 上这么小的模型时间随步数走（核函数的启动，11 章第 10 节），大批用的步数最少。"""
    batch = 16 if device == "cpu" else 128
    wanted = [replace(usual, name=f"批 {batch}", batch_size=batch, lr=usual.lr * scale) for scale in (0.5, 1.0, 2.0)]
    recipe, images = shortest(wanted, validation)
    why = "步数是 4 倍，每步的噪声也大到 4 倍，得失各半：√4" if device == "cpu" else "时间随步数走，同样的图步数减半；多看的图抵去一部分：2 ÷ √2"
    rungs: list[Rung] = [(usual, IMAGES, 1.0, ""), (recipe, images, 2.0 if device == "cpu" else 1.4, why)]
    recipe, images = shortest([replace(recipe, name="σ² 取最优", kld_weight="optimal")], validation)
    rungs.append((recipe, images, 1.0, "固定的权重已是搜索里最好的一个，σ² 自己会走到那附近，不指望再快"))

    def add(name: str, predicted: float, why: str, **changes: object) -> None:
        nonlocal recipe
        recipe = replace(recipe, name=name, **changes)  # type: ignore[arg-type]
        rungs.append((recipe, images, predicted, why))

    reasons = {
        "channels_last": (1.25, "库内部不必换排；换排至多占搬运的一半，取 1 与 1.5 之间"),
        "fused": (1.28, "批 32 时一步 796 MB → 622 MB，11 章第 7、8 节") if device == "cpu" else (1.1, "foreach 已经把上百次启动并成十几次"),
        "inplace": (1.0, "省的是内存，不是搬运"),
        "no_bias": (1.0, "五百分之一的参数"),
        "uint8": (1.0, "一批图只占一步搬运的百分之几") if device == "cpu" else (1.5, "DataLoader 逐张拼批，要一毫秒多"),
        "later": (1.0, "CPU 上没有队列可等") if device == "cpu" else (1.1, "取数时 GPU 空等一次往返，约 20 微秒"),
    }
    if device == "cpu":
        add("留住释放的内存", 1.43, "缺页占三成，1 ÷ 0.7，11 章第 12 节", keep_memory=True)
    done: tuple[str, ...] = ()
    for change, (predicted, why) in reasons.items():
        done += (change,)
        add(CHANGES[change], predicted, why, changes=done)
    add("换成 vaelab 的一步", 1.0, "以上各样合起来就是它，不该变", usual=False, changes=(), precision="fp32", cuda_graphs="off")
    if device != "cpu":
        add("整个一步录成一张图", 3.0, "4.7 毫秒几乎全在等启动，图里剩下约 1.5 毫秒", cuda_graphs="auto")
    add("自动选的精度", 1.5, "搬运减半；选得不对就是 1" if device == "cpu" else "图里卡在搬运上，字节减半，小核函数不减", precision="auto")
    return rungs


def quality(device: str) -> dict:
    """与快慢无关的一半：搜索，各级的做法与长度，各颗种子到达目标时看过几张图。"""
    usual, validation, tried = search_usual()
    rungs = ladder(device, usual, validation)
    flat = curves([(replace(recipe, seed=seed), images) for recipe, images, _, _ in rungs for seed in SEEDS], validate=False)
    found = [flat[k : k + len(SEEDS)] for k in range(0, len(flat), len(SEEDS))]  # 一起交出去，相同的才只跑一次
    target, spread = final(found[0])
    rows = []
    for (recipe, images, predicted, why), each in zip(rungs, found):
        reached = [next((seen for seen, elbo in one if elbo >= target), None) for one in each]
        mean, deviation = final(each)
        row = {"name": recipe.name, "predicted": predicted, "why": why, "recipe": asdict(recipe), "planned": images}
        rows.append({**row, "images": [IMAGES] * len(SEEDS) if not rows else reached, "elbo": round(mean, 1), "elbo_sd": round(deviation, 1)})
        print(f"{recipe.name}：测试 ELBO {mean:.1f} ± {deviation:.1f}，到达目标时看过 {reached} 张", flush=True)
    return {"images": IMAGES, "seeds": len(SEEDS), "search": tried, "target_elbo": round(target, 1), "target_sd": round(spread, 1), "ladder": rows}


def timed(row: dict, cost: Cost, usual: Cost, budget: int) -> dict:
    """把时间添进一级：每秒图数、准备、共快几倍与区间；有一颗种子没有到达，就没有快几倍可言。"""
    batch = row["recipe"]["batch_size"]
    each = ratio(usual.steps, [second * BATCH / batch for second in cost.steps])  # 每张图
    row = {**row, "throughput": each, "setup": cost.setup_in_steps(usual)}
    if None in row["images"]:
        return {**row, "speedup": None, "low": None, "high": None}
    times = [usual.total(budget // BATCH, kth) / cost.total(images // batch, kth) for images in row["images"] for kth in range(len(cost.steps))]
    return {**row, "speedup": round(statistics.median(times), 2), "low": round(min(times), 2), "high": round(max(times), 2)}


def bench_speedrun(rounds: int, steps: int, search: bool) -> dict:
    """目标与各级见文件开头；没有 ``search`` 就沿用这台机器记录里与快慢无关的一半，只重新量时间。"""
    mine = [record["speedrun"] for record in read_records() if record["machine"] == machine() and "seeds" in record.get("speedrun", {})]
    result = quality(pick_device().type) if search or not mine else mine[-1]
    recipes = {row["name"]: Recipe(**{**row["recipe"], "changes": tuple(row["recipe"]["changes"])}) for row in result["ladder"]}
    costs = measure(recipes, MODEL_DEFAULTS, rounds, steps)
    usual = costs[result["ladder"][0]["name"]]
    rows = [timed(row, costs[row["name"]], usual, result["images"]) for row in result["ladder"]]
    print(f"目标 {result['target_elbo']:.1f} ± {result['target_sd']:.1f} nat/图，{result['seeds']} 颗种子", flush=True)
    for before, row in zip([rows[0], *rows], rows):
        gained = f"比上一级 {row['speedup'] / before['speedup']:.2f}（预测 {row['predicted']:g}）" if row["speedup"] and before["speedup"] else ""
        whole = f"共快 {row['speedup']:.2f} 倍（{row['low']:.2f}–{row['high']:.2f}）" if row["speedup"] else "有种子没有到达目标"
        print(f"{row['name']}：每秒图数 {row['throughput']['median']:.2f} 倍，准备抵 {row['setup']:.0f} 步，{whole}，{gained}", flush=True)
    return {**result, "rounds": rounds, "ladder": rows}
