"""改错的工具（tools/mutate.py）：犯的是人会犯的错；看得见的算看得见，看不见的说得出来。"""

import os
import shutil
import subprocess
import sys

import nbformat
import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from mutate import explained, mutants, sections

LINUX = pytest.mark.skipif(not hasattr(os, "fork"), reason="要能 fork")


def kinds(source: str) -> dict[str, str]:
    return {what.split("：")[0]: what.split(" → ")[1].split("（")[0] for what, _ in mutants(source)}


@pytest.mark.parametrize(
    ("source", "kind", "became"),
    [
        ("kl = a - b", "正负号", "a + b"),
        ("kl = 0.5 * a", "系数大一倍", "1.0"),
        ("kl = 0.5 * a", "漏掉左边的因子", "a"),
        ("d = log_q(z) - log_p(z)", "漏掉右边一项", "log_q(z)"),
        ("k = kl_divergence(q, p)", "前两个参数对调", "kl_divergence(p, q)"),
        ("m = x.mean(0)", "维不对", "x.mean(1)"),
        ("m = x.sum(dim=1)", "维（或修正）不对", "dim=0"),
        ("h = torch.log(p)", "log 当成 log2", "torch.log2(p)"),
        ("s = x.std()", "std 当成 var", "x.var()"),
        ("f = loss.detach() * score", "漏掉 detach", "loss"),
        ("y = x[3]", "下标差一", "4"),
        ("for k in range(400):\n    check(k)", "循环一次不走", "range(0)"),
        ("v = sigma**2", "漏掉乘方", "sigma"),
        ("axes.plot(x, density)", "画的数差一倍", "axes.plot(x, density * 2)"),
    ],
)
def test_the_slips_a_person_would_make(source, kind, became):
    assert kinds(source)[kind] == became


def test_what_is_no_formula_is_left_alone():
    for source in (
        "torch.manual_seed(3 + 1)",
        "assert abs(a - b) < 2 * c",
        'axes.set(xlim=(0, 2 * n), title="a - b")',
        "compare('x', a, b, atol=2 * tiny)",
        "figure, axes = plt.subplots(figsize=(2 * w, 3))",
        'print(f"{a - b:.2f}")',
        "plot(x, color=colors[1])",
    ):
        assert not [what for what, _ in mutants(source) if "差一倍" not in what and "对调" not in what], source


def book(*cells: str) -> nbformat.NotebookNode:
    made = [nbformat.v4.new_markdown_cell(each[3:]) if each.startswith("md ") else nbformat.v4.new_code_cell(each) for each in cells]
    return nbformat.v4.new_notebook(cells=made)


def test_a_section_ends_at_the_next_second_level_heading():
    cells = book("md # 题", "a", "md ### 小节", "b", "md ## 二", "c").cells
    assert list(sections(cells)) == [[1, 3], [5]]


@LINUX
def test_what_no_cross_sees_is_listed_and_its_reason_accepted(tmp_path):
    """一格的公式由下一格核对，另一格没有核对；写了道理就收下，用不着的道理会说出来。"""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "tools/unseen").mkdir(parents=True)
    check = 'print("✓ 一半" if 2 * half == 3 else "✗ 一半")'
    shutil.copy(ROOT / "tools/mutate.py", tmp_path / "tools")
    nbformat.write(book("md # 题", "third = 3", "half = 0.5 * third", check, "md ## 二", "free = 4 - third"), tmp_path / "notebooks/98_try.ipynb")

    def run() -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, tmp_path / "tools/mutate.py", "98"], capture_output=True, text=True, encoding="utf-8", timeout=300)

    first = run()
    assert first.returncode == 1 and "看不见 [5] 正负号：4 - third → 4 + third" in first.stdout, first.stdout + first.stderr
    assert "[2]" not in first.stdout
    unseen = [line.split("] ", 1)[1] for line in first.stdout.splitlines() if line.startswith("看不见")]
    reasons = tmp_path / "tools/unseen/98.txt"
    reasons.write_text("# 等价：没有人用它\n\n" + "\n".join(unseen) + "\n", encoding="utf-8")
    second = run()
    assert second.returncode == 0 and "看得见 100.0%" in second.stdout, second.stdout
    reasons.write_text(reasons.read_text(encoding="utf-8") + "正负号：a - b → a + b\n", encoding="utf-8")
    assert run().returncode == 1


@pytest.mark.parametrize("path", sorted((ROOT / "tools/unseen").glob("*.txt")), ids=lambda path: path.stem)
def test_every_reason_is_for_a_slip_that_exists(path):
    """道理跟着笔记走：写着的每处改动，那一章里都有；每条都写了是等价还是其余。"""
    (notebook,) = (ROOT / "notebooks").glob(f"{path.stem}_*.ipynb")
    there = {what for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code" for what, _ in mutants(cell.source)}
    reasons = explained(path.stem)
    assert reasons and reasons.keys() <= there, sorted(reasons.keys() - there)[:5]
    assert all(reason.startswith(("等价：", "其余：")) and len(reason) > 6 for reason in reasons.values())
