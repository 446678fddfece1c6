"""The order of things: the night, and the command line that starts it. No logic."""
