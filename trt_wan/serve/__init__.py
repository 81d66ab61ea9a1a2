"""`trt-wan serve`: jobs over HTTP, in the order in which they came, on a model that stays open."""
