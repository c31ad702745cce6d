"""测速，一个问题一个文件；``python -m vaelab.bench`` 运行，记录在 ``vaelab/records/``。"""
