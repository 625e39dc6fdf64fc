"""Language models with a value head, under TRL's names and with TRL's checkpoints. TRL dropped its own in 1.13."""

import logging
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coati.errors import UserError
from coati.models.base import hub_options
from coati.models.cache import cache_name, cache_of
from coati.models.compat.wrapped import add_adapter, check_language_model, language_model_head, load_base, pop_head
from coati.models.generation_config import repair_generation_config
from coati.models.value_head import HEAD, ValueHead, load_head, save_head

KBIT_OPTIONS = ("use_gradient_checkpointing", "gradient_checkpointing_kwargs")

logger = logging.getLogger(__name__)


class _OfTransformers:
    """A class attribute that is a class of transformers, which is imported when it is asked for."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, instance, owner):
        import transformers

        return getattr(transformers, self.name)


class PreTrainedModelWrapper(nn.Module):
    """A transformers language model, or peft's wrapping of one, and a value head on its last hidden states.

    What is not defined here is the wrapped model's: `config`, `device`, `generate`, `prepare_inputs_for_generation`,
    `gradient_checkpointing_enable`, `enable_input_require_grads` and so on.

    Args:
        pretrained_model: the model to wrap. With adapters its base weights are frozen; the head always trains.
        score_module, supports_rm_adapter, rm_adapter_name: the linear layer and the name of a reward adapter.
        **head: `ValueHead`'s keywords.

    Attributes:
        transformers_parent_class: the auto class of transformers that loads what is wrapped.
        lm_head_namings: what the language-model head may be called, where the model doesn't say which one it is.
        supported_args: the keywords of the head.

    Raises:
        UserError: not a language model of this class's kind, no language-model head, prompt or prefix tuning.
    """

    transformers_parent_class: Any = None
    auto_class = ""
    lm_head_namings: tuple[str, ...] = ()
    is_encoder_decoder = False
    supported_args = ("summary_dropout_prob", "v_head_initializer_range", "v_head_init_strategy")

    def __init__(
        self,
        pretrained_model: nn.Module,
        score_module: nn.Linear | None = None,
        supports_rm_adapter: bool = False,
        rm_adapter_name: str | None = None,
        **head,
    ):
        super().__init__()
        base = check_language_model(pretrained_model, type(self))
        self.pretrained_model = pretrained_model
        self.is_peft_model = base is not pretrained_model
        shape = {name: value for name, value in head.items() if name == "summary_dropout_prob"}
        self.v_head = ValueHead(base.config, **shape).to(language_model_head(base, self.lm_head_namings).weight.device)
        self._init_weights(**head)
        self.supports_rm_adapter, self.rm_adapter_name = supports_rm_adapter, rm_adapter_name
        if score_module is not None:
            self.score = score_module
        self.register_state_dict_post_hook(_hide_prefix)
        self.register_load_state_dict_pre_hook(_restore_prefix)
        self.train(base.training)

    def _init_weights(
        self,
        v_head_init_strategy: str | None = None,
        v_head_initializer_range: float = 0.2,
        summary_dropout_prob: float | None = None,
    ):
        """Initializes the head's weights, given `ValueHead`'s keywords; strategy None leaves them as they are."""
        self.v_head.init_weights(v_head_init_strategy, v_head_initializer_range)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("pretrained_model"), name)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *,
        peft_config=None,
        is_trainable: bool = False,
        reward_adapter: str | None = None,
        reward_adapter_name: str = "reward_adapter",
        **kwargs,
    ):
        """The model in a folder, of a hub name, or given as an object; in eval mode like transformers' own.

        Args:
            pretrained_model_name_or_path: a folder (full model, or adapter) or name, whose head is read if there is
                one and initialized, with a warning, if not; or a model, whose own `v_head`, if any, becomes the
                head.
            peft_config: adds a new adapter.
            is_trainable: whether the adapter of an adapter folder trains.
            reward_adapter: folder or name of an adapter with a `score` layer, for `compute_reward_score`.
            **kwargs: `ValueHead`'s keywords; the rest goes to transformers' `from_pretrained`.

        Raises:
            UserError: neither path nor model, a checkpoint that doesn't fit, an unsuitable adapter.
        """
        if reward_adapter is not None and not isinstance(reward_adapter, str):
            kind = type(reward_adapter).__name__
            raise UserError(f"reward_adapter is a {kind}: give a folder or a hub name, as a string")
        model, source = pretrained_model_name_or_path, None
        head = {name: kwargs.pop(name) for name in cls.supported_args if name in kwargs}
        kbit = {name: kwargs.pop(name) for name in KBIT_OPTIONS if name in kwargs}
        hub = hub_options(kwargs)
        if isinstance(model, (str, Path)):
            source = str(model)
            model = load_base(cls.transformers_parent_class, source, is_trainable, hub, kwargs)
        carried = pop_head(model)
        if peft_config is not None:
            model = add_adapter(model, peft_config, kbit)
        rewards = {}
        if reward_adapter is not None:
            score = cls.add_and_load_reward_modeling_adapter(
                model, reward_adapter, reward_adapter_name, kwargs.get("token")
            )
            rewards = dict(score_module=score, supports_rm_adapter=True, rm_adapter_name=reward_adapter_name)
        wrapper = cls(model, **rewards, **head)
        note = repair_generation_config(check_language_model(model, cls))
        if note:
            logger.warning(note)
        if source is None:
            wrapper._fill_head(carried, type(model).__name__)
            return wrapper
        state = load_head(source, **hub)
        if state:
            wrapper._fill_head(state, source)
        else:
            logger.warning("%s has no value head (%s*): a new one is initialized", source, HEAD)
        return wrapper

    def _fill_head(self, state: dict[str, Tensor], source: str):
        """Takes over the tensors `v_head.*`, if there are any."""
        if not state:
            return
        try:
            self.v_head.load_state_dict({key.removeprefix("v_head."): value for key, value in state.items()})
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"the value head in {source} doesn't fit {type(self.config).__name__}: {reason}") from error

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values=None,
        attention_mask: Tensor | None = None,
        return_past_key_values: bool = False,
        **kwargs,
    ) -> tuple:
        """`(logits, loss, values)`, and the key-value cache after them if asked for.

        Args:
            input_ids: `[batch, seq]`; of an encoder-decoder the encoder's.
            past_key_values: cache of the tokens before `input_ids`.
            attention_mask: `[batch, past + seq]`, 0 on padding.
            **kwargs: the wrapped model's: labels, position_ids, decoder_input_ids, ...

        Returns:
            logits: float32 `[batch, seq, vocab]`.
            loss: scalar; None without labels.
            values: `[batch, seq]` in the head's dtype, which is float32 unless the wrapper was moved to another. Of an
                encoder-decoder, `seq` is the decoder's.
        """
        kwargs.setdefault("use_cache", return_past_key_values or past_key_values is not None)
        if past_key_values is not None:
            base = self.pretrained_model.get_base_model() if self.is_peft_model else self.pretrained_model
            kwargs[cache_name(base)] = past_key_values
        output, hidden = self._run(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        values = self.v_head(hidden).squeeze(-1).to(output.logits.device)
        result = (output.logits.float(), output.loss, values)
        return (*result, cache_of(output)) if return_past_key_values else result

    def _run(self, **inputs):
        """The wrapped model's output and the last hidden states, `[batch, seq, hidden]`."""
        output = self.pretrained_model(**{**inputs, "output_hidden_states": True, "return_dict": True})
        if self.is_encoder_decoder:
            return output, output.decoder_hidden_states[-1]
        return output, output.hidden_states[-1]

    def save_pretrained(self, save_directory: str | Path, state_dict: dict[str, Tensor] | None = None, **kwargs):
        """A folder that this class, TRL and plain transformers (or peft) open.

        The head stands among the model's weights; of a model with adapters, in a `model.safetensors` of its own beside
        the adapter. A reward adapter is not saved with the policy's.

        Args:
            state_dict: what `state_dict()` gives, if the weights aren't in the module itself.
            **kwargs: the wrapped model's `save_pretrained` keywords: max_shard_size, is_main_process, ...
        """
        folder = str(save_directory)
        state = self.state_dict() if state_dict is None else dict(state_dict)
        if not self.is_peft_model:
            self.pretrained_model.save_pretrained(folder, state_dict=state, **kwargs)
            return
        options = {"state_dict": state, "selected_adapters": [n for n in self.peft_config if n != self.rm_adapter_name]}
        # by its class: `push_to_hub` makes the model's own method this one
        type(self.pretrained_model).save_pretrained(self.pretrained_model, folder, **{**options, **kwargs})
        if kwargs.get("is_main_process", True):
            save_head(folder, state)

    def push_to_hub(self, *args, **kwargs):
        """The wrapped model's `push_to_hub`, of what `save_pretrained` writes. The model carries the head then."""
        model = self.pretrained_model
        model.v_head = self.v_head
        if not self.is_peft_model:
            return model.push_to_hub(*args, **kwargs)
        model.save_pretrained = self.save_pretrained  # its own leaves out what is no adapter
        try:
            return model.push_to_hub(*args, **kwargs)
        finally:
            del model.save_pretrained

    @classmethod
    def add_and_load_reward_modeling_adapter(
        cls,
        pretrained_model: nn.Module,
        adapter_model_id: str,
        adapter_name: str = "reward_model_adapter",
        token: str | bool | None = None,
    ) -> nn.Linear:
        """Adds a frozen reward adapter to a peft model, whose active adapter, modes and gradients stay as they are.

        Returns:
            its `score` layer, frozen, float32: hidden states to `[batch, seq, labels]`.

        Raises:
            UserError: no peft model, or an adapter without `score` weights.
        """
        from peft import PeftConfig, PeftModel
        from peft.utils.save_and_load import load_peft_weights

        if not isinstance(pretrained_model, PeftModel):
            raise UserError("reward_adapter needs a model with a peft adapter, a PeftModel: give peft_config as well")
        state = load_peft_weights(adapter_model_id, device="cpu", token=token)
        parts = {key.rpartition(".")[2]: value for key, value in state.items() if _is_score(key)}
        if "weight" not in parts:
            raise UserError(
                f"the adapter {adapter_model_id} has no score layer: train it on AutoModelForSequenceClassification "
                "with modules_to_save=['score']"
            )
        if getattr(PeftConfig.from_pretrained(adapter_model_id, token=token), "bias", "none") != "none":
            raise UserError(
                f"the reward adapter {adapter_model_id} trains biases of the base model, which are the policy's too: "
                "train it with bias='none'"
            )
        with _restored(pretrained_model):
            load_result = pretrained_model.load_adapter(adapter_model_id, adapter_name, is_trainable=False, token=token)
        wrong = [*load_result.missing_keys, *(key for key in load_result.unexpected_keys if not _is_score(key))]
        if wrong:
            raise UserError(f"the reward adapter {adapter_model_id} doesn't fit this model: {wrong[0]}")
        labels, width = parts["weight"].shape
        score = nn.Linear(width, labels, bias="bias" in parts, device=pretrained_model.device, dtype=torch.float32)
        score.load_state_dict(parts)
        return score.requires_grad_(False)

    @torch.no_grad()
    def compute_reward_score(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        """Scores after each token under the reward adapter, float32 `[batch, seq, labels]`, without dropout.

        The adapter that was active, train or eval mode, and what trains are as before afterwards, also if it raises.

        Args:
            input_ids: `[batch, seq]`.
            attention_mask: `[batch, seq]`, 0 on padding.

        Raises:
            UserError: there is no reward adapter.
        """
        if not self.supports_rm_adapter:
            raise UserError(
                "this model has no reward modeling adapter, no reward adapter: load it with reward_adapter=FOLDER"
            )
        with _restored(self.pretrained_model):
            self.pretrained_model.set_adapter(self.rm_adapter_name, inference_mode=True)
            self.pretrained_model.eval()
            _, hidden = self._run(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs)
        return self.score(hidden.to(self.score.weight))


class AutoModelForCausalLMWithValueHead(PreTrainedModelWrapper):
    """A causal language model with a value head."""

    transformers_parent_class = _OfTransformers("AutoModelForCausalLM")
    auto_class = "AutoModelForCausalLM"
    lm_head_namings = ("lm_head", "embed_out")


class AutoModelForSeq2SeqLMWithValueHead(PreTrainedModelWrapper):
    """An encoder-decoder with a value head on the decoder's last hidden states."""

    transformers_parent_class = _OfTransformers("AutoModelForSeq2SeqLM")
    auto_class = "AutoModelForSeq2SeqLM"
    lm_head_namings = ("lm_head", "embed_out", "output_projection")
    is_encoder_decoder = True


def _is_score(key: str) -> bool:
    """`base_model.model.score.weight`, and with `modules_to_save.` before the last word in older peft."""
    *_, owner, last = key.replace(".modules_to_save", "").split(".")
    return owner == "score" and last in ("weight", "bias")


@contextmanager
def _restored(model: nn.Module):
    """Restores a peft model's active adapter, train or eval modes, and what requires gradients afterwards."""
    top, active = model.active_adapter, model.active_adapters
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        model.base_model.set_adapter(active)
        model.active_adapter = top
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in gradients:
            parameter.requires_grad_(requires_grad)


def _hide_prefix(module: nn.Module, state: dict, prefix: str, metadata):
    """The wrapped model's weights under their own names, as TRL and transformers have them."""
    for key in [key for key in state if key.startswith(prefix)]:
        state[prefix + key.removeprefix(prefix).removeprefix("pretrained_model.")] = state.pop(key)


def _restore_prefix(module: nn.Module, state: dict, prefix: str, *unused):
    twice = "v_head" in module.pretrained_model._modules  # the model carries the head too, see `push_to_hub`
    for key in [key for key in state if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        first = name.partition(".")[0]
        if first == "v_head" and twice:
            state[f"{prefix}pretrained_model.{name}"] = state[key]
        elif first not in module._modules:
            state[f"{prefix}pretrained_model.{name}"] = state.pop(key)
