"""Every setting of a training run: one table for the command line and for configuration files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ltloss._deprecation import renamed_fields, renamed_keys
from ltloss.errors import UserError, nearest
from ltloss.losses.defaults import RENAMED_OPTIONS
from ltloss.training.measure.class_groups import Thresholds
from ltloss.training.model.registry import LOSSES
from ltloss.training.stored_keys import FORMER_SETTINGS

PARALLEL = ("none", "class")
HEADS = ("linear", "mlp")

AUGMENTATIONS = ("none", "crop", "crop-flip", "randaugment")

# Of --fused-update: each dtype, named as in torch, with its ways of rounding; the first is the default.
PROTOTYPE_DTYPES: dict[str, tuple[str, ...]] = {
    "float32": (),
    "bfloat16": ("stochastic", "kahan", "nearest"),
    "float8_e4m3fn": ("stochastic", "nearest"),
}
STATE_DTYPES: dict[str, tuple[str, ...]] = {"float32": (), "bfloat16": ("stochastic", "nearest")}
ROUNDINGS = tuple(dict.fromkeys(way for ways in PROTOTYPE_DTYPES.values() for way in ways))
FUSED_SETTINGS = ("fused_update", "prototype_dtype", "state_dtype", "rounding")

# Defaults of --lr and --weight-decay. SGD's decay is part of the gradient; AdamW's is decoupled from it.
OPTIMIZERS = {"sgd": {"lr": 0.05, "weight_decay": 5e-4}, "adamw": {"lr": 0.002, "weight_decay": 0.05}}


_Allowed = tuple[str, Callable[[Any], bool]]  # the range in words, and the test of a value


def valid_schedule(text: str) -> bool:
    """Whether ``text`` is ``cosine`` or steps as WHEN:FACTOR,... in rising order."""
    if text == "cosine":
        return True
    try:
        pairs = schedule_steps(text)
    except ValueError:
        return False
    rising = [when for when, _ in pairs] == sorted({when for when, _ in pairs})
    return rising and all(0 < value < math.inf for pair in pairs for value in pair)


def schedule_steps(text: str) -> list[tuple[float, float]]:
    """(when, factor) of each step; ValueError unless the text has steps."""
    parts = [part.partition(":") for part in text.split(",")]
    return [(float(when), float(factor)) for when, _, factor in parts]


def _at_least(minimum: float) -> _Allowed:
    return f"at least {minimum}", lambda value: value >= minimum and math.isfinite(value)


def positive(value: float) -> bool:
    """Whether a number is finite and greater than 0."""
    return value > 0 and math.isfinite(value)


_POSITIVE: _Allowed = ("greater than 0", positive)
_FRACTION: _Allowed = ("in [0, 1)", lambda value: 0 <= value < 1)
_SCHEDULE: _Allowed = ("cosine, or rising WHEN:FACTOR pairs like 160:0.01,180:0.0001", valid_schedule)


def _option(default: Any, help: str, allowed: _Allowed | None = None, choices: tuple[str, ...] | None = None) -> Any:
    """One setting: its default, what --help says, and the range that ``Settings`` enforces."""
    return field(default=default, metadata={"help": help, "allowed": allowed, "choices": choices})


def _by_optimizer(name: str) -> str:
    return ", ".join(f"{values[name]:g} for {optimizer}" for optimizer, values in OPTIMIZERS.items())


@renamed_fields(**FORMER_SETTINGS)
@dataclass(frozen=True)
class Settings:
    """The settings of a run. Raises UserError for a value out of range or of the wrong type."""

    data: str = _option(
        "",
        "digits, a folder (FOLDER/<class>/*.png ...), a list of images (lines of path and label, or iNaturalist's "
        "json), FILE.npz with x_train, y_train, x_test, y_test, or embeddings in .npz, .npy, .safetensors or .parquet",
    )
    image_root: str | None = _option(None, "where the paths of a list of images begin (default: the list's folder)")
    loss: str = _option("long-tail", f"the loss: {', '.join(LOSSES)}", choices=tuple(LOSSES))
    backbone: str = _option("small-cnn", "small-cnn, resnet32, or a timm model as timm:NAME")
    init_from: str | None = _option(
        None, "a run, or a file of weights (.safetensors, .pt), whose backbone is where the training starts"
    )
    head: str = _option(
        "linear",
        "over embeddings: linear (whitens them, learns the prototypes only), or mlp (one hidden layer)",
        choices=HEADS,
    )
    imbalance: float = _option(1.0, "long tail: largest class / smallest class", _at_least(1))
    epochs: int = _option(30, "epochs", _at_least(1))
    batch_size: int = _option(64, "samples per batch, give or take one", _at_least(2))
    optimizer: str = _option("sgd", "sgd with momentum, or adamw", choices=tuple(OPTIMIZERS))
    lr: float = _option(None, f"peak learning rate (default: {_by_optimizer('lr')})", _POSITIVE)
    weight_decay: float = _option(
        None, f"weight decay, not on biases and norms (default: {_by_optimizer('weight_decay')})", _at_least(0)
    )
    decay_all: bool = _option(False, "let weight decay act on biases and norms too")
    momentum: float = _option(0.9, "momentum of SGD", _FRACTION)
    fused_update: bool = _option(False, "update the prototypes inside the backward: their gradient is never in memory")
    prototype_dtype: str = _option(
        "float32", "dtype of the prototypes, with --fused-update", choices=tuple(PROTOTYPE_DTYPES)
    )
    state_dtype: str = _option("float32", "dtype of their state, with --fused-update", choices=tuple(STATE_DTYPES))
    rounding: str | None = _option(
        None, "how prototypes and state below float32 are rounded (default: stochastic)", choices=ROUNDINGS
    )
    clip_norm: float | None = _option(
        None, "clip the gradients of a step to this norm, over all parameters (default: no clipping)", _POSITIVE
    )
    accumulate: int = _option(1, "batches whose gradients make one step", _at_least(1))
    ema: float = _option(
        0.0, "measure and keep a moving average of the weights, with this decay, say 0.999; 0: none", _FRACTION
    )
    warmup: float = _option(0.05, "fraction of the steps over which the learning rate rises to --lr", _FRACTION)
    schedule: str = _option(
        "cosine",
        "learning rate after the warm-up: cosine (to 0), or WHEN:FACTOR,... (WHEN: an epoch, or below 1 a fraction)",
        _SCHEDULE,
    )
    scale: float | None = _option(
        None, "scale of the cosine logits (default: 2 ln C, at least 8; 32 with --head linear)", _POSITIVE
    )
    margin: float | None = _option(
        None,
        "margin in radians; of cosface, ldam and cosine-space in units of the cosine (default: the loss's own)",
        _at_least(0),
    )
    tau: float | None = _option(
        None, "strength of the log prior on the training logits (default: the loss's own)", _at_least(0)
    )
    drw_start: float | None = _option(
        None,
        "weight classes by effective number from this epoch on (below 1: fraction of the epochs; 0: always)",
        _at_least(0),
    )
    beta: float = _option(0.9999, "beta of those weights", _FRACTION)
    mixup: float = _option(0.0, "mix pairs of images, with fractions from Beta(X, X); 0: no mixup", _at_least(0))
    loss_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "another option of the loss; may be repeated. The error for an unknown NAME lists all",
            "allowed": None,
            "choices": None,
        },
    )
    embedding_size: int = _option(64, "length of the feature vector", _at_least(1))
    embedding_norm: bool = _option(True, "batch normalisation of the feature vector")
    image_size: int | None = _option(
        None, "side in pixels (default: that of the data; folders: 64 if large)", _at_least(4)
    )
    channels: int | None = _option(None, "1 or 3 (default: those of the data)", ("1 or 3", lambda v: v in (1, 3)))
    augment: str = _option(
        "crop", "random shift by --crop-pad, and flip; randaugment: two of its operations first", choices=AUGMENTATIONS
    )
    crop_pad: int | None = _option(None, "largest shift in pixels (default: an eighth of the side)", _at_least(0))
    limit_per_class: int | None = _option(None, "use at most N training images per class", _at_least(1))
    limit_test: int | None = _option(None, "use at most N test images", _at_least(1))
    validation_fraction: float = _option(
        0.0, "fraction of each class's training images to hold out and measure after every epoch", _FRACTION
    )
    early_stopping: int | None = _option(
        None, "end after N epochs without a better validation, and keep the best one's weights", _at_least(1)
    )
    many_threshold: int = _option(100, "'many' classes have more training images than this", _at_least(0))
    few_threshold: int = _option(20, "'few' classes have fewer training images than this", _at_least(0))
    seed: int = _option(0, "seed of all random numbers", _at_least(0))
    data_seed: int | None = _option(
        None, "decides the long tail and the split of the data (default: --seed)", _at_least(0)
    )
    evaluate_every: int = _option(1, "measure the test split every N epochs", _at_least(1))
    device: str | None = _option(None, "cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    amp: bool | None = _option(None, "train in bfloat16 autocast (default: on a GPU)")
    parallel: str = _option(
        "none",
        "class: under torchrun, the classes spread over the processes and the backbone under DDP",
        choices=PARALLEL,
    )
    tensorboard: bool = _option(False, "write the numbers of metrics.csv for TensorBoard too, in RUN/tensorboard")
    workers: int = _option(4, "threads that decode images of a folder and run RandAugment", _at_least(1))

    def __post_init__(self) -> None:
        """Check types and ranges, so that no Settings object holds what a run cannot use."""
        for item in fields(self):
            object.__setattr__(self, item.name, checked(item.name, getattr(self, item.name)))
        for name, value in OPTIMIZERS[self.optimizer].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.optimizer != "sgd" and self.momentum != SETTINGS["momentum"].default:
            raise UserError(f"--momentum {self.momentum:g} is for SGD, --optimizer is {self.optimizer}; leave it out")
        if self.early_stopping is not None and not self.validation_fraction:
            raise UserError(
                "--early-stopping needs held-out images that are not the test images; add --validation-fraction 0.1"
            )
        _ = self.thresholds  # which refuses limits that overlap
        _check_fused(self)

    @property
    def thresholds(self) -> Thresholds:
        """What 'many' and 'few' mean in this run."""
        return Thresholds(self.many_threshold, self.few_threshold)

    @property
    def split_seed(self) -> int:
        """The seed of what is drawn of the data: the split, the long tail, the limits."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def roundings(self) -> tuple[str, ...]:
        """The ways in which prototypes and their state can be rounded, the default first; () where both are float32."""
        return PROTOTYPE_DTYPES[self.prototype_dtype] or STATE_DTYPES[self.state_dtype]

    @property
    def rounding_in_force(self) -> str | None:
        """How prototypes and state are rounded; None where both are float32."""
        return self.rounding or next(iter(self.roundings), None)

    @property
    def all_loss_options(self) -> dict[str, Any]:
        """``loss_options`` with scale, margin and tau, where they were given."""
        common = {"scale": self.scale, "margin": self.margin, "tau": self.tau}
        return {**{name: value for name, value in common.items() if value is not None}, **self.loss_options}


def _check_fused(settings: Settings) -> None:
    """Raise UserError if the settings of --fused-update contradict each other or the other settings."""
    if not settings.fused_update:
        for name in FUSED_SETTINGS[1:]:
            if getattr(settings, name) not in (None, "float32"):
                flag = f"--{name.replace('_', '-')}"
                raise UserError(
                    f"{flag} {getattr(settings, name)} needs --fused-update, whose optimizer rounds so that no step is "
                    f"lost; add that, or leave {flag} out"
                )
        return
    if settings.loss == "softmax":
        raise UserError(
            f"--fused-update moves prototypes, and --loss {settings.loss} has none; leave it out, or take another loss"
        )
    if (centers := settings.all_loss_options.get("sub_centers", 1)) != 1:
        raise UserError(
            f"--fused-update updates one prototype per class, and --loss-option sub_centers={centers} has more; leave "
            "one of them out"
        )
    if settings.clip_norm is not None:
        raise UserError(
            "--fused-update updates prototypes before all gradients are known, and --clip-norm needs the norm of all "
            "of them; leave one of them out"
        )
    if settings.accumulate != 1:
        raise UserError(
            "--fused-update updates the prototypes in every backward, and --accumulate needs several per step; "
            "leave one of them out, or take a larger --batch-size"
        )
    if settings.state_dtype != "float32" and settings.optimizer == "sgd" and not settings.momentum:
        raise UserError(f"--state-dtype {settings.state_dtype}: with --momentum 0 there is no state; leave it out")
    if settings.ema and settings.prototype_dtype != "float32":
        raise UserError(
            f"--ema averages in the dtype of the prototypes, and in --prototype-dtype {settings.prototype_dtype} its "
            "small steps would be rounded away; leave one of them out"
        )
    if settings.rounding is not None and settings.rounding not in settings.roundings:
        kept = f"--prototype-dtype {settings.prototype_dtype} and --state-dtype {settings.state_dtype}"
        choice = f"take {' or '.join(settings.roundings)}" if settings.roundings else "leave it out"
        raise UserError(f"--rounding {settings.rounding} is not possible with {kept}; {choice}")


SETTINGS = {item.name: item for item in fields(Settings)}
# A resumed run and its data may move (the images are compared). Every other setting would change its results.
MAY_CHANGE_ON_RESUME = ("data", "image_root", "device", "workers", "tensorboard")
# Settings that a comparison does not take: it holds images out itself, and its trainings have no run folder.
OF_A_RUN = ("validation_fraction", "early_stopping", "tensorboard")


def setting_type(name: str) -> type:
    """The type of a setting when it is given: bool, int, float, str or dict."""
    annotation = str(SETTINGS[name].type).removesuffix(" | None").partition("[")[0]
    return {"bool": bool, "int": int, "float": float, "str": str, "dict": dict}[annotation]


def checked(name: str, value: Any) -> Any:
    """Return the value of a setting as it is stored. UserError for another type or a value out of range."""
    item, expected_type = SETTINGS[name], setting_type(name)
    if value is None and item.default is None:
        return None
    if expected_type is float and type(value) is int:
        value = float(value)
    if type(value) is not expected_type:
        raise UserError(f"{name} must be of type {expected_type.__name__}; got {value!r}")
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise UserError(f"{name} must have at most 64 bits; got {value}")
    choices, allowed = item.metadata["choices"], item.metadata["allowed"]
    if choices and value not in choices:
        raise UserError(f"{name} {value!r} is unknown; {nearest(str(value), choices)}")
    if allowed and not allowed[1](value):
        raise UserError(f"{name} must be {allowed[0]}; got {value}")
    return value


def changed_settings(stored: Settings, given: Mapping[str, Any]) -> list[str]:
    """List the settings that prevent a resume with ``given``, as 'name (run: a, now: b)'. Epochs may grow."""
    differences = []
    for name, value in given.items():
        old, value = getattr(stored, name), checked(name, value)
        if name == "loss_options":
            was, value = stored.all_loss_options, renamed_keys(value, RENAMED_OPTIONS)
            differences += [f"{key} (run: {was.get(key)}, now: {v})" for key, v in value.items() if was.get(key) != v]
            continue
        allowed = name in MAY_CHANGE_ON_RESUME or (name == "epochs" and value >= old)
        if value != old and not allowed:
            differences.append(f"{name} (run: {old}, now: {value})")
    return differences
