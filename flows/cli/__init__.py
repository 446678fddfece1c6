"""The `nightly` command."""
