"""Maps the folders `callbacks/` and `lightning_configs/` to their import names; all else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["crocodil", "crocodil.*"]), "crocodil_callbacks", "crocodil_configs"],
    package_dir={"crocodil_callbacks": "callbacks", "crocodil_configs": "lightning_configs"},
    package_data={"crocodil_configs": ["*.yaml"], "crocodil.evaluation": ["*.jinja"]},
)
