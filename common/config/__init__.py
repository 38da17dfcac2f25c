"""The configuration of a run: its settings, their rules, and the files that hold them."""
