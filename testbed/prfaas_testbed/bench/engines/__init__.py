"""One file for each engine; what they have in common is in base.py and pools.py."""
