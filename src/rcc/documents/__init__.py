"""What people have → plain text, a reader a format."""
