"""How much of a text its compressed context gives back."""
