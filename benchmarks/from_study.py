"""What the study of convergence has and this folder needs: models, the loop, and everybody who takes part.

Its scripts stand in a folder of their own, which is put on the path here, behind all others.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "convergence"))

from loops import Loop
from networks import Block, ConvNet, Gpt, WithLoss, classifier, mlp
from optimizers import OPTIMIZERS, Entry, Make

__all__ = ["OPTIMIZERS", "Block", "ConvNet", "Entry", "Gpt", "Loop", "Make", "WithLoss", "classifier", "mlp"]
