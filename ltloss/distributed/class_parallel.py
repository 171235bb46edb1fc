"""``parallelize``: a loss module whose classes are spread over the ranks of a mesh."""

from __future__ import annotations

import copy
import inspect
import zlib
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ltloss._types import TopK
from ltloss._validation import check_count, check_number, check_type
from ltloss.distributed import collectives as comm
from ltloss.distributed.batch_gather import BatchGather, all_gather_metadata, gather_supervised
from ltloss.distributed.centers import ShardedCenters
from ltloss.distributed.layout import Layout, block_of_first_rank, gathered, local, mesh_device
from ltloss.distributed.logsumexp import ClassShard
from ltloss.distributed.sampling import ClassSampler, seeded
from ltloss.distributed.top_k import top_k
from ltloss.errors import DistributedError
from ltloss.float8 import FLOAT8, write_rows
from ltloss.losses.class_centers import ClassCenters
from ltloss.losses.prototype_head import PrototypeHead

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["ClassParallel", "in_one_piece", "parallelize", "shallow"]

Head = TypeVar("Head", bound=PrototypeHead)
Module = TypeVar("Module")

_DRAWN_TOGETHER = 4096  # classes whose first prototypes come from one generator
_OF_ALL_CLASSES = {  # hyper-parameters that a sample cannot serve, and why
    "label_smoothing": "it needs the logits of all classes",
    "min_angle_weight": "its gradient would move classes outside of the sample",
}


def parallelize(
    module: Head,
    mesh: DeviceMesh | None,
    *,
    capacity: int | None = None,
    averaged_backbone: bool = False,
    sample_rate: float = 1.0,
    sample_seed: int = 0,
    unbiased: bool = True,
    hard_negatives: int = 0,
    refresh: int = 100,
) -> Head:
    """Spread the classes of a loss module over the ranks of a mesh, in place. All ranks call it alike.

    Its parameters are new ones. Make the optimizer afterwards: one made before moves only the former ones, without a
    word.

    Args:
        module: any loss module of this package, the same on all ranks (the values of rank 0 count). Built with
            ``device="meta"`` its weight never exists in one piece: each rank draws its own prototypes, which are the
            same whatever the number of ranks.
        mesh: ``(class,)`` or ``(data, class)``, its ranks ascending, for instance of
            :func:`ltloss.distributed.class_mesh`; None for one process that initialised nothing.
        capacity: rows that no rank's batch ever exceeds. None allows any lengths and reads a few integers of each
            step's message on the host.
        averaged_backbone: True where DDP or FSDP divides the gradients of the backbone by the number of ranks: those
            of the features are multiplied by it, so that the backbone gets the gradient of the global batch.
        sample_rate: below 1, each training step takes the batch's own classes and random others up to this fraction of
            each rank's classes, and only their prototypes get gradients, which :class:`ltloss.distributed.SampledSGD`
            and :class:`ltloss.distributed.SampledAdamW` use. ``eval()`` computes with all classes. A loss of your own
            takes ``shard=None`` in its ``forward`` and hands it to ``logsumexp_stats`` or ``margin_cross_entropy``.
        sample_seed: with the step it decides which classes are drawn.
        unbiased: correct the logits of drawn classes by −log of the probability that they were drawn.
        hard_negatives: of each class of the batch so many nearest other classes, by the cosine of their prototypes, are
            in the sample for certain; 0 for none. They take at most half of the places that the batch's own classes
            leave, the nearest first, and random others the rest.
        refresh: steps for which the neighbours of a class are kept; then they are searched anew when a batch has it.

    Returns:
        The module. ``weight`` is a DTensor, ``Shard(0)`` over the class ranks; class centres likewise. Margins, priors,
        weights, counts and a bias (C,) stay whole on every rank, 4 to 8 bytes a class each. ``forward`` takes this
        rank's features and labels and returns the loss of the global batch (with ``reduction="none"``: the losses of
        this rank's samples); gradients equal those of one process. Every rank calls ``backward``, with the same
        factor. ``predict`` answers for this rank's features.

    Raises:
        ValueError, TypeError: bad arguments.
        DistributedError: the ranks have different modules.

    See also: :func:`ltloss.distributed.class_mesh`, which makes the mesh; :func:`in_one_piece`, the way back;
    :func:`ltloss.distributed.save_checkpoint`.

    Example:
        >>> from ltloss import ArcFaceLoss
        >>> from ltloss.distributed import class_mesh, parallelize
        >>> loss_fn = parallelize(ArcFaceLoss(100, 16), class_mesh())  # the same line under torchrun and without
    """
    if not isinstance(module, PrototypeHead):
        raise TypeError(f"module must be a loss module of ltloss; got {type(module).__name__}")
    if isinstance(module, ClassParallel):
        raise ValueError("module is parallel already")
    capacity = None if capacity is None else check_count("capacity, if not None,", capacity)
    _check_sampling(module, sample_rate)
    _check_hard_negatives(module, sample_rate, hard_negatives, refresh)
    if mesh is None and sample_rate == 1.0 and not module.weight.is_meta:
        return module
    layout = Layout(mesh, module.num_classes, mesh_device(mesh) if mesh is not None else _memory_of(module))
    sampling = [int(sample_rate * (1 << 53)), sample_seed, int(unbiased), hard_negatives, refresh]
    _check_same_module(module, layout, [capacity or 0, int(averaged_backbone), *sampling])
    kind: Any = type(module)
    module.__class__ = _parallel(kind)
    assert isinstance(module, ClassParallel)
    module.capacity, module.gradient_factor = capacity, float(layout.ranks) if averaged_backbone else 1.0
    module.sampler = None
    if sample_rate < 1.0:
        module.sampler = ClassSampler(sample_rate, sample_seed, unbiased, hard_negatives, refresh)
    module.rearrange(layout)
    _shard(module, layout)
    return module


def in_one_piece(module: Module) -> Module:
    """What :func:`parallelize` was given, with all classes on every rank; all ranks call it. For few classes only.

    Args:
        module: a parallel module, which stays as it is; any other is returned.

    Returns:
        An ordinary module with copies of the prototypes and centres as they are now, and with the same constants. Each
        rank uses it alone: ``logits`` of any number of batches sends nothing.

    See also: :func:`parallelize`, which spreads the classes.

    Example:
        >>> from ltloss import ArcFaceLoss
        >>> from ltloss.distributed import class_mesh, in_one_piece, parallelize
        >>> loss_fn = parallelize(ArcFaceLoss(100, 16), class_mesh(), sample_rate=0.5)
        >>> type(in_one_piece(loss_fn)).__name__
        'ArcFaceLoss'
    """
    if not isinstance(module, ClassParallel):
        return module
    whole: Any = shallow(module)
    whole.__class__ = type(module).__bases__[1]
    for name in ClassParallel.__annotations__:
        del whole.__dict__[name]
    with torch.inference_mode(False), torch.no_grad():
        for part in ("_parameters", "_buffers", "_modules"):
            setattr(whole, part, {name: _gathered(tensor) for name, tensor in getattr(module, part).items()})
    return whole  # type: ignore[no-any-return]


def shallow(module: Module) -> Module:
    """A module of its own that shares every tensor."""
    copied = copy.copy(module)
    for name, part in vars(copied).items():  # also what a head knows of its constants
        if isinstance(part, dict | set):
            vars(copied)[name] = part.copy()
    return copied


def _gathered(part: Any) -> Any:
    """A tensor in memory of its own, all of it; of class centres those of one process."""
    if isinstance(part, ShardedCenters):
        return part.in_one_piece()
    if not isinstance(part, Tensor):
        return part
    whole = gathered(part) if hasattr(part, "device_mesh") else part.clone()
    return nn.Parameter(whole, part.requires_grad) if isinstance(part, nn.Parameter) else whole


@cache
def _parallel(kind: Any) -> Any:
    """The class of a parallel module of this class."""
    takes_shard = "shard" in inspect.signature(kind.forward).parameters
    content = {"__doc__": kind.__doc__, "takes_shard": takes_shard}
    return type(f"ClassParallel{kind.__name__}", (ClassParallel, kind), content)


def _check_sampling(module: PrototypeHead, rate: float) -> None:
    check_number("sample_rate", rate, above=0.0, at_most=1.0)
    if rate == 1.0:
        return
    kind: Any = type(module)
    if not _parallel(kind).takes_shard:
        raise TypeError(
            f"sample_rate < 1 needs a loss that hands its sample on, forward(features, labels, *, shard=None); "
            f"{kind.__name__}.forward takes no shard"
        )
    for name in _OF_ALL_CLASSES:
        _check_sampled(name, getattr(module, name, 0.0))


def _check_sampled(name: str, value: Any) -> None:
    if name in _OF_ALL_CLASSES and value:
        raise ValueError(f"sample_rate < 1 needs {name}=0, for {_OF_ALL_CLASSES[name]}; got {name}={value}")


def _check_hard_negatives(module: PrototypeHead, rate: float, count: int, refresh: int) -> None:
    check_count("refresh", refresh)
    check_type("hard_negatives", count, int)
    if not 0 <= count < module.num_classes:
        raise ValueError(
            f"hard_negatives must lie between 0 and the number of other classes, {module.num_classes - 1}; got {count}"
        )
    if count and module.sub_centers > 1:
        raise ValueError(
            f"hard_negatives={count} needs one prototype a class, for the search compares prototypes; got "
            f"sub_centers={module.sub_centers}"
        )
    if count and rate == 1.0:
        raise ValueError(f"hard_negatives={count} needs sample_rate < 1; with sample_rate=1 all classes are negatives")


def _memory_of(module: PrototypeHead) -> torch.device:
    return torch.device("cpu") if module.weight.is_meta else module.weight.device


def _check_same_module(module: PrototypeHead, layout: Layout, numbers: list[int]) -> None:
    options = f"{type(module).__name__}({module.extra_repr()})"
    for name, one in module.named_parameters(recurse=False):
        options += f", {name} of {one.dtype}, requires_grad={one.requires_grad}, is_meta={one.is_meta}"
    numbers = [module.num_classes, module.embedding_size, zlib.crc32(options.encode()), *numbers]
    rows = all_gather_metadata(numbers, None, layout.group, layout.device)
    different = [rank for rank, row in enumerate(rows) if row != rows[0]]
    if different:
        raise DistributedError(
            f"the module and the options of parallelize must be the same on all ranks; those of rank 0 are not shared "
            f"by {different}. Rank {layout.rank} has {options}, and numbers {rows[layout.rank]}"
        )


def _shard(module: ClassParallel, layout: Layout) -> None:
    weight, exponent = module.weight, module.weight_exponent
    module.weight = nn.Parameter(block_of_first_rank(weight, layout), requires_grad=weight.requires_grad)
    if exponent is not None:
        module.weight_exponent = block_of_first_rank(exponent, layout)
    if weight.is_meta:
        module._draw_prototypes()
    for name, parameter in module.named_parameters(recurse=False):
        if name != "weight":  # whole on every rank, with the gradient of all
            values = comm.broadcast(parameter.detach().to(layout.device, copy=True), 0, layout.group)
            setattr(module, name, nn.Parameter(values, parameter.requires_grad))
    for name, child in module.named_children():
        if isinstance(child, ClassCenters):
            setattr(module, name, ShardedCenters(child, layout))
    for name, buffer in module.named_buffers(recurse=False):
        if name == "weight_exponent":
            continue
        buffer = torch.zeros_like(buffer, device=layout.device) if buffer.is_meta else buffer.to(layout.device)
        module._buffers[name] = comm.broadcast(buffer, 0, layout.group)


class ClassParallel(PrototypeHead):
    """The methods that :func:`parallelize` adds to a module: the batch is gathered, and all ranks predict together.

    Attributes:
        layout: which rank has which classes.
        sampler: draws the classes of a step where ``sample_rate`` < 1, else None. Its ``step`` belongs to a checkpoint.

    See also: :func:`parallelize`, which makes it.

    Example:
        >>> from ltloss import CosFaceLoss
        >>> from ltloss.distributed import ClassParallel, parallelize
        >>> isinstance(parallelize(CosFaceLoss(10, 4), None, sample_rate=0.5), ClassParallel)
        True
    """

    layout: Layout
    capacity: int | None
    gradient_factor: float
    batch: BatchGather
    queries: BatchGather
    sampler: ClassSampler | None
    takes_shard = False  # whether ``forward`` of the loss can be handed the shard

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """For copies and pickles: the class was made by :func:`parallelize`, and can be made again."""
        return _empty, (type(self).__bases__[1],), self.__getstate__()

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("sampler") is not None:
            _check_sampled(name, value)
        super().__setattr__(name, value)

    def rearrange(self, layout: Layout) -> None:
        """Take another layout: what the ranks had agreed on is forgotten."""
        self.layout = layout
        self.batch = BatchGather(layout, self.capacity, self.gradient_factor)
        self.queries = BatchGather(layout)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of the global batch from this rank's features (n, D) and labels (n,). All ranks call it."""
        ignore_index: int = getattr(self, "ignore_index", -100)
        batch = gather_supervised(self.batch, features, self.weight, labels, ignore_index)
        options = {"shard": ClassShard(self.layout)} if self.takes_shard else {}  # the others ask the DTensor
        if self.sampler is not None and self.training:
            options["shard"] = self.sampler.draw(batch.labels, self.weight, self.layout)
        loss: Tensor = super().forward(batch.features, batch.labels, **options)
        if loss.dim() == 0:
            return loss
        return _OwnLosses.apply(loss, batch.own, batch.real, self.layout)  # type: ignore[no-any-return, no-untyped-call]

    def logits(self, features: Tensor) -> Tensor:
        """Compute the dense logits (n, C) of this rank's features (n, D). All ranks call it.

        Each call gathers the whole weight, so use it for few classes; for many calls use the module of
        :func:`in_one_piece`. The gradient of the weight is that of the sum over ranks of what each computes from its
        logits; a bias gets the gradient of this rank only.
        """
        from torch.distributed.tensor import Partial

        weight: Any = self.weight
        mesh = self.layout.mesh
        if mesh is None:
            return self._dense_logits(features, weight)
        if weight.dtype == FLOAT8:  # which has no gradient
            return self._dense_logits(features, gathered(weight))
        whole = weight.full_tensor(grad_placements=[Partial()] * mesh.ndim)
        return self._dense_logits(features, whole)

    @torch.no_grad()
    def predict(self, features: Tensor, k: int = 1) -> TopK:
        """Find the k classes with the largest cosine to this rank's features (n, D). All ranks call it with one k.

        Returns ``TopK(cosine, index)``, (n, k) each.
        """
        return top_k(features, self.weight, k, self.queries, **self._logit_options())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As the loss does; of parameters that every rank holds whole the values of rank 0 count."""
        super().reset_parameters()
        for name, parameter in self.named_parameters(recurse=False):
            if name != "weight":
                comm.broadcast(parameter.detach(), 0, self.layout.group)

    def replaced(self) -> None:
        """As in one process; the nearest classes are searched anew."""
        super().replaced()
        if self.sampler is not None and self.sampler.neighbours is not None:
            self.sampler.neighbours.forget()

    @torch.no_grad()
    def _draw_prototypes(self) -> None:
        """Draw the prototypes anew, each rank its own; which they are does not depend on the number of ranks."""
        layout, own = self.layout, local(self.weight)
        exponent = None if self.weight_exponent is None else local(self.weight_exponent)
        seed = comm.broadcast(torch.randint(1 << 62, (1,)).to(layout.device), 0, layout.group)
        start, stop = layout.span()
        for number in range(start // _DRAWN_TOGETHER, -(-stop // _DRAWN_TOGETHER)):
            first = number * _DRAWN_TOGETHER
            drawn = self._drawn_block((_DRAWN_TOGETHER, *own.shape[1:]), seeded(int(seed), number))
            low, high = max(first, start), min(first + _DRAWN_TOGETHER, stop)
            write_rows(own, exponent, low - start, drawn[low - first : high - first])


def _empty(kind: Any) -> PrototypeHead:
    made: PrototypeHead = object.__new__(_parallel(kind))
    return made


class _OwnLosses(torch.autograd.Function):
    """This rank's samples of the losses (N,), of which every rank needs the upstream gradients of all."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, own: slice, count: int, layout: Layout) -> Tensor:
        ctx.layout, ctx.shape, ctx.rows = layout, losses.shape, own.stop - own.start
        return losses[own.start : own.start + count].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        padded = grad_outputs[0].new_zeros(ctx.rows)
        padded[: grad_outputs[0].shape[0]] = grad_outputs[0]
        return comm.all_gather(padded, ctx.layout.group).view(ctx.shape), None, None, None
