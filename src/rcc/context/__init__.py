"""The compressed context: a KV cache with its description, in memory and in a file."""
