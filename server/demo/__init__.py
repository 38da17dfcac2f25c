"""The demo: generated contract clauses of four companies."""
