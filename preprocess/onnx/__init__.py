"""Networks from users' ONNX files, on ONNX Runtime or as TensorRT engines."""
