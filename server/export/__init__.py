"""Export a finished run to a folder that other programs load."""
