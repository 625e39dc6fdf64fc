"""One file an algorithm: `sft.py`, `reward.py`, `preference.py`, `ppo.py`.

What they share is in `base.py` and `supervised.py`.
"""
