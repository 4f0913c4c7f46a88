"""The only place that knows DeepSpeed: forward, backward, step, and the full state of a sharded run."""

import contextlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import TrainingConfig
from ..errors import InputError
from ..model.arithmetic import ACTIVATIONS, arithmetic
from ..model.losses import Loss
from ..model.network import FAConvLSTMNetwork, NetworkOutput
from ..spatial.domain import Domain
from ..spatial.environment import deepspeed_finds
from ..spatial.mesh import ProcessMesh
from .deepspeed_config import deepspeed_config
from .deepspeed_start import quiet, without_compiler
from .frozen import frozen_in, unasked
from .optimizers import MOMENTS, new_moment, optimizer_of
from .shards import AVERAGE
from .timed import Timed

Snapshot = list[tuple[Tensor, Tensor, dict[str, Tensor]]]
"""Value, its copy, copies of its optimizer state."""

TOGETHER = 2**24  # numbers of the state that are collected at once, 64 MiB


class Engine:
    """A network under DeepSpeed ZeRO, sharded over all ranks: replicas and tiles alike.

    DeepSpeed is given no mpu and no mesh, and so averages gradients over all ranks; the losses of
    `model.losses` are made for that. One `forward` and one `backward` per micro-batch.

    Args:
        network: the same on every rank; rank 0's weights are broadcast.
        mesh: the ranks, already joined.
        training: optimizer, ZeRO stage, precision, clipping, accumulation.

    Attributes:
        gradient_norm: of the last step's whole gradient, before clipping; on the device, where nobody waits for it.
        activation_type: of activations.
    """

    def __init__(self, network: FAConvLSTMNetwork, mesh: ProcessMesh, training: TrainingConfig) -> None:
        with quiet(), without_compiler(), deepspeed_finds(mesh.device.type, mesh.device.index):
            import deepspeed  # here, so that only ranks that train pay for the import

            # Not compiled: an all-reduce for inference on CPUs that training never calls. Its build takes a
            # minute, and one that is killed leaves a lock behind at which every later start waits forever.
            # Nor is it asked what could be: every rank would try a C compiler.
            deepspeed.ops.__compatible_ops__ = {}
            _check_accelerator(deepspeed.get_accelerator().device_name(), mesh.device.type)
            groups = deepspeed.utils.groups  # its own group would know no training.timeout_s
            groups._WORLD_GROUP = groups._WORLD_GROUP or mesh.new_group_of_job()
            self.network = network.to(mesh.device)
            whole = self._of_first_rank(mesh) if training.precision == "bf16" else {}
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=self.network,
                optimizer=optimizer_of(self.network, training),
                config=deepspeed_config(training, sum(map(size_of, self.network.parameters()))),
                dist_init_required=False,
            )
            for module, parameter in self.network.borrowed() if training.zero_stage == 3 else ():
                deepspeed.zero.register_external_parameter(module, parameter)
        self._training, self._device = training, mesh.device
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in self.network.named_parameters()}
        frozen = frozen_in(self.network, training.frozen)
        self._frozen = [parameter for parameter, name in self._names.items() if name in frozen]
        self._timed = _timed_collectives() if mesh.device.type == "cpu" else None
        self.gradient_norm = torch.tensor(float("nan"), device=mesh.device)
        self._put_whole(whole)
        # Torch makes the moments at the first update, which may be left out; and in bf16 at ZeRO 0 DeepSpeed makes
        # them by a step of its own, which Adam counts.
        self._prepare_moments(0)
        self.take_communication_s()  # forget what setting up has cost
        self.activation_type = ACTIVATIONS[training.precision]

    def _of_first_rank(self, mesh: ProcessMesh) -> dict[str, Tensor]:
        """The weights as they are, which DeepSpeed would round to bf16 before it makes its fp32 values. Collective."""
        named = self.network.named_parameters()
        return {name: mesh.from_rank(parameter.detach(), parameter.shape, 0) for name, parameter in named}

    def _put_whole(self, whole: Mapping[str, Tensor]) -> None:
        """Puts fp32 values in place of all parameters, or nothing in place of any. Collective."""
        for parameter, name in self._names.items() if whole else ():
            self._set(parameter, whole[name])
        if whole:
            self._refresh_low_precision()

    def forward(self, inputs_BTCYX: Tensor, year_fraction_BT: Tensor, domain: Domain, **further: Any) -> NetworkOutput:
        """The network's output, from inputs in float32 at every precision. See `FAConvLSTMNetwork.forward`."""
        with unasked(self._frozen):
            output: NetworkOutput = self._engine(inputs_BTCYX, year_fraction_BT, domain=domain, **further)
        return output

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Forward passes inside are no part of training, and use the mean of the weights, if there is one. Collective.

        ZeRO 3 remembers in what order a pass of either kind goes.
        """
        trained = self._put(self._averages()) if self._training.ema else []
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
            if trained:  # not after an error, of which the other ranks do not know yet: they would not take part
                self._put(trained)
        finally:
            self._engine.train()

    def backward(self, loss: Loss) -> None:
        """Accumulates the gradient of one micro-batch."""
        with unasked(self._frozen):
            self._engine.backward(loss.objective)

    def step(self, learning_rate: float) -> None:
        """Ends a micro-batch; after the last one of a step, clips and updates with this learning rate."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        updates = self._engine.is_gradient_accumulation_boundary()
        whole_norm = self._whole_gradient_norm() if updates else None
        with arithmetic("fp32", self._device):  # of an optimizer's products, whatever those of the network are
            self._engine.step()
        if updates:
            self._take_first_ranks()
            self._average()
            norm = self._engine.get_global_grad_norm()
            norm = whole_norm if norm is None else norm
            self.gradient_norm = norm if isinstance(norm, Tensor) else torch.tensor(norm, device=self._device)

    @torch.no_grad()
    def _take_first_ranks(self) -> None:
        """After an update made of products, which round otherwise on another processor: its weights. Collective."""
        values = self._shards() if self._training.optimizer == "soap" and dist.get_world_size() > 1 else []
        if not values:
            return
        flat = torch.cat([value.data.flatten() for value in values])
        dist.broadcast(flat, 0)
        for value, part in zip(values, flat.split([value.numel() for value in values]), strict=True):
            value.data.copy_(part.view_as(value))
        self._refresh_low_precision()

    def _whole_gradient_norm(self) -> Tensor | float:
        """The norm where every rank holds the whole gradient and DeepSpeed reports none: ZeRO 0 in fp32."""
        gradients = [parameter.grad for parameter in self.network.parameters() if parameter.grad is not None]
        if self._training.zero_stage or not gradients:
            return float("nan")
        return torch.nn.utils.get_total_norm(gradients)

    def take_communication_s(self) -> float:
        """Seconds in DeepSpeed's own collectives since the last call; on a GPU not measured (0)."""
        return self._timed.taken_s() if self._timed else 0.0

    # The mean of the weights

    @torch.no_grad()
    def _average(self) -> None:
        """Takes in the weights of this update: ``mean += (1 - d) (weights - mean)``.

        ``d`` is ``training.ema``, and (1 + n) / (10 + n) after n updates where that is less: the weights that a run
        begins with are soon forgotten.
        """
        if not self._training.ema:
            return
        shards = self._shards()
        if self._training.optimizer == "sgd":  # which does not count
            for value in shards:
                self._torch_optimizer.state[value]["step"] += 1
        decay = min(self._training.ema, (1 + self.updates) / (10 + self.updates))
        for value, mean in zip(shards, self._averages(), strict=True):
            mean.lerp_(value.data, 1 - decay)

    def _averages(self) -> list[Tensor]:
        """Of each shard."""
        return [self._torch_optimizer.state[value][AVERAGE] for value in self._shards()]

    def _put(self, values: list[Tensor]) -> list[Tensor]:
        """Puts values in place of this rank's shards; what they were. Collective."""
        before = [value.data.clone() for value in self._shards()]
        for shard, value in zip(self._shards(), values, strict=True):
            shard.data.copy_(value)
        self._refresh_low_precision()
        return before

    # A step that turns out to be unsound

    def snapshot(self) -> Snapshot:
        """This rank's shards of parameters and optimizer state, as they are."""
        state = self._torch_optimizer.state
        return [
            (value, value.data.clone(), {name: one.clone() for name, one in state.get(value, {}).items()})
            for value in self._shards()
        ]

    def put_back(self, snapshot: Snapshot) -> None:
        """Undoes what was done since the snapshot: as if the step had not been. Collective."""
        for value, data, state in snapshot:
            value.data.copy_(data)
            for name, one in self._torch_optimizer.state.get(value, {}).items():  # in place: DeepSpeed has views of it
                one.copy_(state[name]) if name in state else one.zero_()
        self._refresh_low_precision()

    # The state of the run, whole: independent of the mesh and of the ZeRO stage

    @property
    def moment_names(self) -> tuple[str, ...]:
        """Of what the optimizer keeps beside every parameter, the mean of the weights included."""
        return (*MOMENTS[self._training.optimizer], *(AVERAGE,) * bool(self._training.ema))

    def full_parameters(self, wanted: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Name and fp32 value of every parameter, in the network's order, or of those ``wanted`` here. Collective."""
        for name, full in self._whole(None):
            if wanted is None or name in wanted:
                yield name, _kept(full)

    def full_moments(self, wanted: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """``MOMENT/PARAMETER`` and value of the optimizer's moments, or of those ``wanted`` here. Collective."""
        for moment in self.moment_names:
            for name, full in self._whole(moment):
                if wanted is None or name in wanted:
                    yield f"{moment}/{name}", _kept(full)

    def _whole(self, moment: str | None) -> Iterator[tuple[str, Tensor]]:
        """Name and fp32 value of every parameter, or of a moment of it, in the network's order. Collective.

        DeepSpeed's own accessors take one parameter at a time, and a sum over all ranks for each.
        """
        if self._training.zero_stage == 0:
            masters = self._masters()
            for parameter, name in self._names.items():
                master = masters[parameter]
                yield name, master if moment is None else self._torch_optimizer.state[master][moment]
            return
        for parameters in _grouped(self._names):
            flat = torch.zeros(sum(map(size_of, parameters)), dtype=torch.float32, device=self._device)
            wholes = flat.split([size_of(parameter) for parameter in parameters])
            for parameter, whole in zip(parameters, wholes, strict=True):
                first, part = _held(parameter, moment)
                whole[first : first + len(part)].copy_(part.detach()[: len(whole) - first])
            dist.all_reduce(flat.view(torch.int32))  # of each number one rank has the bits, all others zeros
            for parameter, whole in zip(parameters, wholes, strict=True):
                yield self._names[parameter], whole.view(getattr(parameter, "ds_shape", parameter.shape))

    @property
    def stored_sizes(self) -> dict[str, int]:
        """Numbers of every parameter and its moments as a whole, wherever their parts are."""
        found = {}
        for parameter, name in self._names.items():
            whole = torch.empty(tuple(getattr(parameter, "ds_shape", parameter.shape)), device="meta")
            found[name] = whole.numel() + sum(new_moment(moment, whole).numel() for moment in self.moment_names)
        return found

    @property
    def updates(self) -> int:
        """How many the optimizer has made, as Adam's bias correction counts them; 0 where it does not count."""
        return max((int(one["step"]) for one in self._torch_optimizer.state.values() if "step" in one), default=0)

    def load_full(self, value: Callable[[str], Tensor], updates: int) -> None:
        """Puts a whole state in place on every rank, each keeping its shard of it.

        Args:
            value: gives the tensor for ``parameter/NAME`` and ``MOMENT/NAME``; asked in the same order on all ranks.
            updates: that the optimizer has made, see `updates`.
        """
        self._prepare_moments(updates)
        for name, parameter in self.network.named_parameters():
            self._set(parameter, value(f"parameter/{name}").to(parameter.device))
            for moment in self.moment_names:
                self._set(parameter, value(f"{moment}/{name}").to(parameter.device), moment)
        self._refresh_low_precision()

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        inner: torch.optim.Optimizer = getattr(self._optimizer, "optimizer", self._optimizer)
        return inner

    def _masters(self) -> dict[Tensor, Tensor]:
        """At ZeRO 0, where DeepSpeed's accessors say nothing: the fp32 value behind every parameter."""
        if self._training.zero_stage:
            return {}
        if not hasattr(self._optimizer, "fp32_groups"):  # fp32: the parameters themselves
            return {parameter: parameter for parameter in self.network.parameters()}
        used = [one for group in self._optimizer.fp16_groups for one in group]
        precise = [one for group in self._optimizer.fp32_groups for one in group]
        return dict(zip(used, precise, strict=True))

    def _set(self, parameter: Tensor, full: Tensor, moment: str | None = None) -> None:
        """Sets the fp32 value or a moment of one parameter from its full value."""
        from deepspeed import utils

        if self._training.zero_stage == 0:
            master = self._masters()[parameter]
            (master if moment is None else self._torch_optimizer.state[master][moment]).data.copy_(full)
        elif self._training.zero_stage < 3 and moment is None:
            utils.safe_set_full_fp32_param(parameter, full)
        elif self._training.zero_stage < 3:
            utils.safe_set_full_optimizer_state(parameter, full, moment)
        elif moment is None:
            utils.safe_set_local_fp32_param(parameter, _part_of(full))
        else:
            utils.safe_set_local_optimizer_state(parameter, _part_of(full), moment)

    def _prepare_moments(self, updates: int) -> None:
        """Makes the optimizer's state, which torch makes at the first step only, and links it to parameters."""
        for value in self._shards() if self.moment_names else ():
            state = self._torch_optimizer.state[value]
            for name in self.moment_names:  # in place where there is one: DeepSpeed has views of it
                begin = new_moment(name, value.data)
                state[name] = state[name].copy_(begin) if name in state else begin
            state["step"] = torch.tensor(float(updates))
        link = getattr(self._optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None and self.moment_names:
            link()

    def _shards(self) -> list[Tensor]:
        """The fp32 values that the optimizer updates on this rank."""
        flat: list[Tensor] | None = getattr(self._optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO 3
        return flat or [one for group in self._torch_optimizer.param_groups for one in group["params"]]

    def _refresh_low_precision(self) -> None:
        """Copies the fp32 values that were set into what the forward pass uses."""
        if self._training.zero_stage == 3:
            self._optimizer._partition_all_parameters()  # a forward pass without backward may leave them whole
            flat = (self._optimizer.fp16_partitioned_groups_flat, self._optimizer.fp32_partitioned_groups_flat)
            for used, precise in zip(*flat, strict=True):
                used.data.copy_(precise.data)
            resident = self._optimizer.persistent_parameters
            if resident:
                resident[0].partition(resident)
                resident[0].all_gather(resident)
        elif self._training.zero_stage:
            self._optimizer.update_lp_params()
        else:
            for used, precise in self._masters().items():
                used.data.copy_(precise.data)


def _check_accelerator(found: str, wanted: str) -> None:
    """DeepSpeed chooses once in a process, and moves the network there."""
    if found != wanted:
        raise InputError(
            f"DeepSpeed computes on {found} in this process, this mesh on {wanted}: it would move the network away. "
            f"Give both the same device, by a process of its own for each."
        )


def _timed_collectives() -> Timed:
    """DeepSpeed has one backend for all engines of a process."""
    from deepspeed.comm import comm

    if not isinstance(comm.cdb, Timed):
        comm.cdb = Timed(comm.cdb)
    return comm.cdb


def _grouped(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """In order, as many as together have at most `TOGETHER` numbers, or one."""
    group: list[Tensor] = []
    for parameter in parameters:
        if group and sum(map(size_of, group)) + size_of(parameter) > TOGETHER:
            yield group
            group = []
        group.append(parameter)
    if group:
        yield group


def size_of(parameter: Tensor) -> int:
    """Numbers of a parameter as a whole, wherever its parts are."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _held(parameter: Tensor, moment: str | None) -> tuple[int, Tensor]:
    """What this rank has of the fp32 value of a parameter, or of a moment: the place of its first number, and all."""
    if hasattr(parameter, "ds_id"):  # ZeRO 3: equal parts, the last one filled up
        part = parameter._z3_optimizer.get_local_fp32_param(parameter, moment)  # type: ignore[attr-defined]
        return min(dist.get_rank() * len(part), size_of(parameter)), part
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:  # all of it is held elsewhere
        return 0, torch.empty(0)
    return mapping.lp_fragment_address.start, mapping.get_hp_fragment(moment)


def _part_of(full: Tensor) -> Tensor:
    """This rank's part at ZeRO 3, which cuts equal parts for all ranks and fills up the last."""
    filled = torch.nn.functional.pad(full.flatten(), (0, -full.numel() % dist.get_world_size()))
    return filled.chunk(dist.get_world_size())[dist.get_rank()]


def _kept(value: Tensor) -> Tensor:
    """A copy in host memory that later steps do not change."""
    return value.detach().to("cpu", torch.float32, copy=True)
