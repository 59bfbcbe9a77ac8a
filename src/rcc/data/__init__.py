"""Texts and questions, for training and evaluation."""
