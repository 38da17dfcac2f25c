"""What it takes to run a federation over a network: certificates, keys, the SuperLink, the run on it."""
