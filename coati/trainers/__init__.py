"""One file per algorithm: `sft.py`, `reward.py`, `dpo.py`, `kto.py`, `ppo.py`, `grpo.py`.

The loop of all is in `loop.py`, what they share in `trainer.py`, and the collaborators of an iteration in
`actor_critic.py`, `policy.py` and `iteration.py`.
"""
