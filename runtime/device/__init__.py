"""One GPU: its memory, streams and small kernels, on cuda.core. Nothing here knows a model or TensorRT."""
