"""The optimizers of training, as torch has them but for what keeps its compiler away from them."""

import inspect
from collections.abc import Callable

import torch

from ..config import TrainingConfig
from ..model.network import FAConvLSTMNetwork
from .frozen import freeze

BETA1 = 0.9
WRAPPED = ("add_param_group", "zero_grad", "load_state_dict", "state_dict")


def optimizer_of(network: FAConvLSTMNetwork, training: TrainingConfig) -> torch.optim.Optimizer:
    """Without a learning rate, which every step brings: DeepSpeed may make a step of its own when it starts."""
    groups, decay = freeze(network, training.frozen), training.weight_decay
    if training.optimizer == "sgd":
        return _uncompiled(torch.optim.SGD)(groups, lr=0.0, weight_decay=decay)
    return _uncompiled(torch.optim.AdamW)(groups, lr=0.0, weight_decay=decay, betas=(BETA1, training.beta2))


def _uncompiled(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """The same optimizer, whose methods are what torch has wrapped: its wrappers import the compiler, a quarter of a
    rank's start, in order to tell it that these are not to be compiled. In a step gradients are off, as with them."""
    plain = {name: inspect.unwrap(getattr(kind, name)) for name in WRAPPED}
    return type(kind.__name__, (kind,), plain | {"step": torch.no_grad()(inspect.unwrap(kind.step))})
