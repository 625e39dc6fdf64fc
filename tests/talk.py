"""An environment for tests: any policy can play it, and what a policy earns depends on what it says."""

from coati.rollout import Observation


class Talk:
    """Likes odd lengths; answers twice, and says each time how often it will still answer."""

    def reset(self, row):
        self.left, self.prompt = 3, row["prompt"]
        return [{"role": "user", "content": self.prompt}]

    def step(self, message):
        self.left -= 1
        reward = float(len(message["content"]) % 2)
        answer = [{"role": "user", "content": f"{self.left} left"}]
        return Observation(answer, reward, done=self.left == 0, metrics={"left": self.left})
