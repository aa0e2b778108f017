"""What train.py and eval.py need beside their own text."""
