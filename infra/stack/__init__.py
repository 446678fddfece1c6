"""The local stack: its services, and how they are started, found and stopped."""
