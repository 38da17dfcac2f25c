"""The resident client and its link to the server."""
