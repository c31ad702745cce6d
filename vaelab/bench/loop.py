"""训练循环快几倍：两边结构、批大小相同，训练完同样多的图之后再比测试 ELBO。"""

from __future__ import annotations

from vaelab.bench.contest import Contest, ratio, say
from vaelab.bench.recipes import BATCH, FULL, Recipe, repeats, train_on_faces


def bench_loop(rounds: int, steps: int) -> dict:
    """训练循环的比值，与训练同样多的图之后的测试 ELBO；编译的那一份连编译的时间另列。"""
    warmup = 3
    steps *= repeats()
    total = warmup + rounds * steps
    recipes = {
        "usual": Recipe("通常", usual=True, keep_memory=False, schedule=False, lr=1e-3),
        "ours": Recipe("本项目", schedule=False, lr=1e-3),
        "compiled": Recipe("本项目，编译", schedule=False, lr=1e-3, compile="on"),
    }
    jobs = {name: (train_on_faces, recipe, FULL, 10_000, total) for name, recipe in recipes.items()}
    with Contest(jobs) as contest:
        seconds = contest.race(rounds, steps, warmup)
        elbo = {name: round(contest.go(name)[1], 1) for name in jobs}
    result = {"batch_size": BATCH, "rounds": rounds, "images": total * BATCH, "elbo": elbo}
    result["ratio"] = ratio(seconds["usual"], seconds["ours"])
    result["compiled_ratio"] = ratio(seconds["usual"], seconds["compiled"])
    say("训练循环", result["ratio"])
    say("训练循环，再加编译", result["compiled_ratio"])
    print(f"训练 {total * BATCH} 张之后的测试 ELBO（nat/图）：通常 {elbo['usual']}，本项目 {elbo['ours']}，编译 {elbo['compiled']}", flush=True)
    return result
