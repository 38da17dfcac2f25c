"""The client: the program of a site."""
