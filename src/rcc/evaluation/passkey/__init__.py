"""The paper's passkey test."""
