"""Continued pre-training: the settings of a stage, the file that describes all stages, and their trainer.

The trainer is SFT on packed rows; loop, plugins and checkpoints are those of coati."""
