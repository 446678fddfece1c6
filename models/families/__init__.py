"""The networks that come with us, and a user's own class."""
