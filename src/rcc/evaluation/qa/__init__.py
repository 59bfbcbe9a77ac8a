"""Questions of compressed contexts, beside what a user might do instead."""
