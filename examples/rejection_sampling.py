"""Rejection sampling (Llama 2, 2307.09288, section 3.2.3; RAFT, 2304.06767): in each round the policy answers prompts n
times and is fine-tuned on the best answers. Prompts whose answers all earn the same are left out.

python examples/rejection_sampling.py --model FOLDER --prompts FILE --reward FILE.py:function --config SFT.yaml \\
    --output FOLDER
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from examples.answers import Answered, run_rounds  # noqa: E402


def row(answered: Answered) -> dict:
    return {"prompt": answered.prompt, "completion": answered.best}


if __name__ == "__main__":
    run_rounds("Rejection sampling: SFT on the best of n answers, in rounds.", "sft", row)
