"""``auto`` 会不会比通常的循环慢：几种模型、批大小、步数，准备的时间都算上。

每种做法在全新的进程里量两样：准备（建模型到走完第一步，含量精度、编译、录图）与之后每步的时间，两边交错着走。
走 N 步的总时间是 准备 + (N − 1)·每步，N 从 10 到十万，于是短的、长的训练都看得见，不必真的走十万步。
``auto`` 按步数决定编译不编译，所以编译与不编译的各量一遍，每个 N 用它会选的那一种。
"""

from __future__ import annotations

import statistics

from vaelab.bench.contest import Contest
from vaelab.bench.recipes import FULL, Recipe, train_on_faces
from vaelab.config import MODEL_DEFAULTS, TrainConfig
from vaelab.data import load
from vaelab.plan import make_plan

LENGTHS = (10, 100, 1_000, 10_000, 100_000)
MODELS = {"默认的模型": MODEL_DEFAULTS, "公开的模型": FULL}
BATCHES = (16, 64)
IMAGES = 600


def _costs(model_args: dict, batch_size: int, rounds: int) -> dict[str, tuple[float, float]]:
    """三种做法的 (准备, 每步)，秒；准备是走完第一步的时间，不含画脸。"""
    usual = Recipe("通常", usual=True, keep_memory=False, schedule=False, lr=1e-3, batch_size=batch_size)
    recipes = {"usual": usual} | {kind: Recipe(kind, schedule=False, lr=1e-3, batch_size=batch_size, compile=kind) for kind in ("off", "on")}
    with Contest({name: (train_on_faces, recipe, model_args, IMAGES, 10**9) for name, recipe in recipes.items()}) as contest:
        setup = {name: contest.go(name)[0] for name in recipes}
        seconds = contest.race(rounds, steps=8, warmup=8)
    return {name: (setup[name], statistics.median(seconds[name]) / 8) for name in recipes}


def times_faster(costs: dict[str, tuple[float, float]], kind: str, steps: int) -> float:
    """走 ``steps`` 步，通常的循环用的时间是 ``kind`` 的几倍；``costs`` 是各种做法的 (准备, 每步)。"""
    usual, ours = (setup + (steps - 1) * each for setup, each in (costs["usual"], costs[kind]))
    return usual / ours


def bench_auto(rounds: int) -> dict:
    """一张表：每种模型、批大小、步数，通常的循环用的时间是 ``auto`` 的几倍；小于 1 就是 ``auto`` 反而慢。"""
    data = load("faces", image_size=64, count=IMAGES)
    rows = []
    print("| 模型 | 批 | " + " | ".join(f"{steps} 步" for steps in LENGTHS) + " |\n|" + "---|" * (len(LENGTHS) + 2), flush=True)
    for model, model_args in MODELS.items():
        for batch_size in BATCHES:
            costs = _costs(model_args, batch_size, rounds)
            config = TrainConfig(batch_size=batch_size)
            chosen = ["on" if make_plan(data, config, total_steps=steps).compile else "off" for steps in LENGTHS]
            ratios = [round(times_faster(costs, kind, steps), 2) for steps, kind in zip(LENGTHS, chosen)]
            rows.append({"model": model, "batch_size": batch_size, "costs": costs, "compiled": [kind == "on" for kind in chosen], "ratios": ratios})
            cells = [f"{ratio:.2f}{'，编译' * (kind == 'on')}{'，慢' * (ratio < 1)}" for ratio, kind in zip(ratios, chosen)]
            print(f"| {model} | {batch_size} | " + " | ".join(cells) + " |", flush=True)
    return {"steps": list(LENGTHS), "rounds": rounds, "rows": rows, "worst": min(ratio for row in rows for ratio in row["ratios"])}
