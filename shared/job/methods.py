"""How a job trains: what of the model, with what optimizer."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from shared.job.settings import Positive, Settings

TrainedPart = Literal["head", "trunk", "tail"]
MethodName = Literal["lora", "full", "prefix", "prompt"]


class Lora(Settings):
    """LoRA (arXiv 2106.09685) with peft's names. `target_modules: null` means the family's attention projections.

    `use_rslora` scales by lora_alpha / sqrt(r) (rsLoRA, arXiv 2312.03732), `use_dora` trains magnitudes beside the
    directions (DoRA, arXiv 2402.09353).
    """

    type: Literal["lora"] = "lora"
    r: Annotated[int, Field(ge=1, le=1024)] = 8
    lora_alpha: Annotated[float, Field(gt=0)] = 16
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: tuple[str, ...] | None = None


class Full(Settings):
    """All weights are trained, each part where it lives."""

    type: Literal["full"] = "full"


class Prefix(Settings):
    """Prefix tuning, P-tuning v2 (arXiv 2101.00190, 2110.07602), with peft's names: trained keys and values of
    `num_virtual_tokens` virtual tokens in every layer, each at whoever holds the layer.
    """

    type: Literal["prefix"] = "prefix"
    num_virtual_tokens: Annotated[int, Field(ge=1, le=4096)] = 30
    prefix_projection: bool = False

    @model_validator(mode="after")
    def _no_projection(self) -> "Prefix":
        if self.prefix_projection:
            raise ValueError(
                "prefix_projection=true makes all layers' prefixes by one network, which client and server cannot share"
            )
        return self


class Prompt(Settings):
    """Prompt tuning (arXiv 2104.08691): `num_virtual_tokens` trained embeddings before each row, at the client alone.

    Rows of `data.max_length` tokens have them in it.
    """

    type: Literal["prompt"] = "prompt"
    num_virtual_tokens: Annotated[int, Field(ge=1, le=4096)] = 20


Method = Annotated[Lora | Full | Prefix | Prompt, Field(discriminator="type")]


class Training(Settings):
    """Each party's optimizer: AdamW (arXiv 1711.05101) or plain SGD, a schedule over all steps, clipping by the norm of
    the part.

    `from_scratch`: the model's configuration and tokenizer are used, its weights are drawn from `seed`, everywhere the
    same. A step is `gradient_accumulation_steps` batches. `trunk_dtype` is that of the trunk's frozen weights; what is
    trained, optimizers and reductions are float32 always.
    """

    per_device_train_batch_size: Positive = 8
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=64)] = 1
    optim: Literal["adamw_torch", "sgd"] = "adamw_torch"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    parts: Annotated[tuple[TrainedPart, ...], Field(min_length=1)] = ("head", "trunk", "tail")
    trunk_dtype: Literal["float32", "bfloat16"] = "float32"
    from_scratch: bool = False
