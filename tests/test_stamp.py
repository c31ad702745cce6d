"""tools/stamp.py 与 vaelab/prepare.py：准备单元在 Colab 与各处都找得到课程；地址写进去又去得掉，其余一字不动。"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from stamp import BADGE, CELL, FOLDED, MARK, ROOT, StampError, cell, changes, clean_address, notebooks, pages

GITHUB = "https://github.com/someone/vae-zh"


# —— 准备单元：在真的进程里，用一个没有 site-packages 的 Python 运行 ——


def copy_course(target: Path) -> Path:
    """课程的一份拷贝：git 会带走的文件，没有 git 时是模块文件。"""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "--", "*.py"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.split() or ["vanilla_vae.py", "_type.py", "vaelab/__init__.py", "vaelab/prepare.py"]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture
def colab(tmp_path):
    """一台假的 Colab：空文件夹里只有一本笔记；google.colab 是替身，pip 是只记下参数的替身，别的包都没有。"""
    (tmp_path / "content").mkdir()
    (tmp_path / "content/lesson.ipynb").write_text("{}", encoding="utf-8")
    (tmp_path / "packages/google/colab").mkdir(parents=True)
    (tmp_path / "packages/google/colab/__init__.py").touch()
    (tmp_path / "packages/pip").mkdir()
    (tmp_path / "packages/pip/__init__.py").touch()
    record = "import pathlib, sys\npathlib.Path('pip.txt').write_text(' '.join(sys.argv[1:]))\n"
    (tmp_path / "packages/pip/__main__.py").write_text(record, encoding="utf-8")
    return tmp_path / "content"


def run_cell(
    cwd: Path, packages: Path | None = None, address: str = "", after: str = "", environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """运行准备单元，再打印找到的课程在哪里；给出 ``packages`` 就当作在 Colab 上。"""
    source = "import google.colab\n" * bool(packages) + cell(address)
    source += "\nimport vaelab, pathlib; print(pathlib.Path(vaelab.__file__).resolve().parent.parent)\n" + after
    usual = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}  # conftest.py 设了它
    usual |= {"PYTHONPATH": str(packages or ""), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-S", "-c", source]
    return subprocess.run(command, cwd=cwd, env=usual | (environment or {}), capture_output=True, text=True, encoding="utf-8")


def found_by(done: subprocess.CompletedProcess) -> Path:
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip().splitlines()[0])


@pytest.mark.skipif(shutil.which("git") is None, reason="没有 git")
def test_colab_clones_from_the_address_and_imports_the_course(colab, tmp_path):
    origin = copy_course(tmp_path / "vae-zh")
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-q", "-m", "course"]):
        subprocess.run(["git", *command], cwd=origin, check=True)
    after = f"sys.path += {[path for path in sys.path if path]!r}\nimport vanilla_vae, vaelab.check\nprint(vanilla_vae.__file__)"
    done = run_cell(colab, tmp_path / "packages", origin.as_posix(), after)
    assert found_by(done) == colab.resolve() / "vae-zh"
    assert Path(done.stdout.splitlines()[1]).resolve() == colab.resolve() / "vae-zh/vanilla_vae.py"
    again = run_cell(colab, tmp_path / "packages", "file:///nowhere")  # 第二次不再取
    assert found_by(again) == colab.resolve() / "vae-zh" and not again.stderr


@pytest.mark.parametrize("folder", ["", "vae-zh", "drive/MyDrive/vae-zh", "drive/MyDrive/Colab Notebooks/vae-zh"])
def test_colab_finds_a_course_that_is_already_there(colab, tmp_path, folder):
    course = copy_course(colab / folder)
    assert found_by(run_cell(colab, tmp_path / "packages")) == course.resolve()


@pytest.mark.parametrize("inside", ["", "vae-zh-main"])
def test_colab_unpacks_an_uploaded_course_and_no_other_archive(colab, tmp_path, inside):
    copy_course(tmp_path / "upload" / inside)
    shutil.make_archive(str(colab / "course"), "zip", tmp_path / "upload")
    (tmp_path / "faces").mkdir()
    (tmp_path / "faces/000001.jpg").touch()
    shutil.make_archive(str(colab / "celeba"), "zip", tmp_path / "faces")
    (colab / "half.zip").write_bytes((colab / "course.zip").read_bytes()[:1000])  # 还没有上传完
    assert found_by(run_cell(colab, tmp_path / "packages")) == (colab / inside).resolve()
    assert not (colab / "000001.jpg").exists()


def test_colab_installs_only_the_missing_font_package(colab, tmp_path):
    copy_course(colab / "vae-zh")
    found_by(run_cell(colab, tmp_path / "packages"))
    assert (colab / "pip.txt").read_text() == "install --quiet zhplot"
    (colab / "pip.txt").unlink()
    (tmp_path / "packages/zhplot.py").touch()
    found_by(run_cell(colab, tmp_path / "packages"))
    assert not (colab / "pip.txt").exists()


@pytest.mark.parametrize("address", ["", "file:///nowhere/vae-zh"])
def test_without_a_course_the_reader_sees_one_sentence(colab, tmp_path, address):
    done = run_cell(colab, tmp_path / "packages", address)
    assert done.returncode == 1 and "请上传课程的 zip 到" in done.stderr
    assert ("git clone" in done.stderr.splitlines()[-1]) == bool(address)


HIDE = """
import os, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path[:] = [place for place in sys.path if not os.path.exists(os.path.join(place, "vaelab"))]
os.environ.pop("GOMP_SPINCOUNT", None)
"""


def run_in_a_notebook(cwd: Path, *sources: str) -> list[list]:
    """在真的内核里依次运行各格，课程没有安装；返回各格的输出，到出错的一格为止。"""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in (HIDE, *sources)])
    with contextlib.suppress(CellExecutionError):
        NotebookClient(book, kernel_name="python3", resources={"metadata": {"path": str(cwd)}}).execute()
    return [each.outputs for each in book.cells[1:]]


def test_in_a_notebook_the_message_comes_without_a_traceback(tmp_path):
    ((output,),) = run_in_a_notebook(tmp_path, cell())
    assert output.output_type == "error" and len(output.traceback) == 1
    assert re.fullmatch(r"没有找到课程：请上传课程的 zip 到 \S+（Colab 以外请解压），再运行这一格。", output.traceback[0])


def test_in_a_notebook_running_it_again_after_fetching_the_course_works(tmp_path):
    copy_course(tmp_path / "fetched")
    (tmp_path / "work").mkdir()
    failing = f"try:\n{textwrap.indent(cell(), '    ')}\nexcept ImportError:\n    import shutil; shutil.move('../fetched', 'vae-zh')"
    where = "print(vaelab.prepare.__file__)"
    *_, (output,) = run_in_a_notebook(tmp_path / "work", failing, cell(), where)
    assert Path(output.text.strip()) == (tmp_path / "work/vae-zh/vaelab/prepare.py").resolve()


def test_in_a_notebook_it_says_nothing_and_may_run_twice(tmp_path):
    copy_course(tmp_path)
    (tmp_path / "notebooks").mkdir()
    assert run_in_a_notebook(tmp_path / "notebooks", cell(), cell(GITHUB)) == [[], []]


def test_the_threads_spin_less_before_torch_is_imported(tmp_path):
    copy_course(tmp_path)
    after = "import os, sys; print(os.environ['GOMP_SPINCOUNT'], sorted(sys.modules.keys() & {'torch', 'numpy', 'matplotlib'}))"
    for environment, expected in (({}, "10000 []"), ({"GOMP_SPINCOUNT": "7"}, "7 []")):
        done = run_cell(tmp_path, after=after, environment=environment)
        assert found_by(done) == tmp_path.resolve() and done.stdout.splitlines()[1:] == [expected]


def test_an_installed_course_needs_no_folder_nearby(tmp_path):
    course = copy_course(tmp_path / "site-packages")
    (tmp_path / "elsewhere").mkdir()
    done = run_cell(tmp_path / "elsewhere", environment={"PYTHONPATH": str(course)})
    assert found_by(done) == course.resolve() and not done.stderr


def test_the_folder_nearby_comes_before_the_installed_course(tmp_path):
    installed, nearby = (copy_course(tmp_path / name) for name in ("site-packages", "work/vae-zh"))
    assert found_by(run_cell(nearby, environment={"PYTHONPATH": str(installed)})) == nearby.resolve()


def test_elsewhere_an_archive_stays_as_it_is(tmp_path):
    shutil.make_archive(str(tmp_path / "work/course"), "zip", copy_course(tmp_path / "upload"))
    done = run_cell(tmp_path / "work", address="file:///nowhere")
    assert "请上传课程的 zip 到" in done.stderr and os.listdir(tmp_path / "work") == ["course.zip"]


def test_someone_elses_model_is_not_the_course(tmp_path):
    (tmp_path / "vaelab").mkdir()
    (tmp_path / "vaelab/__init__.py").touch()
    (tmp_path / "vanilla_vae.py").touch()
    assert "没有找到课程" in run_cell(tmp_path).stderr.splitlines()[-1]


def test_the_cell_is_short_and_starts_with_its_title():
    lines = CELL.splitlines()
    assert lines[0].startswith(MARK) and len(lines) <= 28 and max(map(len, lines)) <= 120


@pytest.mark.parametrize("folder", [".", "notebooks", "notebooks/solutions", "notebooks/a/b", ".."])
def test_elsewhere_it_is_idle_and_finds_the_clone_around(tmp_path, folder):
    course = copy_course(tmp_path / "work/vae-zh")
    (course / "notebooks/a/b").mkdir(parents=True)
    (course / "notebooks/solutions").mkdir()
    before = sorted(tmp_path.rglob("*"))
    done = run_cell((course / folder).resolve(), address=GITHUB)
    assert found_by(done) == course.resolve() and not done.stderr
    assert [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in path.parts] == before


# —— 写进地址 ——


@pytest.fixture
def tree(tmp_path):
    """笔记、README 与 tools/stamp.py 的一份拷贝，笔记已换上准备单元。"""
    for path in (*notebooks(), ROOT / "tools/stamp.py"):
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    readme = "# 课程\n\n<!-- 地址：开始 --><!-- 地址：结束 -->\n\n正文\n"
    (tmp_path / "README.md").write_text(readme, encoding="utf-8", newline="\n")
    stamp(tmp_path, "--refresh")
    return tmp_path


def stamp(tree: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-S", "tools/stamp.py", *arguments]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, encoding="utf-8")


def contents(tree: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (*notebooks(tree), tree / "README.md")}


@pytest.mark.parametrize("address", [GITHUB, "https://gitee.com/someone/vae-zh.git", "{tree}"])
def test_stamp_and_remove_are_exact_inverses(tree, address):
    address, before = address.format(tree=tree.as_posix()), contents(tree)
    assert stamp(tree, "--check").returncode == 0
    assert stamp(tree, address).returncode == 0
    once = contents(tree)
    assert stamp(tree, address + "/" * (address == GITHUB)).returncode == 0 and contents(tree) == once
    assert stamp(tree, "--refresh").returncode == 0 and contents(tree) == once
    assert address in stamp(tree, "--check").stdout
    on_github = address == GITHUB
    for path in notebooks(tree):
        book, old = (nbformat.reads(text[path].decode(), 4) for text in (once, before))
        first = next(each.source for each in book.cells if each.cell_type == "code")
        assert json.dumps(address) in first
        assert on_github == (f"{GITHUB[19:]}/blob/main/{path.relative_to(tree).as_posix()})" in book.cells[0].source)
        for new, was in zip(book.cells, old.cells, strict=True):
            assert new == was or new.source == first or BADGE.sub("", new.source) == was.source
            assert new.get("outputs") == was.get("outputs")
    readme = once[tree / "README.md"].decode()
    assert f"git clone {address}\n" in readme
    assert on_github == ("在线阅读：[https://someone.github.io/vae-zh/](https://someone.github.io/vae-zh/)" in readme)
    assert stamp(tree, "--remove").returncode == 0 and contents(tree) == before


def test_check_names_what_is_stale(tree):
    path = notebooks(tree)[0]
    path.write_text(path.read_text(encoding="utf-8").replace("import os, pathlib, subprocess", "import os, subprocess"), encoding="utf-8")
    done = stamp(tree, "--check")
    assert done.returncode == 1 and done.stdout.count("✗") == 1 and path.name in done.stdout
    assert stamp(tree, "--refresh").returncode == 0 and stamp(tree, "--check").returncode == 0


OLD_CELL = "# 准备：找到课程，让下面的 import 可用。\nADDRESS = {address}  # 课程的 git 地址\nimport importlib.util"


@pytest.mark.parametrize("address", ["", GITHUB])
def test_refresh_replaces_an_old_cell_folds_it_and_completes_the_metadata(tree, address):
    stamp(tree, address or "--remove")
    path, fresh = notebooks(tree)[3], contents(tree)
    book = nbformat.reads(fresh[path].decode(), 4)
    first = next(each for each in book.cells if each.cell_type == "code")
    first.source, first.metadata = OLD_CELL.format(address=json.dumps(address)), {}
    book.metadata.language_info = {"name": "python", "version": book.metadata.language_info.version}
    book.metadata.kernelspec.display_name = "别的名字"
    for each in notebooks(tree):
        each.write_text(nbformat.writes(book if each == path else nbformat.reads(fresh[each].decode(), 4)) + "\n", encoding="utf-8", newline="\n")
    assert path.name in stamp(tree, "--check").stdout
    assert stamp(tree, "--refresh").returncode == 0 and contents(tree) == fresh


def test_every_cell_is_folded_and_other_metadata_is_kept(tree):
    path = notebooks(tree)[0]
    text = path.read_text(encoding="utf-8")
    book = json.loads(text)
    assert book["cells"][1]["metadata"] == FOLDED
    book["cells"][1]["metadata"] = {"tags": ["mine"], "jupyter": {"source_hidden": False}}
    book["metadata"]["language_info"]["version"] = "3.99.0"
    path.write_text(json.dumps(book, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", newline="\n")
    assert stamp(tree, "--refresh").returncode == 0
    book = json.loads(path.read_text(encoding="utf-8"))
    assert book["cells"][1]["metadata"] == {**FOLDED, "tags": ["mine"]}
    assert book["metadata"]["language_info"]["version"] == "3.99.0"  # 执行它的 Python，不是写地址的 Python


def test_different_addresses_are_an_error_and_stamping_again_repairs_it(tree):
    first = notebooks(tree)[0].read_bytes()
    stamp(tree, GITHUB)
    notebooks(tree)[0].write_bytes(first)
    assert "地址不同" in stamp(tree, "--check").stderr
    assert stamp(tree, GITHUB).returncode == 0 and stamp(tree, "--check").returncode == 0


def test_a_notebook_without_the_cell_stops_before_anything_is_written(tree):
    last = notebooks(tree)[-1]
    last.write_text(last.read_text(encoding="utf-8").replace(MARK, "# @title 别的"), encoding="utf-8")
    before = contents(tree)
    done = stamp(tree, GITHUB)
    assert done.returncode == 2 and last.name in done.stderr and "Traceback" not in done.stderr
    assert contents(tree) == before


@pytest.mark.parametrize("given", ["github.com/someone/vae-zh", GITHUB + ".git", GITHUB + "/", "git@github.com:someone/vae-zh.git"])
def test_github_addresses_become_one_form(given):
    assert clean_address(given) == GITHUB


@pytest.mark.parametrize("bad", ["", "--help-me", "no such folder", "nowhere", 'https://a.b/"', "https://github.com/someone", GITHUB + "/tree/main"])
def test_other_addresses_are_refused_in_chinese(bad):
    with pytest.raises(StampError, match="不能用：.*。"):
        clean_address(bad)


def test_the_site_has_an_address_of_its_own(tree):
    before = contents(tree)
    assert stamp(tree, GITHUB, "https://read.example.org/vae").returncode == 0
    once = contents(tree)
    assert "在线阅读：[https://read.example.org/vae/](https://read.example.org/vae/)" in once[tree / "README.md"].decode()
    assert stamp(tree, "--refresh").returncode == 0 and contents(tree) == once  # 不退回缺省的
    assert not changes(GITHUB, tree)  # 没有说网站，就是 README 里现有的
    assert "https://read.example.org/vae/" in stamp(tree, "--check").stdout
    assert stamp(tree, "--remove").returncode == 0 and contents(tree) == before


@pytest.mark.parametrize("address, site", [
    (GITHUB, "https://someone.github.io/vae-zh/"),
    ("https://github.com/Someone/someone.github.io", "https://someone.github.io/"),
    ("https://gitee.com/someone/vae-zh", ""),
])  # fmt: skip
def test_github_pages_has_a_usual_address(address, site):
    assert pages(address) == site


@pytest.mark.parametrize("site", ["", "someone.github.io", "ftp://a.b/", "https://a.b/)", "https://a.b/x y", "javascript:alert(1)"])
def test_other_site_addresses_are_refused_before_anything_is_written(tree, site):
    before = contents(tree)
    done = stamp(tree, GITHUB, site)
    assert done.returncode == 2 and "网站的地址" in done.stderr and contents(tree) == before


def test_help_and_mistakes_are_in_chinese(tree):
    assert "用法" in stamp(tree, "--help").stdout
    for words in (["a", "b", "c"], [GITHUB, "--check"], ["--nonsense"]):
        done = stamp(tree, *words)
        assert done.returncode == 2 and done.stderr.startswith("错误：") and "Traceback" not in done.stderr


def test_the_first_chapter_sees_figures_that_do_not_show_and_fonts_that_cannot_be_kept(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "file" / "x"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "notebooks/00_start_here.ipynb", 4)
    last = next(index for index, each in enumerate(notebook.cells) if "环境齐备" in each.source)
    notebook.cells = notebook.cells[: last + 1]
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": ROOT / "notebooks"}}, allow_errors=True).execute()
    outputs = [output for each in notebook.cells for output in each.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    assert "✗ 图会显示出来：先运行 %matplotlib inline" in text and "✗ 字体表存得下来" in text and "MPLCONFIGDIR 设为" in text
    assert "temporary cache" not in text and "mkdir" not in text  # matplotlib 的英文
    assert "还有 2 项没有通过：图会显示出来、字体表存得下来" in outputs[-1].evalue
