"""Memory and time by length."""
