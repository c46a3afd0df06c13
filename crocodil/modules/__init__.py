"""LightningModules, one for each stage: wiring only."""

from crocodil.modules.autoencoder import AutoencoderModule
from crocodil.modules.base import CrocodilModule
from crocodil.modules.demasker import DemaskerModule
from crocodil.modules.judge import JudgeModule
from crocodil.modules.prior import PriorModule
from crocodil.modules.sharding import ShardedStrategy

__all__ = ["AutoencoderModule", "CrocodilModule", "DemaskerModule", "JudgeModule", "PriorModule", "ShardedStrategy"]
