"""找到课程之后的准备：每本笔记的第一格 import 它，import 就是运行。须在 import torch 之前，所以这里不 import torch。"""

import importlib.util
import os
import subprocess
import sys

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # 别的程序在忙时，torch 的线程少空转

if "google.colab" in sys.modules and importlib.util.find_spec("zhplot") is None:  # Colab 只缺这一个包：中文字体
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "zhplot"], check=True)
