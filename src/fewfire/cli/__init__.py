"""The command line: one thin module a verb. Parses, calls, prints; heavy imports happen inside functions."""
