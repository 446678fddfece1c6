"""What is tuned, and what a value may be."""
