"""What `trt-wan doctor` looks at: one function per topic, each returns checks. Nothing is compiled."""
