"""Other software that asks compressed contexts."""
