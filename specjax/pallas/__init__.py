"""The ops: one folder each, defined by `reference.py`, called through `api.py`."""
