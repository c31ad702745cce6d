"""找到课程之后的准备：每本笔记的第一格 import 它，import 就是运行。须在 import torch 之前，所以这里不 import torch。"""

import importlib.util
import logging
import os
import subprocess
import sys

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # 别的程序在忙时，torch 的线程少空转

font_cache_is_writable = True  # 第 00 章的检查看它


def _listen(record: logging.LogRecord) -> bool:
    """matplotlib 存字体表的文件夹不能写时，在 stderr 上说两段英文，改用临时的；记下来，检查时用中文说。"""
    global font_cache_is_writable
    told = str(record.msg)
    about_the_folder = "MPLCONFIGDIR" in told or told.startswith("mkdir")
    font_cache_is_writable = font_cache_is_writable and not about_the_folder
    return not about_the_folder


logging.getLogger("matplotlib").addFilter(_listen)

if "google.colab" in sys.modules and importlib.util.find_spec("zhplot") is None:  # Colab 只缺这一个包：中文字体
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "zhplot"], check=True)
