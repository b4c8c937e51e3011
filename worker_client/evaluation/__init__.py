"""How good a model is: loss on rows, tasks answered by choosing an option, summaries. A task is a registry entry."""
