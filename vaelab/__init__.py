"""课程笔记引用的工具：数据、训练、评估、作图、核对与命令行。引用方向：notebooks → vaelab → vanilla_vae → _type。"""
