"""Running a federation over a network: certificates, keys, the SuperLink, and the run on it."""
