"""The networks as the pipeline calls them: inputs in, outputs out, no files and no GPU."""
