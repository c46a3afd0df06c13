"""LightningModules, one for each stage and one for each evaluation: wiring only; and what their runs need.

Names load on first use: a stage needs no evaluation, and `crocodil sample` needs neither.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crocodil.modules.autoencoder import AutoencoderModule
    from crocodil.modules.base import CrocodilModule
    from crocodil.modules.demasker import DemaskerModule
    from crocodil.modules.evaluations import ConditioningEvaluation, GenerationEvaluation, ReconstructionEvaluation
    from crocodil.modules.judge import JudgeModule
    from crocodil.modules.last_checkpoint import LastCheckpoint
    from crocodil.modules.prior import PriorModule
    from crocodil.modules.sharding import ShardedStrategy
    from crocodil.modules.student import StudentModule

_MODULES = {
    "AutoencoderModule": "autoencoder",
    "ConditioningEvaluation": "evaluations",
    "CrocodilModule": "base",
    "DemaskerModule": "demasker",
    "GenerationEvaluation": "evaluations",
    "JudgeModule": "judge",
    "LastCheckpoint": "last_checkpoint",
    "PriorModule": "prior",
    "ReconstructionEvaluation": "evaluations",
    "ShardedStrategy": "sharding",
    "StudentModule": "student",
}
__all__ = [
    "AutoencoderModule",
    "ConditioningEvaluation",
    "CrocodilModule",
    "DemaskerModule",
    "GenerationEvaluation",
    "JudgeModule",
    "LastCheckpoint",
    "PriorModule",
    "ReconstructionEvaluation",
    "ShardedStrategy",
    "StudentModule",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
