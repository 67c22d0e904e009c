"""Which packages ship: everything under catp_lightning, and configs/ as catp_lightning.configs."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["catp_lightning*"]), "catp_lightning.configs"],
    package_dir={"catp_lightning.configs": "configs"},
)
