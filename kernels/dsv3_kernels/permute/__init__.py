"""Rows to where their experts want them, and their sums back."""
