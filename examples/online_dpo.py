"""Online DPO (Guo et al., 2402.04792): in each round the policy responds to prompts n times, a reward ranks the
responses, and DPO learns from the best against the worst. The reference of a round is the policy that drew its
responses.

python examples/online_dpo.py --model FOLDER --prompts FILE --reward FILE.py:function --config PREFERENCE.yaml \\
    --output FOLDER
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from examples.rounds import ScoredPrompt, run_rounds  # noqa: E402


def row(scored: ScoredPrompt) -> dict:
    return {"prompt": scored.prompt, "chosen": scored.best, "rejected": scored.worst}


if __name__ == "__main__":
    run_rounds("Online DPO: DPO on the best against the worst of n responses, in rounds.", "preference", row)
