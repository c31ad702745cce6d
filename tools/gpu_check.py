"""给有十分钟 GPU 的人：``python tools/gpu_check.py [--minutes 10] [--out gpu_check.md]``。

依次做：机器是什么；只有在 GPU 上才跑得到的测试；测速的几项，写进记录；每一本笔记，严格地，一本一个进程。
每一项有自己的时限，做完立刻写进一个文件，所以中途停下也不白做；时间用完，其余的记作没有做。
十分钟做不完全部：``--only 测速`` 只测速，``--only 笔记`` 只跑笔记，各在十分钟之内。
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--color=no")
MACHINE = """
import os, platform, torch, torchvision, matplotlib
print(platform.platform(), platform.python_version(), os.cpu_count(), "核")
print("torch", torch.__version__, "torchvision", torchvision.__version__, "matplotlib", matplotlib.__version__)
for k in range(torch.cuda.device_count()):
    print(torch.cuda.get_device_name(k), torch.cuda.get_device_capability(k), f"{torch.cuda.mem_get_info(k)[1] / 1e9:.0f} GB",
          "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "没有 bf16")
assert torch.cuda.is_available(), "torch 看不见 GPU"
"""
BENCHES = (("auto", 150, "--rounds", "3"), ("epoch", 150), ("loop", 100, "--rounds", "5"), ("speedrun", 190, "--search", "--rounds", "5"))


def parts() -> list[tuple[str, list[str], int]]:
    """各项的名字、命令（``python`` 之后的）与时限（秒），按要紧的先后。"""
    chapters = [*sorted((ROOT / "notebooks").glob("*.ipynb")), *sorted((ROOT / "notebooks/solutions").glob("*.ipynb"))]
    return [
        ("机器", ["-c", MACHINE], 60),
        ("GPU 上的测试", [*PYTEST, *(f"tests/test_{name}.py" for name in ("model", "evaluate", "stepper", "graph")), "-k", "cuda"], 90),
        *((f"测速 {name}", ["-m", "vaelab.bench", name, "--record", *extra], limit) for name, limit, *extra in BENCHES),
        *((f"笔记 {path.relative_to(ROOT / 'notebooks').with_suffix('')}", [*PYTEST, str(path.relative_to(ROOT))], 90) for path in chapters),
        ("训练的测试", [*PYTEST, "tests/test_train.py"], 150),
    ]


def run(command: list[str], limit: float) -> tuple[str, float, str]:
    """在自己的进程组里运行，到时限连同子进程一起结束；返回结论、秒数与输出。"""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        encoding="utf-8", errors="replace", start_new_session=os.name == "posix",
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=limit)
        verdict = "✓" if process.returncode == 0 else f"✗ 退出码 {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()
        output, verdict = process.communicate()[0], f"✗ 超过 {limit:.0f} 秒"
    return verdict, time.perf_counter() - started, output


def excerpt(output: str, passed: bool) -> str:
    """通过的只留末尾三行，没有通过的留下说明原因的行。"""
    lines = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", output).splitlines() if line.strip()]
    return "\n".join(lines[-3:] if passed else lines[-60:])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="一共用多少分钟（默认 10）")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.md"), help="结果写在哪里（默认 gpu_check.md）")
    parser.add_argument("--only", default="", help="只做名字里含有这几个字的各项")
    options = parser.parse_args(arguments)
    deadline, failed = time.perf_counter() + 60 * options.minutes, False
    options.out.write_text(f"# GPU 上的检查，{time.strftime('%Y-%m-%d %H:%M')}\n", encoding="utf-8")
    for name, command, limit in parts():
        if options.only not in name:
            continue
        left = deadline - time.perf_counter()
        verdict, seconds, output = run(command, min(limit, left)) if left > 10 else ("○ 时间不够，没有做", 0.0, "")
        failed |= verdict[0] == "✗"
        print(f"{verdict}　{name}　{seconds:.0f} 秒", flush=True)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(f"\n## {verdict}　{name}　{seconds:.0f} 秒\n\n```\n{excerpt(output, verdict == '✓')}\n```\n")
    return int(failed)


if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    raise SystemExit(main(sys.argv[1:]))
