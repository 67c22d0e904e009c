"""The documentation as a site: `python -m website` writes it to site/."""
