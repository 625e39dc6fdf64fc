"""The policy."""

import torch
from torch import Tensor

from coati.losses.language import align
from coati.models.base import BaseModel


class Actor(BaseModel):
    """A causal language model that gives the log-probs of given tokens, and generates."""

    auto_class = "AutoModelForCausalLM"

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
        adapter: bool = True,
    ):
        """Log-probs of the tokens, float32 `[batch, seq]`, entry `t` for token `t` (entry 0 is 0).

        Args:
            input_ids: `[batch, seq]`.
            attention_mask: `[batch, seq]`, False on padding, which may stand on either side; None for no padding.
            temperature: of the distribution whose log-probs are wanted.
            with_entropy: return `(log_probs, entropy)`, the entropy in nats, `[batch, seq]`.
            adapter: False for the model without its LoRA adapter (the reference of a LoRA actor).
        """
        if adapter or not self.has_adapter:
            logits = self.run(input_ids, attention_mask).logits
        else:
            with self.model.disable_adapter():
                logits = self.run(input_ids, attention_mask).logits
        seq, layout = input_ids.shape[1], self.layout
        next_ids = layout.split(input_ids.roll(-1, dims=1))
        log_probs = align(layout.gather(layout.log_probs(logits, next_ids, temperature))[:, :seq])
        if not with_entropy:
            return log_probs
        with torch.no_grad():
            return log_probs, align(layout.gather(layout.entropy(logits, temperature))[:, :seq])

    def next_logits(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache) -> Tensor:
        """Logits of the token after the last one, `[batch, vocabulary]`, with a transformers cache.

        Args:
            input_ids, position_ids: `[batch, new]`, what the cache does not hold yet.
            attention_mask: bool `[batch, cached and new]`, False on padding.
        """
        inputs = dict(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
        if self._takes_positions:
            inputs["position_ids"] = position_ids
        if self._keeps_logits:
            inputs["logits_to_keep"] = 1
        return self.model(**inputs).logits[:, -1]

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        """transformers' `generate` (greedy, sampling, beam): prompts `[batch, seq]` left-padded, returns prompt and
        response `[batch, seq + new]`."""
        training = self.training
        self.eval()
        try:
            return self.model.generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        finally:
            self.train(training)
