"""Maps `callbacks/`, `lightning_configs/` and `weights/` to their import names; all else is in pyproject.toml."""

from setuptools import find_packages, setup

FOLDERS = {
    "crocodil_callbacks": "callbacks",
    "crocodil_configs": "lightning_configs",
    "crocodil_weights": "weights",
}

setup(
    packages=[*find_packages(include=["crocodil", "crocodil.*"]), *FOLDERS],
    package_dir=FOLDERS,
    package_data={
        "crocodil_configs": ["*.yaml"],
        "crocodil_weights": ["*.md", "*.json", "*/*"],
        "crocodil.evaluation": ["*.jinja"],
    },
)
