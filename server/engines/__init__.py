"""Three engines with one interface: each provides a grid, on which the same loop sends the same messages."""
