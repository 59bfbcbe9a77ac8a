"""The encoder, the two prefixes and the decoder: a text's tokens become a KV cache."""
