"""The Python front: `trt_wan.AnimatePipeline`."""
