"""The networks: plain `nn.Module`s, without Lightning."""

from crocodil.models.demasker import Demasker
from crocodil.models.encoder import RegisterEncoder
from crocodil.models.prior import LatentPrior
from crocodil.models.student import LatentStudent

__all__ = ["Demasker", "LatentPrior", "LatentStudent", "RegisterEncoder"]
