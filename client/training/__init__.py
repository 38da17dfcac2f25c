"""Training at a site."""
