"""A process that runs commands of trt-wan one after another, on a model that stays open."""
