"""The settings of ``--fused-update``: dtypes of prototypes and state, their rounding, and which settings exclude it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ltloss.errors import UserError

if TYPE_CHECKING:
    from ltloss.training.run.settings import Settings

__all__ = ["FUSED_SETTINGS", "PROTOTYPE_DTYPES", "ROUNDINGS", "STATE_DTYPES", "check_fused", "rounding_in_force"]

# Each dtype, named as in torch, with its ways of rounding; the first is the default.
PROTOTYPE_DTYPES: dict[str, tuple[str, ...]] = {
    "float32": (),
    "bfloat16": ("stochastic", "kahan", "nearest"),
    "float8_e4m3fn": ("stochastic", "nearest"),
}
STATE_DTYPES: dict[str, tuple[str, ...]] = {"float32": (), "bfloat16": ("stochastic", "nearest")}
ROUNDINGS = tuple(dict.fromkeys(way for ways in PROTOTYPE_DTYPES.values() for way in ways))
FUSED_SETTINGS = ("fused_update", "prototype_dtype", "state_dtype", "rounding")


def check_fused(settings: Settings) -> None:
    """Raise UserError if these settings contradict each other or the other settings."""
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
    if settings.mixup:
        raise UserError(
            "--fused-update needs one loss per step, and --mixup computes two, the second from prototypes that would "
            "have changed; leave one of them out"
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
    if settings.rounding is not None and settings.rounding not in _ways(settings):
        kept = f"--prototype-dtype {settings.prototype_dtype} and --state-dtype {settings.state_dtype}"
        choice = f"take {' or '.join(_ways(settings))}" if _ways(settings) else "leave it out"
        raise UserError(f"--rounding {settings.rounding} is not possible with {kept}; {choice}")


def rounding_in_force(settings: Settings) -> str | None:
    """How prototypes and state are rounded; None where both are float32."""
    return settings.rounding or next(iter(_ways(settings)), None)


def _ways(settings: Settings) -> tuple[str, ...]:
    return PROTOTYPE_DTYPES[settings.prototype_dtype] or STATE_DTYPES[settings.state_dtype]
