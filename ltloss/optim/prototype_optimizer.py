"""The base class of the prototype optimizers: the update of a slab inside the backward, and the cases it refuses."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ltloss._types import TakeGradient
from ltloss._validation import check_number, is_integer
from ltloss.distributed.layout import Layout, copy_rows, local
from ltloss.float8 import decoded
from ltloss.losses.prototype_head import PrototypeHead
from ltloss.numerics import compute_dtype
from ltloss.optim.rounding import Rounding, check_dtypes
from ltloss.optim.slabs import Moving, Slabs

if TYPE_CHECKING:
    from ltloss_kernels import PrototypeUpdate

__all__ = ["PrototypeOptimizer", "Rounding", "UpdateOptions"]


class UpdateOptions(TypedDict, total=False):
    """What all of them take besides their own settings; see :class:`ltloss.optim.PrototypeSGD`."""

    state_dtype: torch.dtype | None
    rounding: Rounding | None
    seed: int
    max_class_norm: float | None
    grad_scaler: torch.amp.GradScaler | None


class PrototypeOptimizer(torch.optim.Optimizer):
    """Base class: updates the prototypes of a loss module inside the backward, a slab of classes at a time.

    A subclass names its state and defines the update of some rows. See :class:`ltloss.optim.PrototypeSGD`.
    """

    _step_supports_amp_scaling = True  # a GradScaler's scale is divided out here, see ``grad_scaler``

    def __init__(
        self,
        module: PrototypeHead,
        defaults: dict[str, Any],
        *,
        state_dtype: torch.dtype | None = None,
        rounding: Rounding | None = None,
        seed: int = 0,
        max_class_norm: float | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        _check_free(module)
        weight = module.weight
        if weight.is_meta:
            raise ValueError("module must not be on device 'meta', because the state is allocated here; got it there")
        check_dtypes(weight.dtype, state_dtype, rounding)
        if max_class_norm is not None:
            check_number("max_class_norm", max_class_norm, above=0.0)
        if not is_integer(seed) or not 0 <= (seed := int(seed)) < 1 << 63:
            raise ValueError(f"seed must be an integer in [0, 2^63); got {seed!r}")
        self._module = weakref.ref(module)
        self._state_dtype = state_dtype or compute_dtype(weight)
        self.rounding = rounding
        self._scaler = grad_scaler
        super().__init__([weight], {**defaults, "max_class_norm": max_class_norm, "seed": seed})
        self.state[weight] = self._fresh_state(weight)
        # A compiler would move the update out of the backward, or drop it.
        self.run: Callable[..., Any] = torch.compiler.disable(self._run)  # type: ignore[no-untyped-call]
        self.joined: Callable[[Tensor], Tensor] = torch.compiler.disable(self._joined)  # type: ignore[no-untyped-call]
        self._exponent: Tensor | None = None  # of float8 prototypes, as the last forward pass found it
        self._anchor = torch.empty(0, requires_grad=True)
        self._passes: weakref.WeakSet[Any] = weakref.WeakSet()  # forward passes whose backward may still come
        self._moves = 0  # how many backwards moved the prototypes
        self._loaded: int | None = None  # ``_moves`` when load_state_dict filled the state
        self._moved = False  # since the last step()
        self._gradient: Tensor | None = None  # what other terms add to the next update
        self._skipped = torch.zeros((), dtype=torch.int64, device=weight.device)
        self._told = 0
        module.fused_update = self

    # The state

    def _fresh_state(self, weight: Tensor) -> dict[str, Tensor]:
        layout, own = Layout.of(weight), local(weight)
        state = {"step": torch.zeros((), dtype=torch.float32, device=own.device)}
        for name, columns in self._needs().items():
            state[name] = layout.zeros(*weight.shape[1 : 1 + columns], dtype=self._state_dtype)
        if self.rounding == "kahan":
            state["compensation"] = layout.zeros(*weight.shape[1:], dtype=weight.dtype)
        return state

    def _needs(self) -> dict[str, bool]:
        """The state by name, and whether it has columns as the weight has."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The prototypes (C, D)."""
        (weight,) = self.param_groups[0]["params"]
        return weight  # type: ignore[no-any-return]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The one group of the prototypes; any other parameter belongs to an optimizer of its own."""
        if self.param_groups:
            raise ValueError(
                f"{type(self).__name__} updates the prototypes of one loss module; give other parameters to an "
                "optimizer of their own"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over settings and state; the dtypes of the state stay those of this optimizer."""
        here, (saved,) = dict(self.state[self.weight]), state_dict["state"].values()
        if set(saved) != set(here):
            raise ValueError(f"state_dict must hold {sorted(here)} of the prototypes; got {sorted(saved)}")
        for name, tensor in here.items():
            if tensor.shape != saved[name].shape:
                raise ValueError(
                    f"{name} in state_dict must have the shape {tuple(tensor.shape)}; got {tuple(saved[name].shape)}"
                )
        super().load_state_dict(state_dict)
        for name, tensor in here.items():
            tensor.copy_(saved[name])  # torch.optim would give it the dtype of the prototypes
        self.state[self.weight] = here
        self._moves += 1
        self._loaded = self._moves

    def take_over(self, larger: PrototypeHead) -> None:
        """Go on with the head that :func:`ltloss.distributed.add_classes` made of this one's; all ranks call it alike.

        The old classes keep their state; that of the new ones is as if their gradients had been zero so far. Settings,
        schedulers and a GradScaler stay. The former head has no optimizer after it.

        Raises:
            TypeError, ValueError: no such head, or it has an optimizer already; nothing was changed then.
        """
        _check_free(larger)
        former, weight = self.weight, larger.weight
        alike = weight.dtype == former.dtype and weight.shape[1:] == former.shape[1:]
        if not alike or weight.shape[0] < former.shape[0] or Layout.of(weight).mesh != Layout.of(former).mesh:
            raise ValueError(
                f"larger must be a head that add_classes made of prototypes {tuple(former.shape)} in {former.dtype}; "
                f"got {tuple(weight.shape)} in {weight.dtype}"
            )
        state = self._fresh_state(weight)
        for name, tensor in self.state.pop(former).items():
            if tensor.dim():
                copy_rows(tensor, state[name])
            else:
                state[name] = tensor
        self.release()
        self.param_groups[0]["params"], self.state[weight] = [weight], state
        self._module, self._gradient, self._moves = weakref.ref(larger), None, self._moves + 1
        larger.fused_update = self

    # What a loss calls

    @torch.no_grad()
    def replaced(self) -> None:
        """Reset the Kahan compensation after the prototypes were overwritten. Loading and importing call it.

        A compensation from ``load_state_dict`` is kept until the next step: it belongs to the prototypes that are
        loaded afterwards.
        """
        compensation = self.state[self.weight].get("compensation")
        if compensation is not None and self._loaded != self._moves:
            local(compensation).zero_()

    def reads(self, prototypes: Tensor) -> Tensor:
        """The prototypes without a gradient, for a pass that ends in the update."""
        if prototypes is not self.weight:
            raise ValueError(
                f"these are not the prototypes that {type(self).__name__} was made for; make it after parallelize and "
                "anything else that replaces loss_fn.weight, and call take_over after add_classes"
            )
        wrapper: Any = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
        if wrapper is not None:
            raise RuntimeError(
                f"{type(self).__name__} would move the prototypes of each process by its own samples inside "
                "DistributedDataParallel. Wrap the backbone alone, and call ltloss.distributed.parallelize before the "
                "optimizer is made"
            )
        module = self._module()
        self._exponent = None if module is None else module.weight_exponent
        return prototypes.detach()

    def _run(self, function: Any, *arguments: Any) -> Any:
        """Call ``function.apply`` with an extra leaf, whose gradient is requested when the prototypes are trained."""
        return function.apply(*arguments, self, self._anchor)

    def watch(self, node: Any) -> None:
        """Remember a forward pass, weakly: the node is freed with its graph."""
        node.moves = self._moves
        self._passes.add(node)

    def _joined(self, loss: Tensor) -> Tensor:
        """Return the prototypes for a further term of ``loss``. Its gradient is added before the update."""
        weight = self.weight
        if hasattr(weight, "device_mesh"):
            raise ValueError(
                f"{type(self).__name__} allows no further term on prototypes that are spread over ranks, because its "
                "gradient crosses ranks; leave the term out (min_angle_weight=0)"
            )
        plain = weight.detach() if self._exponent is None else decoded(weight.detach(), self._exponent)
        return _Joined.apply(plain, loss, self)  # type: ignore[no-any-return,no-untyped-call]

    def join(self, gradient: Tensor) -> None:
        """Keep the gradient (C, D) of a further term for the update of this backward."""
        self._gradient = gradient if self._gradient is None else self._gradient + gradient

    def begin(self, node: Any, upstream: Tensor, shard: Any) -> TakeGradient | PrototypeUpdate | None:
        """Start the update: return the callable that takes the gradients (rows, D) of classes [start, stop).

        Returns None if the gradients are not finite, or if only others are requested (``torch.autograd.grad``).
        If the kernels can update the prototypes themselves, returns what they need; the host then does not wait for the
        device. ``upstream``: all factors of the gradients of the samples. Raises RuntimeError, before anything has
        changed, if the update is not possible.
        """
        joined, self._gradient = self._gradient, None
        if not _runs(self._anchor):
            return None
        self._refuse(node)
        self._moved, self._moves = True, self._moves + 1
        self._passes.discard(node)
        finite, moving = upstream.isfinite().all(), self._moving()
        if joined is None and node.backend == "triton" and upstream.shape[1] and _in_one_piece(shard):
            update = self._in_kernels(moving, finite)
            if update is not None:
                return update
        if joined is not None:
            finite = finite & joined.isfinite().all()
        if not bool(finite):
            self._skipped += 1
            return None
        return Slabs(moving, self.move, self.inverse_scale(), shard, joined).take

    def _moving(self) -> Moving:
        (group,), weight = self.param_groups, self.weight
        state = {name: local(tensor) for name, tensor in self.state[weight].items()}
        step, compensation = state.pop("step"), state.pop("compensation", None)
        rounding = self.rounding or "stochastic"  # of bfloat16 state beside float32 prototypes
        exponent = None if self._exponent is None else local(self._exponent)
        first_class = Layout.of(weight).span()[0]
        own, most = local(weight), group["max_class_norm"]
        return Moving(own, exponent, state, compensation, step, rounding, group["seed"], first_class, most)

    def _in_kernels(self, moving: Moving, finite: Tensor) -> PrototypeUpdate | None:
        """Return the update for the kernels, or None if they do not support the memory layout."""
        from ltloss_kernels import PrototypeUpdate

        own, lr = moving.weight, self.param_groups[0]["lr"]
        kept = [own, *moving.state.values(), *(t for t in (moving.compensation, moving.exponent) if t is not None)]
        if not all(tensor.is_contiguous() for tensor in kept) or not own.shape[0] or moving.step.device != own.device:
            return None
        scaler = self._scaler if self._scaler is not None and self._scaler.is_enabled() else None
        rule, settings = self.rule()
        return PrototypeUpdate(
            rule,
            settings,
            lr if isinstance(lr, Tensor) and lr.device == own.device else float(lr),
            own,
            tuple(moving.state.values()),
            moving.compensation,
            moving.rounding,
            moving.seed,
            moving.first_class,
            finite,
            moving.step,
            self._skipped,
            moving.max_class_norm,
            None if scaler is None else scaler._scale,
            moving.exponent,
        )

    def _refuse(self, node: Any) -> None:
        weight, name = self.weight, type(self).__name__
        if self._moved:
            raise RuntimeError(
                f"a second backward before {name}.step(): the prototypes moved with the first. Gradients cannot be "
                "accumulated over several backwards; use one larger batch"
            )
        if node.moves != self._moves:
            raise RuntimeError(
                "the prototypes have moved since this loss was computed; call backward once, before the next step"
            )
        if any(other is not node and _runs(other) for other in self._passes):
            raise RuntimeError(
                f"two losses of one backward read the prototypes that {name} moves; compute one loss over all samples"
            )
        if weight.grad is not None or _runs(weight):
            raise RuntimeError(
                f"another term of the loss has a gradient for the prototypes, which {name} would leave out; compute "
                "that term from optimizer.joined(loss) instead of the weight, or use torch.optim"
            )

    # What a training loop calls

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """End the step. The prototypes were updated in the backward.

        Args:
            closure: as in ``torch.optim``: called first, returns the loss.

        Returns:
            The result of ``closure``, or None.

        Raises:
            RuntimeError: no backward came since the last call; or a GradScaler calls that is not ``grad_scaler``.
        """
        if self._scaler is None and self.__dict__.pop("found_inf", None) is not None:  # GradScaler.step sets it
            raise RuntimeError(
                "grad_scaler must be the GradScaler of the loss; got None: the prototypes moved by a scaled gradient"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._moved:
            raise RuntimeError(
                f"{type(self).__name__}.step() without a backward since the last one: prototypes move in the "
                "backward of their loss module"
            )
        self._moved = False
        if self._scaler is None and self._skipped.device.type == "cpu" and self.skipped_steps > self._told:
            warnings.warn(
                f"gradients of the prototypes were not finite: {self.skipped_steps} steps skipped so far", stacklevel=2
            )
            self._told = self.skipped_steps
        return loss

    @property
    def skipped_steps(self) -> int:
        """The number of backwards that changed nothing, because a gradient was NaN or infinite."""
        return int(self._skipped)

    def release(self) -> None:
        """Detach from the module: its backward computes the gradient of the prototypes again."""
        module = self._module()
        if module is not None and module.fused_update is self:
            module.fused_update = None

    # The arithmetic

    def inverse_scale(self) -> float | None:
        """What undoes the scale of the GradScaler."""
        return None if self._scaler is None else 1.0 / self._scaler.get_scale()

    def rule(self) -> tuple[Any, tuple[float, ...]]:
        """Name and settings of the update in ``ltloss_kernels.PrototypeUpdate``."""
        raise NotImplementedError

    def move(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], step: Tensor) -> None:
        """Move some prototypes (rows, D) and their state, all in float32 (or float64), in place."""
        raise NotImplementedError


def _runs(place: Any) -> bool:
    """Whether a node, or that of a leaf, is part of the backward under way."""
    node = torch.autograd.graph.get_gradient_edge(place).node if isinstance(place, Tensor) else place
    return bool(torch._C._will_engine_execute_node(node))


class _Joined(torch.autograd.Function):
    """The prototypes as a function of the loss, so that the loss waits for the gradient of what is made of them."""

    @staticmethod
    def forward(ctx: Any, prototypes: Tensor, loss: Tensor, optimizer: PrototypeOptimizer) -> Tensor:
        ctx.optimizer = optimizer
        return prototypes.view_as(prototypes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        ctx.optimizer.join(gradients[0])
        return None, None, None


def _in_one_piece(shard: Any) -> bool:
    """Whether the gradient of the classes at hand is whole, and they are next to each other."""
    return shard is None or (shard.index is None and shard.layout.data_group is None)


def _check_free(module: PrototypeHead) -> None:
    if not isinstance(module, PrototypeHead):
        raise TypeError(f"module must be a loss module of ltloss; got {type(module).__name__}")
    if module.fused_update is not None:
        raise ValueError(
            f"module already has a {type(module.fused_update).__name__}; call its release() before making another"
        )
    if module.weight.dim() > 2:
        raise ValueError(
            "module must have one prototype per class, (C, D), to be updated inside the backward; got sub-centres "
            f"{tuple(module.weight.shape)}; use an optimizer of torch.optim"
        )
