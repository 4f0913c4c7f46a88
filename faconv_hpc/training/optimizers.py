"""The optimizers of training: torch's, but for what keeps its compiler away from them, and SOAP; what they keep."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from ..config import TrainingConfig
from ..model.network import FAConvLSTMNetwork
from . import soap
from .fit import check_optimizer
from .frozen import freeze
from .shards import AVERAGE

BETA1 = 0.9
MOMENTS = {"adamw": soap.ADAM, "sgd": (), "soap": soap.KEPT}
WRAPPED = ("add_param_group", "zero_grad", "load_state_dict", "state_dict")


def optimizer_of(network: FAConvLSTMNetwork, training: TrainingConfig) -> torch.optim.Optimizer:
    """Without a learning rate, which every step brings: DeepSpeed may make a step of its own when it starts."""
    groups, decay = freeze(network, training.frozen), training.weight_decay
    check_optimizer(training)
    if training.optimizer == "soap":
        return soap.Soap(groups, beta2=training.beta2, weight_decay=decay)
    if training.optimizer == "sgd":
        return _uncompiled(torch.optim.SGD)(groups, lr=0.0, weight_decay=decay)
    return _uncompiled(torch.optim.AdamW)(groups, lr=0.0, weight_decay=decay, betas=(BETA1, training.beta2))


def new_moment(name: str, value: Tensor) -> Tensor:
    """What a moment of a parameter begins with, of `MOMENTS` or the mean of the weights; on meta: in which shape."""
    return value.clone() if name == AVERAGE else soap.new_state(name, value)


def _uncompiled(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """The same optimizer, whose methods are what torch has wrapped: its wrappers import the compiler, a quarter of a
    rank's start, in order to tell it that these are not to be compiled. In a step gradients are off, as with them."""
    plain = {name: inspect.unwrap(getattr(kind, name)) for name in WRAPPED}
    return type(kind.__name__, (kind,), plain | {"step": torch.no_grad()(inspect.unwrap(kind.step))})
