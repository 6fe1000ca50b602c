"""PEFT models: the transformers model inside of one is what is steered, with its adapters as they are at each pass.

A LoRA and its kin sit in the blocks and leave tokens, positions and cache as they are, so that every pass of a
``PeftModel`` is one pass of the model inside. Switching, disabling and merging adapters changes weights, not what a
pass says of its tokens. Kinds of which that is not so are refused by name: virtual tokens move every position, and
some tuners run the model twice or past its hooks.
"""

from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from saeguard.errors import UnsupportedModel

_KINDS = (PeftModel, PeftMixedModel)


def without_adapters(model: nn.Module) -> nn.Module:
    """The model that a PEFT model wraps. Raises `UnsupportedModel` where its passes are not those of the wrapper."""
    tuner = model.base_model if isinstance(model, _KINDS) else model
    virtual = [
        config.peft_type.value for config in getattr(model, "peft_config", {}).values() if config.is_prompt_learning
    ]
    if virtual:
        raise UnsupportedModel(
            f"steering a {type(model).__name__} with {' and '.join(virtual)}",
            "it puts virtual tokens in front of every row, which no mask and no token id tells from the prompt",
            "Use an adapter that leaves the tokens alone (LoRA and its kin), or train the prompt into one.",
        )
    if not isinstance(tuner, BaseTuner) or type(tuner).forward is not BaseTuner.forward:
        raise UnsupportedModel(
            f"steering a {type(model).__name__} around a {type(tuner).__name__}",
            "it does not run the model inside of it once per pass, as LoRA and its kin do",
            "Merge it (merge_and_unload) and steer what that returns, or use another kind of adapter.",
        )
    return tuner.model
