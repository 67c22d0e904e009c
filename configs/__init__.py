"""Configuration files of the command line, shipped as `catp_lightning.configs`."""
