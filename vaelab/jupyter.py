"""JupyterLab 打开课程的笔记、什么也没改，就不该显示“已改动”。随课程装进环境，由 Jupyter 的服务器载入（pyproject.toml 的 shared-data）。

内核一启动，JupyterLab 就把它报告的 language_info（含 Python 的版本号）写进笔记，与存着的不同便算改动过，两分钟后还会自动存盘。
笔记存着执行它的那个版本，读者的版本多半不同。所以读出课程的笔记时先换上读者的版本；文件不变，存盘时才写进去。
"""

from __future__ import annotations

import sys
from typing import Any


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": "vaelab.jupyter"}]


def _load_jupyter_server_extension(server: Any) -> None:
    contents = server.contents_manager
    usual = contents.mark_trusted_cells

    def mark_trusted_cells(notebook: dict, path: str = "") -> None:
        """每次读出笔记时调用，签名在换版本号之前核对。"""
        usual(notebook, path)
        use_this_python(notebook)

    contents.mark_trusted_cells = mark_trusted_cells


def use_this_python(notebook: dict) -> None:
    """用到 vaelab 的 Python 笔记，版本号换成这里的；别的笔记不动。"""
    metadata = notebook.get("metadata", {})
    language = metadata.get("language_info", {})
    ours = metadata.get("kernelspec", {}).get("name") == "python3" and language.get("name") == "python"
    if ours and "version" in language and any("import vaelab" in each["source"] for each in notebook["cells"]):
        language["version"] = sys.version.split()[0]
