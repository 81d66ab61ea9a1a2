"""`python -m trt_wan` is the `trt-wan` command."""

from trt_wan.cli.main import main

main()
