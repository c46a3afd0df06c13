"""LightningModules, one for each stage and one for each evaluation: wiring only."""

from crocodil.modules.autoencoder import AutoencoderModule
from crocodil.modules.base import CrocodilModule
from crocodil.modules.demasker import DemaskerModule
from crocodil.modules.evaluation import ConditioningEvaluation, GenerationEvaluation, ReconstructionEvaluation
from crocodil.modules.judge import JudgeModule
from crocodil.modules.prior import PriorModule
from crocodil.modules.sharding import ShardedStrategy

__all__ = [
    "AutoencoderModule",
    "ConditioningEvaluation",
    "CrocodilModule",
    "DemaskerModule",
    "GenerationEvaluation",
    "JudgeModule",
    "PriorModule",
    "ReconstructionEvaluation",
    "ShardedStrategy",
]
