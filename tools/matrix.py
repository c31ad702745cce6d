"""在各种机器上运行笔记，打印一张表：``python tools/matrix.py [--settings …] [--chapters …] [--versions]``。

一行是一种机器，一列是一本笔记；格子里是 ✓，或没有通过的单元的个数，原因写在标准错误里。机器是造出来的（``tools/other_machine.py``、环境变量），
``--versions`` 另外装上最低与最新的依赖各跑一遍，要几分钟来安装。每一格都是一次严格的 nbval。
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from other_machine import kernel_environment  # noqa: E402
from stamp import notebooks  # noqa: E402


@dataclass(frozen=True)
class Setting:
    """一种机器：环境变量，造出来的毛病，旁边有几个忙着的进程，或另装的依赖。"""

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    kind: str = ""
    busy: int = 0
    uv: tuple[str, ...] = ()


SETTINGS = {
    "plain": Setting("这台机器"),
    "threads-1": Setting("一个线程", {"OMP_NUM_THREADS": "1"}),
    "threads-3": Setting("三个线程", {"OMP_NUM_THREADS": "3"}),
    "avx2": Setting("AVX2", {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "sse41": Setting("SSE4.1，一个线程", {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "OMP_NUM_THREADS": "1"}),
    "no-onednn": Setting("没有 oneDNN", kind="no-onednn"),
    "noisy-weights": Setting("初始权重错在末位", kind="noisy-weights"),
    "one-ulp": Setting("函数的值错在末位", kind="one-ulp"),
    "t4": Setting("假的 T4", kind="t4"),
    "h100": Setting("假的 H100", kind="h100"),
    "busy": Setting("旁边两个忙的进程", busy=2),
}
VERSIONS = {
    "lowest": Setting("最低的依赖，Python 3.10", uv=("run", "--isolated", "--resolution", "lowest-direct", "-p", "3.10")),
    "newest": Setting("最新的依赖，Python 3.13", uv=("run", "--isolated", "--upgrade", "-p", "3.13")),
}


def run(setting: Setting, paths: list[Path]) -> dict[str, tuple[list[str], float]]:
    """严格地跑一遍；每本笔记：没有通过的单元与原因，用了几秒。"""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        environment = {**os.environ, **setting.environment}
        if setting.kind:
            environment |= kernel_environment(setting.kind, Path(folder))
        start = ["uv", *setting.uv] if setting.uv else []
        command = [
            *start,
            *([] if start else [sys.executable, "-m"]),
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            *map(str, paths),
        ]
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(setting.busy)]
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8", errors="replace")
        finally:
            for each in busy:
                each.kill()
        if not report.is_file():
            raise SystemExit(f"{setting.name}：没有跑起来\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        results: dict[str, tuple[list[str], float]] = defaultdict(lambda: ([], 0.0))
        for case in xml.parse(report).iter("testcase"):
            key = case.get("classname", "").replace(".", "/").removesuffix("/ipynb")
            failed, seconds = results[key]
            trouble = [each.get("message") or each.text or "" for each in case if each.tag in ("failure", "error")]
            results[key] = (failed + [f"{case.get('name')} {why}" for why in trouble], seconds + float(case.get("time", 0)))
        return results


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--settings", nargs="*", default=list(SETTINGS), choices=[*SETTINGS, *VERSIONS], metavar="机器", help="、".join([*SETTINGS, *VERSIONS])
    )
    parser.add_argument("--chapters", nargs="*", help="笔记的文件，默认全部")
    parser.add_argument("--versions", action="store_true", help="另外用最低与最新的依赖各跑一遍")
    options = parser.parse_args(arguments)
    paths = [Path(each).resolve() for each in options.chapters] if options.chapters else notebooks(ROOT)
    chosen = {**{key: {**SETTINGS, **VERSIONS}[key] for key in options.settings}, **(VERSIONS if options.versions else {})}
    print("| 机器 | " + " | ".join(f"{'解 ' if path.parent.name == 'solutions' else ''}{path.name[:2]}" for path in paths) + " | 秒 |", flush=True)
    print("|---" * (len(paths) + 2) + "|", flush=True)
    failed, trouble = False, []
    for setting in chosen.values():
        started, row = time.perf_counter(), []
        results = run(setting, paths)
        for path in paths:
            wrong, seconds = results.get(path.relative_to(ROOT).with_suffix("").as_posix(), (["没有运行"], 0.0))
            row.append(f"{'✓' if not wrong else '✗ ' + str(len(wrong))} {seconds:.0f}s")
            trouble += [f"{setting.name}，{path.name}：{each}" for each in wrong]
        print(f"| {setting.name} | " + " | ".join(row) + f" | {time.perf_counter() - started:.0f} |", flush=True)
        print("\n\n".join(trouble), file=sys.stderr, flush=True)
        failed, trouble = failed or bool(trouble), []
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
