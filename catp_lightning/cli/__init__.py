"""The command line `catp`."""
