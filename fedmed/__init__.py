"""fedmed: federated learning for clinical imaging with patient-level differential privacy.

Importing this package stays cheap on purpose: torch, MONAI and Flower are loaded by the
modules that use them, so that ``fedmed --help`` answers at once.
"""

__version__ = "0.1.0"
