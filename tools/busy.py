"""等待策略在闲时与忙时各要多久：``python tools/busy.py``，打印 CONTRIBUTING.md 里的那张表，约八分钟。

每种策略在自己的进程里训练同一个小模型，几轮交错，取中位数；“忙”是旁边有与核数一样多的死循环。
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS, ROUNDS, SECONDS = 40, 3, 8
POLICIES = {
    "默认": {},
    **{f"SPINCOUNT {count}": {"GOMP_SPINCOUNT": str(count)} for count in (100_000, 10_000, 3000, 1000)},
    "PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "一个线程": {"OMP_NUM_THREADS": "1"},
}
# 先导入 torch，vanilla_vae 里的 setdefault 就不再起作用，量的才是各自的策略
WORK = f"""
import time, torch
from vaelab.memory import keep_freed_memory
from vanilla_vae import VanillaVAE
keep_freed_memory()
torch.manual_seed(0)
model = VanillaVAE(3, 16, [16, 32, 64], 32).to(memory_format=torch.channels_last)
optimizer = torch.optim.Adam(model.parameters(), fused=True)
x = (torch.rand(32, 3, 32, 32) * 2 - 1).contiguous(memory_format=torch.channels_last)
for step in range({STEPS} + 3):
    if step == 3: started = time.perf_counter()
    optimizer.zero_grad()
    model.loss_function(*model(x), M_N=1e-3)["loss"].backward()
    optimizer.step()
    if step >= 3 and time.perf_counter() - started > {SECONDS}: break
print((time.perf_counter() - started) / (step - 2) * 1000)
"""


def milliseconds(environment: dict[str, str]) -> float:
    """一步用几毫秒。"""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("GOMP_", "OMP_"))}
    return float(subprocess.check_output([sys.executable, "-c", WORK], env={**clean, "PYTHONPATH": str(ROOT), **environment}, text=True))


def main() -> None:
    print("| | " + " | ".join(POLICIES) + " |")
    print("|---" * (len(POLICIES) + 1) + "|")
    for name, count in (("空闲", 0), ("旁边的死循环与核一样多", os.cpu_count() or 1)):
        loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
        try:
            spent = {policy: [] for policy in POLICIES}
            for _ in range(ROUNDS):
                for policy, environment in POLICIES.items():
                    spent[policy].append(milliseconds(environment))
        finally:
            for each in loops:
                each.kill()
        print(f"| {name} | " + " | ".join(f"{statistics.median(values):.1f}" for values in spent.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
