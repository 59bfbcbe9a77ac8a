"""What a model costs, before its weights are here."""
