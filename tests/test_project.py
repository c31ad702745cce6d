"""两种安装方式给出同一个环境；声明的依赖都真的用到、真的够用。"""

import configparser
import os
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest

from conftest import ROOT

tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")  # 3.10 上由 pytest 带来
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_environment_yml_installs_exactly_this_project():
    lines = (ROOT / "environment.yml").read_text(encoding="utf-8").splitlines()
    entries = [line.strip()[2:] for line in lines if line.strip().startswith("- ")]
    assert entries[entries.index("pip:") + 1 :] == ["-e .[lab,tests]"]  # 别的依赖都写在 pyproject.toml
    python = [entry for entry in entries if entry.startswith("python")]
    assert python == [f"python{PROJECT['requires-python']}"]
    assert f"name: {PROJECT['name']}" in lines


def test_dependencies_have_lower_bounds_only():
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for requirement in (each for group in groups for each in group):
        assert re.fullmatch(r"[a-z0-9-]+>=[0-9.]+", requirement), requirement


def brought_by(statement: str, before: str = "pass") -> set[str]:
    """新的进程里，先运行 ``before``，再运行 ``statement``：后者带进来哪些模块。"""
    code = f"import sys; {before}; seen = set(sys.modules); {statement}; print(*set(sys.modules) - seen)"
    return set(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_model_needs_torch_alone():
    """`import vanilla_vae` 不得带进 torchvision、matplotlib 之类（torch 自己带进来的不算）。"""
    assert {name.split(".")[0] for name in brought_by("import vanilla_vae", "import torch")} == {"_type", "vanilla_vae"}


def test_reading_records_needs_neither_bench_nor_the_command_line():
    brought = brought_by("import vaelab.records; vaelab.records.read_records()")
    assert "vaelab.records" in brought and not any(name.startswith(("vaelab.bench", "vaelab.cli")) for name in brought)


def test_a_platform_with_torch_lacks_two_packages():
    """README 让 Colab、AutoDL 一类的读者只装 zhplot 与 psutil：其余的依赖，带着 torch 与 Jupyter 的镜像都有。"""
    brought = {"torch", "torchvision", "numpy", "matplotlib", "pillow", "tqdm", "filelock"}
    names = {re.split("[>=]", requirement)[0] for requirement in PROJECT["dependencies"]}
    assert names - brought == {"zhplot", "psutil"}
    assert "`pip install zhplot psutil`" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_notebooks_and_modules_import_only_what_is_declared():
    """笔记、vaelab 与 vanilla_vae.py 直接引用的包，都写在 dependencies 里（torch 自己带来的 sympy、笔记的前端 IPython 除外）。

    导出用的几个是可选的，只有 vaelab/export.py 引用。
    """
    import ast
    import json

    sources = [path.read_text(encoding="utf-8") for path in [ROOT / "vanilla_vae.py", *(ROOT / "vaelab").rglob("*.py")]]
    for path in (ROOT / "notebooks").rglob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources += [
            "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code" and "raises-exception" not in cell["metadata"].get("tags", [])
        ]
    found = set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                found |= {each.name.split(".")[0] for each in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    here = {"vaelab", "vanilla_vae", "_type", "__future__", "old_type"}
    declared = {{"pillow": "PIL"}.get(name, name) for name in (re.split("[>=]", each)[0] for each in PROJECT["dependencies"])}
    declared |= {re.split("[>=]", each)[0] for each in PROJECT["optional-dependencies"]["export"]}
    assert found - set(sys.stdlib_module_names) - here - declared <= {"IPython", "sympy", "google"}


# —— 发布：装 wheel 就是把它解开，再按 entry_points.txt 造出命令 ——


def built(kind: str, folder) -> str:
    code = f"import sys, hatchling.build as build; print(build.build_{kind}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, capture_output=True, text=True, check=True)
    return folder / done.stdout.split()[-1]


def test_the_wheel_gives_the_modules_the_command_and_the_records(tmp_path):
    wheel = built("wheel", tmp_path)
    assert wheel.name.startswith(f"vae_zh-{PROJECT['version']}-py3")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
        names = archive.namelist()
    points = configparser.ConfigParser()
    points.read_string((tmp_path / "installed" / next(name for name in names if name.endswith("entry_points.txt"))).read_text())
    module, function = points["console_scripts"]["vae-zh"].split(":")
    (tmp_path / "bin").mkdir()
    script = f"import sys; from {module} import {function}; import vanilla_vae, vaelab.records\n"
    script += f"code = {function}(['sample', 'nowhere']); print(code, vanilla_vae.__file__, len(vaelab.records.read_records()))"
    (tmp_path / "bin/vae-zh").write_text(script, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "PYTHONIOENCODING": "utf-8"}
    run = lambda code: subprocess.run([sys.executable, *code], cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8")
    done = run([str(tmp_path / "bin/vae-zh")])
    code, path, records = done.stdout.split()
    assert (code, int(records)) == ("1", len(list((ROOT / "vaelab/records").glob("*.json")))) and "没有检查点 nowhere" in done.stderr
    assert path == str(tmp_path / "installed/vanilla_vae.py")
    shown = run(["-c", "from vaelab.cli import main; main(['--version'])"]).stdout
    assert shown.startswith(f"vae-zh {PROJECT['version']}（torch ")  # 旁边没有课程的文件夹，就叫装好的命令


def test_the_sdist_holds_the_whole_course(tmp_path):
    with tarfile.open(built("sdist", tmp_path)) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("这里不是 git 的工作区，说不出课程有哪些文件")
    wanted = {name for name in listed.stdout.split() if name.startswith(("notebooks/", "photos/", "tests/", "tools/", "vaelab/")) or "/" not in name}
    assert wanted <= held and "uv.lock" not in held


def test_the_version_is_the_same_everywhere():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    latest = re.search(r"^## (\d\S+)（(\d{4}-\d\d-\d\d)）$", changes, re.MULTILINE)
    assert latest and latest[1] == PROJECT["version"]
    assert f"\nversion: {latest[1]}\n" in citation and f'\ndate-released: "{latest[2]}"\n' in citation
