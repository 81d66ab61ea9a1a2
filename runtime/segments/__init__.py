"""Segments compute one network each on the GPU: TensorRT engines, attention libraries, native kernels."""
