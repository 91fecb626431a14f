"""Torch modules: each idea once. The same modules train, define what runs, and are its reference."""
