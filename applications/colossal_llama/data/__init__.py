"""Data for pre-training: documents become packed rows on disk, and stages read these in the order of a mixture.

Every step of the preparation can be resumed after a kill."""
