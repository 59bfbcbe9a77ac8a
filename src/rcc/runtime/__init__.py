"""What rcc needs of the system: files that appear whole, and folders that one process works in."""
