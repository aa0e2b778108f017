"""The tests, a folder for each room; the contract of all methods is in test_adapter.py."""
