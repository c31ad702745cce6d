"""房子：引用只往一个方向；读者要学的文件短；每一章有解答、练习、README 的一行，术语各有出处。"""

import ast
import json
import re
from pathlib import Path

import pytest

from conftest import ROOT
from vaelab.exercises.judging import all_checks

# 由低到高：只可以引用排在前面的
ORDER = [
    "_type", "vanilla_vae", "parser",
    "config", "files", "images", "faces", "decode", "cache", "pictures", "data", "processes", "evaluate", "steplog", "checkpoint",
    "bugs", "packing", "inside", "sandbox", "grading",
    "step", "memory", "graph", "plan", "transfer", "stepper", "interrupts", "watch", "train",
    "exercises.judging", "exercises", "check", "provenance", "plot", "records", "bench", "prior", "lab", "export",
    "choose", "arguments", "runs", "using", "cli",
]  # fmt: skip
FREE = {"prepare", "growing", "jupyter"}  # 笔记与 Jupyter 用的，谁也不引用它们，它们也不引用别的房间


def room(path: Path) -> str:
    """文件所在的房间；一个文件夹是一个房间，``exercises/judging.py`` 除外。"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "vaelab" else parts
    return "exercises.judging" if parts[-1] == "judging" else parts[0]


def imported(tree: ast.AST) -> set[str]:
    """引用了哪些房间，函数里面的也算。"""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError("引用写全名，不写相对的")
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "vaelab" else [f"vaelab.{each.name}" for each in node.names]
        elif isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        else:
            continue
        for name in names:
            if name == "vaelab.exercises.judging":
                found.add("exercises.judging")
            elif name.startswith("vaelab."):
                found.add(name.split(".")[1])
            elif name in ("vanilla_vae", "_type"):
                found.add(name)
    return found


def packages(tree: ast.AST) -> set[str]:
    """引用的全部模块的名字。"""
    found = {each.name for node in ast.walk(tree) if isinstance(node, ast.Import) for each in node.names}
    return found | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


def modules() -> list[Path]:
    rooms = sorted((ROOT / "vaelab").rglob("*.py"))
    return [ROOT / "_type.py", ROOT / "vanilla_vae.py", *(path for path in rooms if path != ROOT / "vaelab/__init__.py")]


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_one_way(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path.name == "vanilla_vae.py":  # 只在 __main__ 里碰命令行
        tree.body = [node for node in tree.body if "__main__" not in ast.unparse(node).split("\n")[0]]
    here = room(path)
    if here in FREE:
        assert not imported(tree) and "torch" not in {name.split(".")[0] for name in packages(tree)}
        return
    lower = set(ORDER[: ORDER.index(here) + (here in ("exercises", "bench", "bugs"))])
    assert imported(tree) <= lower, f"{here} 只可以引用 {sorted(lower)}"


def test_a_wrong_direction_is_seen():
    assert imported(ast.parse("def f():\n from vaelab import cli, images\n import vaelab.train\nfrom vanilla_vae import x")) == {
        "cli", "images", "train", "vanilla_vae",
    }  # fmt: skip


def test_what_a_reader_studies_is_short_and_comes_first():
    lines = (ROOT / "vanilla_vae.py").read_text(encoding="utf-8").splitlines()
    definitions = [node.name for node in ast.parse("\n".join(lines)).body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    assert len(lines) <= 260 and definitions[0] == "VanillaVAE"
    assert len((ROOT / "vaelab/train.py").read_text(encoding="utf-8").splitlines()) <= 150


def chapters() -> dict[str, Path]:
    return {path.name[:2]: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}


def test_readme_notebooks_solutions_and_exercises_belong_together():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| \[(\d\d) [^\]]+\]\((notebooks/[^)]+)\) \|", readme, re.MULTILINE))
    assert rows == {number: path.relative_to(ROOT).as_posix() for number, path in chapters().items()}
    solutions = {path.name for path in (ROOT / "notebooks/solutions").glob("*.ipynb")}
    assert solutions == {path.name for path in chapters().values()}
    checkers = {path.stem[2:] for path in (ROOT / "vaelab/exercises").glob("ch*.py")}
    assert checkers == set(chapters())
    assert {int(each.split(".")[0]) for each in all_checks()} == {int(number) for number in chapters()}
    for number, path in chapters().items():
        title = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]).split("\n")[0]
        assert re.match(rf"# {number} ", title)


def test_every_term_is_used_in_the_chapter_that_explains_it():
    page = (ROOT / "notebooks/glossary.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| \[(\d\d)\]\(([^)]+)\) \|$", page, re.MULTILINE)
    assert len(rows) == sum(line.startswith("| ") for line in page.splitlines()) - 1 and len({term for term, *_ in rows}) == len(rows)
    for term, english, meaning, number, link in rows:
        assert chapters()[number].name == link and re.search("[A-Za-z]", english) and len(meaning) > 4
        text = "".join("".join(cell["source"]) for cell in json.loads(chapters()[number].read_text("utf-8"))["cells"])
        assert any(part in text for part in re.split("[（）]", term) if part), term
