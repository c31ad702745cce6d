"""在全新的内核里运行笔记，把输出存回去；命令是 ``python tools/chapter.py run``。

存下的文件只有 kernelspec 与 language_info 两样元数据，与 JupyterLab 打开时写的一样；出错、往 stderr 写字的笔记不存，说出是哪一格。
"""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from stamp import KERNELSPEC, write


def execute(path: Path) -> list[str]:
    """运行一本笔记并存好；返回不能存的原因，没有就是空的。"""
    book = nbformat.read(path, 4)
    for each in book.cells:
        if each.cell_type == "code":
            each.outputs, each.execution_count = [], None
            each.metadata.pop("execution", None)
    client = NotebookClient(book, timeout=600, kernel_name="python3", record_timing=False, resources={"metadata": {"path": path.parent}})
    try:
        client.execute()
    except CellExecutionError as error:
        return [f"运行时出错：{error}"]
    except (CellTimeoutError, DeadKernelError) as error:
        return [f"没有运行完：{type(error).__name__}：{error}"]
    failed = [
        index
        for index, each in enumerate(book.cells)
        for output in each.get("outputs", [])
        if output.output_type == "error" and "raises-exception" not in each.metadata.get("tags", [])
    ]
    if failed:  # 显示结果时出的错，不会让这一格停下
        return [f"第 {index} 格显示时出错" for index in failed]
    noisy = [index for index, each in enumerate(book.cells) for output in each.get("outputs", []) if output.get("name") == "stderr"]
    if noisy:
        return [
            f"第 {index} 格往 stderr 写了：{''.join(o['text'] for o in book.cells[index].outputs if o.get('name') == 'stderr')}" for index in noisy
        ]
    for each in book.cells:
        if each.cell_type == "code":
            each.outputs = joined(each.outputs)
    book.metadata = nbformat.from_dict({"kernelspec": KERNELSPEC, "language_info": book.metadata.language_info})  # 后者由内核自己报告
    text = nbformat.writes(book, version=nbformat.NO_CONVERT)
    write(path, text if text.endswith("\n") else text + "\n")
    return []


def joined(outputs: list) -> list:
    """相连的几段 stdout 并成一段：内核分几次送出，看当时的忙闲。"""
    result: list = []
    for output in outputs:
        if result and output.output_type == result[-1].output_type == "stream" and output.name == result[-1].name:
            result[-1].text += output.text
        else:
            result.append(output)
    return result
