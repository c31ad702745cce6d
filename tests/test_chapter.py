"""tools/chapter.py：由模板造出的一章，照说明走一遍就通过测试；草稿与笔记来回不走样。"""

import json
import os
import shutil
import subprocess
import sys

import nbformat
import pytest

from conftest import ROOT

jupytext = pytest.importorskip("jupytext", reason="只装了 lab 与 tests 两组，没有写新章的工具")
pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="没有 git，数不出仓库里有哪些文件")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """仓库的一份拷贝。"""
    folder = tmp_path_factory.mktemp("course")
    listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, text=True, encoding="utf-8")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def chapter(folder, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "tools/chapter.py", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8")


def test_a_new_chapter_passes_the_tests_as_it_is(copy):
    """照 CONTRIBUTING.md：new、build、test；再转成草稿造回来，逐字节相同；改错一个公式就存不下，原来的照旧。"""
    for command in (("new", "99", "made_up", "造出来的一章"), ("build", "99"), ("test", "99")):
        done = chapter(copy, *command)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "第 99 章通过" in done.stdout
    paths = [copy / "notebooks/99_made_up.ipynb", copy / "notebooks/solutions/99_made_up.ipynb"]
    first = [path.read_bytes() for path in paths]
    for path in paths:
        path.with_suffix(".py").unlink()
    for command in ("draft", "build"):
        assert chapter(copy, command, "99").returncode == 0
    assert [path.read_bytes() for path in paths] == first

    draft = paths[0].with_suffix(".py")
    draft.write_text(draft.read_text(encoding="utf-8").replace("0.5 * distance**2", "0.6 * distance**2"), encoding="utf-8")
    broken = chapter(copy, "build", "99")
    assert broken.returncode == 2 and "✗ 式(99.1)" in broken.stderr and "原来的照旧" in broken.stderr
    assert paths[0].read_bytes() == first[0]
    assert chapter(copy, "draft", "99").returncode == 2 and "0.6 * distance" in draft.read_text(encoding="utf-8")  # 不盖掉改过的草稿


def test_mistakes_are_named(copy):
    for command, complaint in (
        (("new", "5", "kl", "KL"), "应写成 new 15 normalizing_flows 归一化流"),
        (("new", "05", "kl", "KL"), "已经有"),
        (("build", "77"), "没有第 77 章的 .py 文件"),
        (("draft", "77"), "没有第 77 章的 .ipynb 文件"),
        (("造",), "不认得 造"),
    ):
        done = chapter(copy, *command)
        assert done.returncode == 2 and complaint in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("number", ["01", "11"])
def test_drafts_keep_every_cell_and_tag(copy, number):
    (path,) = (copy / "notebooks").glob(f"{number}_*.ipynb")
    assert chapter(copy, "draft", number).returncode == 0
    book = nbformat.reads(json.dumps(json.loads(path.read_text(encoding="utf-8"))), 4)
    back = jupytext.reads(path.with_suffix(".py").read_text(encoding="utf-8"), fmt="py:percent")
    kept = [(a.source, a.metadata.get("tags")) == (b.source, b.metadata.get("tags")) for a, b in zip(book.cells, back.cells)]
    assert len(book.cells) == len(back.cells) and [index for index, same in enumerate(kept) if not same] == [1]  # 只有准备单元
