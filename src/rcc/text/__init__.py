"""Tokens, prompts and the numbers that people write."""
