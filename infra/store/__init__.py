"""The artifact store: a directory or S3, where a key is created once and never overwritten."""
