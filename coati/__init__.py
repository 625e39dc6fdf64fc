"""coati: SFT, reward models and RLHF on Colossal-AI, on one laptop CPU or on a GPU cluster."""

__version__ = "0.1.0"
