"""What programs cost: measured on this machine."""
