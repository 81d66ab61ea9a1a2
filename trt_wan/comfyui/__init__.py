"""Nodes for ComfyUI. The model is in a separate process, so neither program's torch and CUDA context meets
the other's; frames travel through shared memory.

The nodes run in ComfyUI and import numpy alone. child.py is the other process, process.py ComfyUI's side of
it. pack/ is the folder that `trt-wan comfyui install` writes into custom_nodes.
"""
