"""Three engines, one interface: each lends a Grid, on which the same loop sends the same messages to the same apps."""
