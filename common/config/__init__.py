"""One file describes a run."""
