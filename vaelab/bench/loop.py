"""训练循环快几倍：两边结构、批大小、学习率、权重相同，准备的时间另列并计入，训练完同样多的图之后再比测试 ELBO。"""

from __future__ import annotations

from vaelab.bench.contest import Contest, ratio, say
from vaelab.bench.recipes import BATCH, FULL, USUAL, Recipe, measure, repeats, times_faster, train_on_faces
from vaelab.config import TrainConfig

DEFAULT_STEPS = TrainConfig().epochs * (9000 // BATCH)  # 默认的一次训练，一万张脸
TIMES = (2.0, 3.0)


def bench_loop(rounds: int, steps: int) -> dict:
    """训练循环的比值，不编译与编译各一份；连准备在内，默认长度的训练快几倍，从多少步起到两倍、三倍。"""
    recipes = {
        "usual": USUAL,
        "ours": Recipe("本项目", schedule=False, lr=1e-3),
        "compiled": Recipe("本项目，编译", schedule=False, lr=1e-3, compile="on"),
    }
    costs = measure(recipes, FULL, rounds, steps)
    total = rounds * steps * repeats()
    jobs = {name: (train_on_faces, recipe, FULL, 10_000, total) for name, recipe in recipes.items()}
    with Contest(jobs) as contest:
        elbo = {name: round(contest.go(name, total + 1)[1], 1) for name in jobs}
    result: dict = {"batch_size": BATCH, "rounds": rounds, "images": total * BATCH, "elbo": elbo, "default_steps": DEFAULT_STEPS}
    for kind, what in (("ours", "训练循环"), ("compiled", "训练循环，再加编译")):
        key = "ratio" if kind == "ours" else "compiled_ratio"
        result[key] = ratio(costs["usual"].steps, costs[kind].steps)
        say(what, result[key])
        whole, setup = times_faster(costs, kind, DEFAULT_STEPS), costs[kind].setup_in_steps(costs["usual"])
        reached = {f"{times:g}": costs[kind].steps_to_be(times, costs["usual"]) for times in TIMES}
        result[f"{kind}_setup"] = {"usual_steps": setup, "default_run": round(whole, 2), "from_steps": reached}
        print(f"  准备抵得通常的 {setup} 步；{DEFAULT_STEPS} 步连准备在内 {whole:.2f} 倍；", end="")
        print("，".join(f"{times} 倍从 {start} 步起" if start else f"{times} 倍到不了" for times, start in reached.items()), flush=True)
    print(f"训练 {total * BATCH} 张之后的测试 ELBO（nat/图）：通常 {elbo['usual']}，本项目 {elbo['ours']}，编译 {elbo['compiled']}", flush=True)
    return result
