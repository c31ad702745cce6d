"""vaelab/jupyter.py：打开课程的笔记，版本号换成读者的；文件与别的笔记不动。"""

import asyncio
import copy
import json
import sys
from types import SimpleNamespace

import nbformat
import pytest
from stamp import KERNELSPEC, LANGUAGE_INFO, cell

from conftest import ROOT
from vaelab import jupyter

manager = pytest.importorskip("jupyter_server.services.contents.largefilemanager")
THIS = sys.version.split()[0]


def notebook(source: str, **changed) -> nbformat.NotebookNode:
    metadata = {"kernelspec": KERNELSPEC, "language_info": {**LANGUAGE_INFO, "version": "3.99.0"}, **changed}
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)], metadata=copy.deepcopy(metadata))


@pytest.mark.parametrize("kind", ["LargeFileManager", "AsyncLargeFileManager"])
def test_the_server_hands_out_the_readers_version_and_leaves_the_file(tmp_path, kind):
    path = tmp_path / "lesson.ipynb"
    path.write_text(nbformat.writes(notebook(cell())), encoding="utf-8")
    before = path.read_bytes()
    contents = getattr(manager, kind)(root_dir=str(tmp_path))
    jupyter._load_jupyter_server_extension(SimpleNamespace(contents_manager=contents))
    found = contents.get("lesson.ipynb")
    read = (asyncio.run(found) if asyncio.iscoroutine(found) else found)["content"]
    assert read.metadata.language_info == {**LANGUAGE_INFO, "version": THIS}
    read.metadata.language_info.version = "3.99.0"
    assert read == nbformat.reads(before.decode(), 4) | {"cells": read.cells}  # 单元只多了 trusted
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "book",
    [
        notebook("import numpy"),
        notebook(cell(), kernelspec={"name": "julia-1.10", "display_name": "Julia"}),
        notebook(cell(), language_info={"name": "python"}),
        nbformat.v4.new_notebook(),
    ],
    ids=["不用 vaelab", "别的内核", "没有版本号", "空的"],
)
def test_other_notebooks_are_left_alone(book):
    before = copy.deepcopy(book)
    jupyter.use_this_python(book)
    assert book == before


def test_the_version_is_the_one_the_kernel_reports():
    kernel = pytest.importorskip("ipykernel.ipkernel").IPythonKernel
    assert kernel.language_info == LANGUAGE_INFO


def test_installing_the_course_enables_the_extension():
    enabled = json.loads((ROOT / "vaelab/jupyter.json").read_text(encoding="utf-8"))["ServerApp"]["jpserver_extensions"]
    (point,) = jupyter._jupyter_server_extension_points()
    assert enabled == {point["module"]: True} and point["module"] == jupyter.__name__
    target = '"vaelab/jupyter.json" = "etc/jupyter/jupyter_server_config.d/vaelab.json"'
    assert target in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
