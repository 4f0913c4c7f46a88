"""What training minimizes on a batch."""

from ..data.samples import Batch
from ..model.network import FAConvLSTMNetwork, NetworkOutput, TrainingLosses
from ..spatial.domain import Domain


def losses_of(
    network: FAConvLSTMNetwork,
    output: NetworkOutput,
    batch: Batch,
    domain: Domain,
    lead_weights: tuple[float, ...] = (),
) -> TrainingLosses:
    """Of what the network made of a batch, weighed as the contract and the config say. Collective over the tiles.

    Its adjoint: see `Loss`, whose ``objective`` each rank calls backward on.
    """
    return network.losses(
        output,
        batch.inputs_BTCYX,
        batch.target_BTCYX,
        domain,
        valid=batch.valid_BTCYX,
        fresh=batch.fresh_BTCYX,
        weights=batch.channels.loss_weights,
        lead_weights=lead_weights,
    )
