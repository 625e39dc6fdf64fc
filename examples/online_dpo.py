"""Online DPO (Guo et al., 2402.04792): in each round the policy answers prompts n times, a reward ranks the answers,
and DPO learns from the best against the worst. The reference of a round is the policy that drew its answers.

python examples/online_dpo.py --model FOLDER --prompts FILE --reward FILE.py:function --config PREFERENCE.yaml \\
    --output FOLDER
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from examples.answers import Answered, run_rounds  # noqa: E402


def row(answered: Answered) -> dict:
    return {"prompt": answered.prompt, "chosen": answered.best, "rejected": answered.worst}


if __name__ == "__main__":
    run_rounds("Online DPO: DPO on the best against the worst of n answers, in rounds.", "preference", row)
