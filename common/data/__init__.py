"""Data: reading a site's own file, splitting one file for simulation, and the generated demo data."""
