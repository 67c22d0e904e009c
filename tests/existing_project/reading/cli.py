"""The same from YAML: python -m reading.cli test --config config.yaml"""

from typing import Any

from lightning.pytorch.cli import LightningCLI

from .data import ReadingData
from .module import ReadingModule


def main(args: Any = None) -> LightningCLI:
    return LightningCLI(ReadingModule, ReadingData, seed_everything_default=3, save_config_callback=None, args=args)


if __name__ == "__main__":
    main()
