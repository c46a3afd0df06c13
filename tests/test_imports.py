import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_arrows_run_one_way() -> None:
    """The contracts of `[tool.importlinter]` in pyproject.toml."""
    linter = Path(sysconfig.get_path("scripts")) / "lint-imports"
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout and "Arrows run one way KEPT" in done.stdout
