"""两种安装方式给出同一个环境；声明的依赖都真的用到、真的够用。"""

import re
import subprocess
import sys

import pytest

from conftest import ROOT

tomllib = pytest.importorskip("tomllib", reason="标准库的 tomllib 从 Python 3.11 起才有")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_environment_yml_installs_exactly_this_project():
    lines = (ROOT / "environment.yml").read_text(encoding="utf-8").splitlines()
    entries = [line.strip()[2:] for line in lines if line.strip().startswith("- ")]
    assert entries[entries.index("pip:") + 1 :] == ["-e ."]  # 别的依赖都写在 pyproject.toml
    python = [entry for entry in entries if entry.startswith("python")]
    assert python == [f"python{PROJECT['requires-python']}"]
    assert f"name: {PROJECT['name']}" in lines


def test_dependencies_have_lower_bounds_only():
    for requirement in PROJECT["dependencies"]:
        assert re.fullmatch(r"[a-z0-9-]+>=[0-9.]+", requirement), requirement


def test_importing_the_model_needs_torch_alone():
    """`import vanilla_vae` 不得带进 torchvision、matplotlib 之类（torch 自己带进来的不算）。"""
    code = (
        "import sys, torch; before = set(sys.modules); import vanilla_vae; print(sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['_type', 'vanilla_vae']"
