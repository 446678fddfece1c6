"""What happened, in words and plots, where people look."""
