"""留住释放的内存省下多少：虚拟机上的缺页，与由此省下的时间（glibc 的 Linux）。"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from vaelab.bench.contest import Contest, ratio, say
from vaelab.bench.recipes import BATCH, FULL, USUAL, Recipe, train_on_faces


def _count_pages(recipe: Recipe, steps: int) -> Iterator[dict]:
    """每走 ``steps`` 步交出一次：每步缺页几次，内核态占几成。"""
    import resource

    walk = train_on_faces(recipe, FULL, 1000, 10**9)
    while True:
        before = resource.getrusage(resource.RUSAGE_SELF)
        for _ in range(steps):
            next(walk)
        after = resource.getrusage(resource.RUSAGE_SELF)
        kernel, user = after.ru_stime - before.ru_stime, after.ru_utime - before.ru_utime
        yield {"faults_per_step": (after.ru_minflt - before.ru_minflt) // steps, "kernel_share": round(kernel / (kernel + user), 3)}


def bench_allocator(rounds: int, steps: int = 4) -> dict:
    """留住释放的内存：缺页与内核态的时间，Amdahl 定律的预言，与交错量出的比值（glibc 的 Linux）。"""
    jobs = {"usual": (_count_pages, USUAL, steps), "kept": (_count_pages, replace(USUAL, keep_memory=True), steps)}
    with Contest(jobs) as contest:
        seconds = contest.race(rounds, steps=1, warmup=1)
        pages = {name: contest.go(name)[1] for name in jobs}
    result = {"batch_size": BATCH, "rounds": rounds, **pages, "ratio": ratio(seconds["usual"], seconds["kept"])}
    result["predicted"] = round(1 / (1 - pages["usual"]["kernel_share"] + pages["kept"]["kernel_share"]), 2)
    faults, share = ([pages[name][key] for name in jobs] for key in ("faults_per_step", "kernel_share"))
    print(f"每步缺页 {faults[0]} → {faults[1]}，内核态占 {share[0]:.0%}，预言 {result['predicted']} 倍")
    say("留住释放的内存", result["ratio"])
    return result
