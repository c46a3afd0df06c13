"""The paper's tables and curves on a trained system: reconstruction, conditioning, generation."""

from crocodil.experiments.conditioning import Conditioning
from crocodil.experiments.generation import Generation, SystemGrid
from crocodil.experiments.reconstruction import Reconstruction

__all__ = ["Conditioning", "Generation", "Reconstruction", "SystemGrid"]
