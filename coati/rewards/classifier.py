"""Other people's reward models: sequence classifiers with their own tokenizers."""

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from coati.errors import UserError
from coati.models.base import load_transformer
from coati.models.classifier import at_last_token, reads_last_token
from coati.models.lora import is_adapter
from coati.models.positions import row_limit
from coati.models.quiet import quiet_transformers
from coati.rewards.base import Reward
from coati.rewards.config import PLAIN


class SequenceClassifierReward(Reward):
    """Scores texts with a sequence classifier of transformers. Its tokenizer may be another than the policy's: prompt
    and response are joined as text and tokenized again.

    Scores don't depend on how texts are batched and padded. Decoders (Llama, GPT-2, ...) are read at each text's last
    token, found by the attention mask, so that a pad token which is also EOS, or stands in a text, does no harm.

    Args:
        model: folder or name of a checkpoint, or the model itself, which is put in evaluation mode and whose
            `config.pad_token_id` is set.
        tokenizer: folder or name of its tokenizer, or the tokenizer itself; the model's folder if not given.
        label: name or index of the label whose logit is the reward; may be left out where there is only one.
        output: the label's logit, log-probability or probability.
        template: how the text is made of prompt and response: a format string with `{prompt}` and `{response}`,
            "chat" for the tokenizer's chat template, or "pair" for two texts with the tokenizer's separator.
        max_length: longest text in tokens; all that the model can read if not given.
        truncation_side: the side that longer texts lose.
        padding_side: of decoders, either; by default right. Encoders keep their tokenizer's side.
        pad_token: what fills rows; the tokenizer's pad token if not given, or EOS for decoders.
        batch_size: texts per forward pass.
        device: where the model runs; where it is if not given.
        **kwargs: passed to `from_pretrained`: dtype, attn_implementation, revision, ...

    Raises:
        UserError: the model or tokenizer can't be loaded, or doesn't fit the other; no such label; no pad token; a
            template without `{response}`.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        tokenizer=None,
        *,
        label: int | str | None = None,
        output: Literal["logit", "log_prob", "probability"] = "logit",
        template: str = PLAIN,
        max_length: int | None = None,
        truncation_side: Literal["left", "right"] = "left",
        padding_side: Literal["left", "right"] | None = None,
        pad_token: str | None = None,
        batch_size: int = 16,
        device: torch.device | str | None = None,
        name: str | None = None,
        **kwargs,
    ):
        is_loaded = isinstance(model, nn.Module)
        self.source = type(model).__name__ if is_loaded else str(model)
        self.name = name or Path(self.source).name
        self.model = (model if is_loaded else _load_classifier(self.source, kwargs)).eval()
        if device is not None:
            self.model.to(device)
        self.at_last_token = reads_last_token(self.model)
        self.tokenizer = self._load_tokenizer(tokenizer if tokenizer is not None or is_loaded else model)
        self.tokenizer.truncation_side = truncation_side
        self._set_padding(pad_token, padding_side)
        self.label, self.output = self._label(label), output
        self.template = self._template(template)
        self.max_length, self.batch_size = self._max_length(max_length), batch_size
        reader = self.model.base_model if self.at_last_token else self.model
        self._inputs = inspect.signature(reader.forward).parameters

    @torch.no_grad()
    def score(self, samples):
        """Rewards, float32 `[batch]`, on the model's device."""
        rows = self._encode([sample.prompt for sample in samples], [sample.response for sample in samples])
        shortest_first = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        scores = torch.zeros(len(rows), device=self.model.device)
        for start in range(0, len(rows), self.batch_size):
            index = shortest_first[start : start + self.batch_size]
            with quiet_transformers():  # it advises against padding rows that are tokenized already
                batch = self.tokenizer.pad([rows[i] for i in index], return_tensors="pt")
            scores[index] = self._read(self._logits(batch.to(self.model.device)).float())
        return scores

    def _encode(self, prompts: list[str], responses: list[str]) -> list[dict[str, list[int]]]:
        options = dict(truncation=self.max_length is not None, max_length=self.max_length)
        if self.template == "pair":
            encoded = self.tokenizer(prompts, responses, **options)
        elif self.template == "chat":
            encoded = self.tokenizer(
                [self._chat(p, r) for p, r in zip(prompts, responses, strict=True)], add_special_tokens=False, **options
            )
        else:
            texts = [self.template.format(prompt=p, response=r) for p, r in zip(prompts, responses, strict=True)]
            encoded = self.tokenizer(texts, **options)
        rows = [{name: values[i] for name, values in encoded.items()} for i in range(len(responses))]
        nothing = {"input_ids": [self.tokenizer.pad_token_id], "attention_mask": [1]}  # a text without any token
        return [row if row["input_ids"] else {name: nothing.get(name, [0]) for name in row} for row in rows]

    def _chat(self, prompt: str, response: str) -> str:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        return self.tokenizer.apply_chat_template(turns, tokenize=False)

    def _logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """`[batch, labels]`."""
        mask = batch["attention_mask"]
        if not self.at_last_token:
            return self.model(**{name: x for name, x in batch.items() if name in self._inputs}).logits
        inputs = {"input_ids": batch["input_ids"], "attention_mask": mask}
        if "position_ids" in self._inputs:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        # transformers would look for the last token that isn't the pad token, which a text's own EOS may be
        return self.model.score(at_last_token(self.model.base_model(**inputs)[0], mask))

    def _read(self, logits: Tensor) -> Tensor:
        if self.output == "logit":
            return logits[:, self.label]
        config = self.model.config
        alone = config.num_labels == 1 or config.problem_type == "multi_label_classification"
        log_probs = nn.functional.logsigmoid(logits) if alone else logits.log_softmax(1)
        return log_probs[:, self.label] if self.output == "log_prob" else log_probs[:, self.label].exp()

    # --- set-up

    def _load_tokenizer(self, tokenizer):
        from transformers import AutoTokenizer

        if tokenizer is None:
            raise UserError(f"{self.source} was given as a model: give its tokenizer too")
        if isinstance(tokenizer, (str, Path)):
            try:
                tokenizer = AutoTokenizer.from_pretrained(str(tokenizer))
            except (OSError, ValueError) as error:
                raise UserError(
                    f"can't load the tokenizer of reward classifier {self.source} from {tokenizer}: name another "
                    f"(the setting `tokenizer`; {str(error).splitlines()[0]})"
                ) from error
        vocabulary = self.model.get_input_embeddings().num_embeddings
        if len(tokenizer) > vocabulary:
            raise UserError(
                f"the tokenizer has {len(tokenizer)} tokens but the vocabulary of reward classifier {self.source} is "
                f"{vocabulary}: give the classifier's own tokenizer (the setting `tokenizer`)"
            )
        return copy.deepcopy(tokenizer)

    def _set_padding(self, pad_token: str | None, side: str | None):
        tokenizer, where = self.tokenizer, f"the tokenizer of reward classifier {self.source}"
        if pad_token is None:
            pad_token = tokenizer.pad_token or (tokenizer.eos_token if self.at_last_token else None)
        if pad_token is None:
            raise UserError(
                f"{where} has no pad token{' and no EOS' if self.at_last_token else ''}: name a token of its "
                "vocabulary to pad with (the setting `pad_token`)"
            )
        if pad_token not in tokenizer.get_vocab():
            raise UserError(f"{where} has no token {pad_token!r} to pad with (the setting `pad_token`)")
        if not self.at_last_token and pad_token == tokenizer.eos_token:
            raise UserError(f"{type(self.model).__name__} takes EOS {pad_token!r} for the text's end: pad with another")
        if not self.at_last_token and side not in (None, tokenizer.padding_side):
            raise UserError(
                f"{type(self.model).__name__} reads a fixed position: padding stays on the {tokenizer.padding_side}"
            )
        tokenizer.pad_token = pad_token
        tokenizer.padding_side = side or ("right" if self.at_last_token else tokenizer.padding_side)
        # transformers' own reading of decoders needs it for batches above one
        self.model.config.get_text_config().pad_token_id = tokenizer.pad_token_id

    def _label(self, label: int | str | None) -> int:
        names = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]
        if label is None and len(names) == 1:
            return 0
        if label in names:
            return names.index(label)
        if str(label) in map(str, range(len(names))):
            return int(label)
        raise UserError(
            f"reward classifier {self.source} has the labels {', '.join(names)}, not {label}: say by name or index "
            "which one is the reward (the setting `label`)"
        )

    def _template(self, template: str) -> str:
        if template == "pair":
            return template
        if template == "chat":
            if not self.tokenizer.chat_template:
                raise UserError(f"the tokenizer of reward classifier {self.source} has no chat template: give another")
            return template
        try:
            good = "\0" in template.format(prompt="", response="\0")
        except (KeyError, IndexError, ValueError):
            good = False
        if not good:
            raise UserError(
                f"reward template {template!r}: write chat, pair, or a text with {{prompt}} and {{response}} "
                "(other braces doubled)"
            )
        return template

    def _max_length(self, wanted: int | None) -> int | None:
        config = self.model.config.get_text_config()
        limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
        if (table := row_limit(self.model)) is not None:  # RoBERTa's is two shorter than its config says
            limits.append(table.tokens)
        limit = min([n for n in limits if n is not None and n > 0], default=None)
        if wanted is None:
            of_tokenizer = self.tokenizer.model_max_length  # 1e30 where the tokenizer sets none
            return min(of_tokenizer, limit or of_tokenizer) if limit or of_tokenizer < 1e9 else None
        if wanted < 1 or (limit is not None and wanted > limit):
            raise UserError(f"reward classifier {self.source} reads 1 to {limit} tokens, not max_length {wanted}")
        return wanted


def _load_classifier(source: str, kwargs: dict) -> nn.Module:
    if is_adapter(source):
        raise UserError(f"{source} is an adapter: merge it into its classifier first, and give that")
    return load_transformer("AutoModelForSequenceClassification", source, None, kwargs)
