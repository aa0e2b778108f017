"""Base models and adapters in files, whatever their format."""
