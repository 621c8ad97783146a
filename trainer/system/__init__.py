"""The machine: its memory and disks, the terminal, signals, drives that fail."""
