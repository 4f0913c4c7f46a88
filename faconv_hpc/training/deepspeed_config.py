"""What DeepSpeed is told."""

from typing import Any

from ..config import TrainingConfig

LARGEST_BUCKET = 500_000_000  # DeepSpeed's own choice: 2 GB in fp32, of every rank


def deepspeed_config(training: TrainingConfig, parameters: int) -> dict[str, Any]:
    """Its config. It counts every rank as a replica, so its batch size is not the true one.

    Args:
        parameters: of the network: so many numbers a bucket need hold. DeepSpeed allocates buckets whole.
    """
    return {
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": training.accumulation,
        "gradient_clipping": training.clip_norm,
        "zero_optimization": {
            "stage": training.zero_stage,
            "reduce_bucket_size": min(max(parameters, 1), LARGEST_BUCKET),
            # At ZeRO 3 DeepSpeed would replace torch's linear layers by others, which round differently, for good.
            "memory_efficient_linear": False,
        },
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": training.precision == "bf16"},
        # Gradients are summed over ranks in float32, whatever the activations' type. Over micro-batches only at
        # ZeRO 2 and 3: at 0 DeepSpeed 0.19.8 does not offer it, at 1 its optimizer for it gets the sum wrong.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"} if training.zero_stage > 1 else {},
        "steps_per_print": 2**31,
    }
