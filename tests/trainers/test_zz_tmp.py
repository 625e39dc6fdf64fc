import pytest

from tests.trainers.test_theory import WITH_CRITIC, optimum, total_variation, trained


@pytest.mark.parametrize(
    "name,beta,seed,c",
    [
        ("SAO", 0.25, 0, {}),
        ("SAO", 0.25, 0, {"learning_rate": 3e-3}),
        ("SAO", 0.25, 2, {"learning_rate": 3e-3}),
        ("BPCO", 0.25, 0, {}),
        ("BPCO", 0.25, 2, {}),
        ("PPO", 0.25, 0, {}),
        ("PPO", 0.25, 2, {}),
    ],
)
def test_wctry(name, beta, seed, c, task, runtime, tmp_path):
    before, after = trained(task, runtime, tmp_path, beta, seed, **(WITH_CRITIC[name] | dict(steps=200) | c))
    print("RESULT", name, beta, seed, c, total_variation(after, optimum(before, beta)), flush=True)
