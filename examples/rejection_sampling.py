"""Rejection sampling (Llama 2, 2307.09288, section 3.2.3; RAFT, 2304.06767): in each round the policy responds to
prompts n times and is fine-tuned on the best responses. Prompts whose responses all earn the same are skipped.

python examples/rejection_sampling.py --model FOLDER --prompts FILE --reward FILE.py:function --config SFT.yaml \\
    --output FOLDER
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from examples.rounds import ScoredPrompt, run_rounds  # noqa: E402


def row(scored: ScoredPrompt) -> dict:
    return {"prompt": scored.prompt, "completion": scored.best}


if __name__ == "__main__":
    run_rounds("Rejection sampling: SFT on the best of n responses, in rounds.", "sft", row)
