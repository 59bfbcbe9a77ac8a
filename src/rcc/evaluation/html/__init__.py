"""The page that shows evaluations beside one another."""
