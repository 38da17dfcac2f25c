"""Plans of private runs, before anybody trains."""
