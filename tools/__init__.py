"""Commands beside the two scripts: python -m tools.NAME --help."""
