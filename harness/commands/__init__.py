"""eval.py's commands, and sampling.py's conversation."""
