"""Several GPUs of one machine: a process for each, which all compute the same job in step."""
