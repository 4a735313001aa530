"""What is shown: figures, the report, one prompt's story, the model card."""
