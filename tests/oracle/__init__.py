"""Oracles: tiny random models of every family, run by transformers (Grok-1: by a plain implementation of its own)."""
