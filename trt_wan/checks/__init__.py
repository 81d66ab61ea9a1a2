"""The checks of `trt-wan doctor`: one function per topic. Nothing is compiled."""
