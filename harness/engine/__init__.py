"""What stands below sampling.py and dpo.py, and imports nothing else of the project."""
