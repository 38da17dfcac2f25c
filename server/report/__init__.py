"""The report of a run: its page, figures and tables."""
