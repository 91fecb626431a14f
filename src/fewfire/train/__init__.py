"""Training: settings from TOML, the loop, checkpoints that resume bit for bit. Prints nothing: it reports."""
