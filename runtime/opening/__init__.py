"""From settings to a model that runs: engines, candidates, memory, each choice with its reason."""
