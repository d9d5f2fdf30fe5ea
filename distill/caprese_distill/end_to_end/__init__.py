"""The end-to-end stage (eq. 8)."""
