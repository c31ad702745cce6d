"""各台机器的测速记录：每台一个 JSON，课程与 README 从这里读。"""

from __future__ import annotations

import json
import os
import platform
import re
from datetime import date
from pathlib import Path

import psutil
import torch

from vaelab.files import write_atomically

HERE = Path(__file__).parent


def machine() -> dict:
    """这台机器：CPU、核数、内存、GPU。"""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        cpu = found[1].strip() if found else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 1e9), "gpu": gpu}


def read_records(folder: str | os.PathLike = HERE) -> list[dict]:
    """全部记录，从旧到新。每份的键：machine、date、versions，以及测过的各项。"""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))]
    return sorted(found, key=lambda each: each["date"])


def write_record(sections: dict, folder: str | os.PathLike = HERE) -> Path:
    """把 ``sections`` 并进这台机器的记录，没有测的各项保持原样；返回文件。每一项各有日期与版本。"""
    this = machine()
    name = f"{this['gpu'] or this['cpu']} {this['cores']} cores"
    path = Path(folder) / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    today = date.today().isoformat()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "os": platform.system()}
    stamped = {key: {**section, "date": today, "versions": versions} for key, section in sections.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**old, "machine": this, "date": today, "versions": versions, **stamped}, ensure_ascii=False, indent=1)
    write_atomically(path, lambda file: file.write((text + "\n").encode("utf-8")))
    return path
