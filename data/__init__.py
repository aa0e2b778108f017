"""What the methods are trained and tested on: problems, their prompts and scoring, batches."""
