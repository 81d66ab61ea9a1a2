"""The folder in ComfyUI's custom_nodes: the nodes are in the package trt-wan."""

from trt_wan.comfyui.extension import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
