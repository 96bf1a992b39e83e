"""How tokens reach experts. On one device: which rows each expert gets."""
