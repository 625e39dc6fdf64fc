"""DPO and KTO on real pairs (HH-RLHF) with a model from random weights: what they learn holds on other pairs."""

import pytest

from coati.config import configure
from tests.conftest import ROOT, write_new_model

DATA = ROOT.parent / "shared" / "data" / "hh_rlhf"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"the shared data sets are not at {DATA}"),
]


@pytest.mark.timeout(1800)
def test_preferences_are_learned_and_hold_on_other_pairs(runtime, tmp_path):
    """Accuracy starts at one half, as no answer is better than the other under the reference itself."""
    from coati.trainers.preference import PreferenceConfig, preference_trainer
    from examples.real_data.run import read

    model = write_new_model(tmp_path / "start", [row["chosen"] for row in read(DATA / "train.jsonl")])
    common = dict(model=model, train_data=[str(DATA / "train.jsonl")], eval_data=[str(DATA / "test.jsonl")])
    common |= dict(max_length=160, too_long="truncate_prompt", bad_rows="drop", cache_dir=str(tmp_path / "cache"))
    common |= dict(batch_size=32, micro_batch_size=32, learning_rate=1e-3, steps=60, progress="off")

    def make(loss: str, /, **changes):
        return preference_trainer(
            configure(PreferenceConfig, **common, algorithm=loss, output_dir=str(tmp_path / loss), **changes), runtime
        )

    dpo = make("dpo", cache_reference=True)
    assert dpo.evaluate()[0]["accuracy"] == 0.5
    kto = make("kto")
    for trainer in (dpo, kto):
        for k in range(trainer.total_steps):
            trainer.step(k)
        # the pairs' accuracy of KTO's policy is measured by DPO's trainer
        dpo.engines["model"].module.load_state_dict(trainer.engines["model"].module.state_dict())
        found, _ = dpo.evaluate()
        print(trainer.config.algorithm.type, {name: round(value, 3) for name, value in found.items()})
        assert found["accuracy"] > 0.53 and found["margin"] > 0
