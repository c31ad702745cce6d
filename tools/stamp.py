"""每本笔记的第一个代码单元（准备单元）、整本的元数据，以及把仓库地址写进去的命令。

用法：
  python tools/stamp.py 地址        把仓库地址写进所有笔记与 README；地址在 GitHub 上时再加“在 Colab 打开”的徽章，与网站的地址
  python tools/stamp.py 地址 网址   网站（tools/build_site.py 造的）不在 GitHub Pages 的缺省地址时，写明它
  python tools/stamp.py --remove    去掉地址与徽章，文件回到写入之前的样子
  python tools/stamp.py --refresh   单元的模板改过之后，把新的单元写进所有笔记，地址不变
  python tools/stamp.py --check     检查每本笔记的单元、元数据、地址与徽章是否一致；不一致时退出码为 1

地址可以是 https://github.com/某人/某仓库，也可以是 git clone 认得的其他地址或本机的文件夹。
网站的地址只写在 README 里，缺省是 https://某人.github.io/某仓库/。
README 里的地址写在 <!-- 地址：开始 --> 与 <!-- 地址：结束 --> 之间；没有这两个标记时不改 README。"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARK = "# @title 准备：找到课程"  # 单元以它开头；# @title 是 Colab 折起代码之后显示的标题
OLD_OR_NEW = re.compile(r"# ?(@title)? ?准备：找到课程")  # 更换时凭它找到旧的单元
NO_ADDRESS = 'ADDRESS = ""'

# 这里只做找到课程之前必须做的事，其余的在 vaelab/prepare.py。凭那个文件认出课程；vanilla_vae.py 这个名字在别人的仓库里也有。
# 云端硬盘只看两层：逐个文件夹翻找一个大的硬盘要几分钟。
CELL = """\
# @title 准备：找到课程，让下面的 import 可用
import os, pathlib, subprocess, sys, zipfile  # noqa: E401, I001

ADDRESS = ""  # 课程的 git 地址
here = pathlib.Path.cwd()


def find_course():
    places = [here, *here.parents, *here.glob("*"), *here.glob("drive/MyDrive/*"), *here.glob("drive/MyDrive/*/*")]
    return [str(place) for place in places if os.path.isfile(place / "vaelab/prepare.py")][:1]


if "google.colab" in sys.modules and not find_course():  # 只在 Colab 上取来课程，在别处什么也不改动
    for archive in map(zipfile.ZipFile, filter(zipfile.is_zipfile, here.glob("*.zip"))):
        if "vaelab/prepare.py" in " ".join(archive.namelist()):
            archive.extractall()
    if ADDRESS and not find_course():
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", ADDRESS])
sys.path[:0] = find_course()
try:
    import vaelab.prepare  # noqa: F401
except ImportError as error:
    clone = ADDRESS and f"，或在那里运行 git clone {ADDRESS}"
    error.msg = f"没有找到课程：请上传课程的 zip 到 {here}（Colab 以外请解压）{clone}，再运行这一格。"
    error._render_traceback_ = [error.msg].copy  # 只显示这一句话，不显示回溯
    raise"""
FOLDED = {"cellView": "form", "jupyter": {"source_hidden": True}}  # 折起：前一项给 Colab，后一项给 JupyterLab

# JupyterLab 在内核启动时写进笔记的两项元数据，取自 kernelspec 与 ipykernel。存着的与它写的完全相同（包括版本号），打开的笔记才不算改动过；
# 读者的 Python 是别的版本时，由 vaelab/jupyter.py 换上。
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE_INFO = {
    "codemirror_mode": {"name": "ipython", "version": 3},
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "nbconvert_exporter": "python",
    "pygments_lexer": "ipython3",
    "version": sys.version.split()[0],
}

COLAB = "https://colab.research.google.com"
BADGE = re.compile(rf"\n\n\[!\[[^\]]*\]\({re.escape(COLAB)}/assets/[^)]*\)\]\([^)]*\)")
README_BLOCK = re.compile(r"(<!-- 地址：开始 -->).*?(<!-- 地址：结束 -->)", re.DOTALL)


class StampError(Exception):
    """地址或笔记不合要求；信息给人看。"""


def cell(address: str = "") -> str:
    """准备单元的源码；``address`` 为空就是没有地址的样子。"""
    return CELL.replace(NO_ADDRESS, f"ADDRESS = {json.dumps(address, ensure_ascii=False)}")


def badge(address: str, notebook: str) -> str:
    """“在 Colab 打开”的徽章（前面带一个空行）；地址不在 GitHub 上时为空。``notebook`` 是相对仓库根的路径。"""
    if not address.startswith("https://github.com/"):
        return ""
    repository = address.removeprefix("https://github.com/")
    return f"\n\n[![在 Colab 打开]({COLAB}/assets/colab-badge.svg)]({COLAB}/github/{repository}/blob/main/{notebook})"


def clean_address(address: str) -> str:
    """检查地址；GitHub 的地址统一成 ``https://github.com/某人/某仓库``。

    Raises:
        StampError: 地址里有空白或引号、以 ``-`` 开头，或 GitHub 的地址不是“某人/某仓库”两段。
    """
    if not address or address.startswith("-") or re.search(r"[\s\"'`<>()]", address):
        raise StampError(f"地址 {address!r} 不能用：应是一个不含空白、引号与括号的 git 地址。")
    if "github.com" in address:
        prefix = r"(?:(?:https?://)?(?:www\.)?github\.com/|git@github\.com:)"
        found = re.fullmatch(prefix + r"([\w.-]+)/([\w.-]+?)(?:\.git)?/?", address)
        if not found:
            raise StampError(f"地址 {address!r} 不能用：GitHub 的地址应写成 https://github.com/某人/某仓库，后面不带别的路径。")
        return f"https://github.com/{found[1]}/{found[2]}"
    if not re.match(r"\w+://|[\w.-]+@[\w.-]+:", address) and not Path(address).is_dir():
        raise StampError(f"地址 {address!r} 不能用：它既不是网址，也不是本机的文件夹。")
    return address


def clean_site(site: str) -> str:
    """检查网站的地址，末尾总带 ``/``。

    Raises:
        StampError: 不是 http 或 https 的网址，或里面有空白、引号、括号。
    """
    if not re.fullmatch(r"https?://[\w.-]+(:\d+)?(/[^\s\"'`<>()]*)?", site):
        raise StampError(f"网站的地址 {site!r} 不能用：应是 https:// 开头、不含空白、引号与括号的网址。")
    return site.rstrip("/") + "/"


def pages(address: str) -> str:
    """GitHub Pages 的缺省地址；仓库不在 GitHub 上时为空。"""
    found = re.fullmatch(r"https://github\.com/([\w.-]+)/([\w.-]+)", address)
    if not found:
        return ""
    owner, name = found[1].lower(), found[2]
    return f"https://{owner}.github.io/" + ("" if name.lower() == f"{owner}.github.io" else f"{name}/")


def notebooks(root: Path = ROOT) -> list[Path]:
    """课程的全部笔记，含解答。"""
    return sorted((root / "notebooks").glob("*.ipynb")) + sorted((root / "notebooks/solutions").glob("*.ipynb"))


def stamped(path: Path, address: str, root: Path = ROOT) -> str:
    """笔记 ``path`` 换上准备单元、徽章与元数据之后的全文；其余内容（含输出）逐字不变。"""
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    code = [each for each in notebook["cells"] if each["cell_type"] == "code" and OLD_OR_NEW.match("".join(each["source"]))]
    if len(code) != 1:
        raise StampError(f"{path.name} 里以“{MARK}”开头的单元应恰有一个，找到 {len(code)} 个。")
    code[0]["source"], code[0]["outputs"] = cell(address).splitlines(keepends=True), []
    code[0]["metadata"] = dict(sorted({**code[0]["metadata"], **FOLDED}.items()))
    language = {**LANGUAGE_INFO, **notebook["metadata"].get("language_info", {})}
    notebook["metadata"] = {**notebook["metadata"], "kernelspec": KERNELSPEC, "language_info": dict(sorted(language.items()))}
    title = next(each for each in notebook["cells"] if each["cell_type"] == "markdown")
    first, *rest = BADGE.sub("", "".join(title["source"])).split("\n", 1)
    first += badge(address, path.relative_to(root).as_posix())
    title["source"] = "\n".join([first, *rest]).splitlines(keepends=True)
    return json.dumps(notebook, ensure_ascii=False, indent=1) + "\n" * text.endswith("\n")


def stamped_readme(text: str, address: str, site: str = "") -> str:
    """README 换上地址之后的全文。"""
    online = f"\n\n在线阅读：[{site}]({site})" if site else ""
    block = f"{badge(address, 'notebooks/00_start_here.ipynb')}{online}\n\n```bash\ngit clone {address}\n```\n\n" if address else ""
    return README_BLOCK.sub(lambda found: found[1] + block + found[2], text)


def current_address(root: Path = ROOT) -> str:
    """笔记里现有的地址，没有则为空；还没有换上准备单元的笔记不算。

    Raises:
        StampError: 各笔记的地址不同。
    """
    found = {
        json.loads(line.split("  #")[0].removeprefix("ADDRESS = "))
        for path in notebooks(root)
        for each in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if OLD_OR_NEW.match("".join(each["source"]))
        for line in each["source"]
        if line.startswith("ADDRESS = ")
    }
    if len(found) > 1:
        raise StampError(f"各笔记里的地址不同（{'、'.join(map(repr, sorted(found)))}）；请用“python tools/stamp.py 地址”重写一遍。")
    return found.pop() if found else ""


def current_site(root: Path = ROOT) -> str:
    """README 里现有的网站地址，没有则为空。"""
    readme = root / "README.md"
    block = README_BLOCK.search(readme.read_text(encoding="utf-8")) if readme.is_file() else None
    found = re.search(r"^在线阅读：\[([^\]]*)\]", block[0], re.MULTILINE) if block else None
    return found[1] if found else ""


def changes(address: str, root: Path = ROOT, site: str | None = None) -> dict[Path, str]:
    """写上 ``address`` 与 ``site``（不给就是 README 里现有的）之后内容会变的文件与它们的新全文；为空就是全都一致。"""
    site = current_site(root) if site is None else site
    texts = {path: stamped(path, address, root) for path in notebooks(root)}
    readme = root / "README.md"
    if readme.is_file():
        texts[readme] = stamped_readme(readme.read_text(encoding="utf-8"), address, site)
    return {path: text for path, text in texts.items() if text != path.read_text(encoding="utf-8")}


def _said(address: str, site: str) -> str:
    return f"地址：{address or '（没有）'}，网站：{site or '（没有）'}"


def _write_all(address: str, site: str, root: Path) -> None:
    texts = changes(address, root, site)
    for path, text in texts.items():
        write(path, text)
    print(f"改动 {len(texts)} 个文件，{_said(address, site)}")


def write(path: Path, text: str) -> None:
    """UTF-8，换行总是 LF，在 Windows 上也是。"""
    path.write_bytes(text.encode("utf-8"))


def speak_utf8() -> None:
    """Windows 的终端未必默认 UTF-8。"""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """命令行；返回退出码。"""
    speak_utf8()
    try:
        match list(sys.argv[1:] if arguments is None else arguments):
            case [] | ["-h" | "--help"]:
                print(__doc__)
            case ["--check"]:
                address = current_address(root)
                stale = changes(address, root)
                for path in stale:
                    print(f"✗ {path.relative_to(root)} 不一致；请运行 python tools/stamp.py --refresh。")
                if stale:
                    return 1
                print(f"✓ {len(notebooks(root))} 本笔记一致，{_said(address, current_site(root))}")
            case ["--remove"]:
                _write_all("", "", root)
            case ["--refresh"]:
                _write_all(current_address(root), current_site(root), root)
            case [argument]:
                address = clean_address(argument)
                _write_all(address, pages(address), root)
            case [argument, site] if not site.startswith("-"):
                _write_all(clean_address(argument), clean_site(site), root)
            case many:
                raise StampError(f"只认得“地址”或“地址 网址”，收到 {len(many)} 个参数；加 --help 看用法。")
    except StampError as error:
        print(f"错误：{error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
