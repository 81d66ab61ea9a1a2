"""Segments compute one network on the GPU: TensorRT engines, attention libraries, native kernels."""
