"""`python -m catp_lightning`, the same as the command `catp`."""

from catp_lightning.cli.main import main

if __name__ == "__main__":
    main()
