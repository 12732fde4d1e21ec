"""What does the first quarter of an hour on a GPU have to show? `make gpu STAGE=first`, the most valuable part first.

`stage.py` runs the parts, each a process with a limit of its own, and keeps what they report; `table.py` prints it.
"""
