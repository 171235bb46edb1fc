"""Who holds which classes and which rows of the batch. Everything follows from the mesh, C and the rank."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ltloss._validation import check_count
from ltloss.distributed import collectives as comm
from ltloss.errors import DistributedError
from ltloss.float8 import FLOAT8

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "Layout",
    "block_of_first_rank",
    "blocks",
    "class_mesh",
    "copy_rows",
    "gathered",
    "local",
    "mesh_device",
    "own_part",
]


def class_mesh(data: int = 1, *, device_type: str | None = None) -> DeviceMesh | None:
    """Make the device mesh over all ranks of this job.

    Args:
        data: the number of groups that share the batch, each with all classes. 1 gives the mesh ``("class",)``, more
            the mesh ``("data", "class")``.
        device_type: ``"cuda"`` or ``"cpu"``; None follows the backend of the default group.

    Returns:
        The mesh, or None if ``torch.distributed`` is not initialised.

    Raises:
        ValueError: ``data`` is no whole number from 1, or does not divide the number of ranks.
        DistributedError: torchrun started several ranks, and ``torch.distributed`` was not initialised.

    See also: :func:`ltloss.distributed.parallelize`, which takes the mesh.

    Example:
        >>> from ltloss.distributed import class_mesh
        >>> class_mesh() is None  # a single process that initialised nothing
        True
    """
    check_count("data", data)
    if not (dist.is_available() and dist.is_initialized()):
        started = os.environ.get("WORLD_SIZE", "1") if dist.is_available() and dist.is_torchelastic_launched() else "1"
        if started != "1":  # each rank would train alone, with all classes
            raise DistributedError(
                f"torchrun started {started} ranks; call torch.distributed.init_process_group before class_mesh"
            )
        return None
    from torch.distributed.device_mesh import init_device_mesh

    ranks = dist.get_world_size()
    if ranks % data:
        raise ValueError(f"data must divide the number of ranks, {ranks}; got {data}")
    if device_type is None:
        # Not get_backend, which is "undefined" where init_process_group chose the backend.
        device_type = "cuda" if "nccl" in dist.get_backend_config() else "cpu"
    if data == 1:
        return init_device_mesh(device_type, (ranks,), mesh_dim_names=("class",))
    return init_device_mesh(device_type, (data, ranks // data), mesh_dim_names=("data", "class"))


def own_part(tensor: Any) -> Tensor:
    """This rank's part of a DTensor as a function of it; any other tensor as it is."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "device_mesh") else tensor  # torch.compile misses `to_local`
    return part


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor as it is. Without a gradient."""
    return own_part(tensor).detach()  # in this order: a DTensor cannot be detached in inference mode


@dataclass(frozen=True)
class Layout:
    """Classes in equal consecutive blocks over the class ranks, as DTensor's ``Shard(0)`` puts them.

    The rows of the global batch stand in the order of the ranks of the mesh, equally many of each. ``data`` groups
    share them: a rank multiplies the rows of its own group with its own classes.
    """

    mesh: DeviceMesh | None  # None: one process that initialised nothing
    num_classes: int
    device: torch.device
    class_ranks: int = field(init=False)  # how many share the classes
    class_rank: int = field(init=False)  # this rank's place among them
    class_group: Any = field(init=False)  # the ranks that together hold all classes; None for one process
    data_ranks: int = field(init=False)  # how many groups share the batch
    data_rank: int = field(init=False)  # this rank's group
    data_group: Any = field(init=False)  # the ranks that hold the same classes, or None on a mesh of one dimension
    group: Any = field(init=False)  # all ranks of the mesh, in its order

    def __post_init__(self) -> None:
        # At once: torch.compile cannot trace how a cached property is filled.
        classes, data = (_dimension(self.mesh, place) for place in (-1, -2))
        group = classes[2] if data[2] is None else _group_of_all(self.mesh)
        names = "class_ranks class_rank class_group data_ranks data_rank data_group group"
        for name, value in zip(names.split(), (*classes, *data, group), strict=True):
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, prototypes: Tensor) -> Layout:
        """The layout of prototypes (C, D) that :func:`ltloss.distributed.parallelize` made."""
        return cls(getattr(prototypes, "device_mesh", None), prototypes.shape[0], prototypes.device)

    # Groups cannot be copied or pickled; they are found again from the mesh.
    def __deepcopy__(self, memo: dict[int, Any]) -> Layout:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.mesh, self.num_classes, self.device, type(self))

    @property
    def placements(self) -> list[Any]:
        """DTensor placements of the prototypes."""
        from torch.distributed.tensor import Replicate, Shard

        return [Shard(0)] if self.data_group is None else [Replicate(), Shard(0)]

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Zeros (C, *shape), placed as the classes are."""
        start, stop = self.span()
        return self.place(torch.zeros(stop - start, *shape, dtype=dtype, device=self.device))

    def place(self, own: Tensor) -> Tensor:
        """The tensor (C, ...) of which ``own`` is this rank's block."""
        if self.mesh is None:
            return own
        from torch.distributed.tensor import DTensor

        whole = torch.Size((self.num_classes, *own.shape[1:]))
        stride = own.new_empty(1, *own.shape[1:]).stride()
        placed: Tensor = DTensor.from_local(own, self.mesh, self.placements, shape=whole, stride=stride)
        return placed

    @property
    def ranks(self) -> int:
        """How many ranks the mesh has."""
        return self.data_ranks * self.class_ranks

    @property
    def rank(self) -> int:
        """This rank's place in the order of the mesh."""
        return self.data_rank * self.class_ranks + self.class_rank

    @property
    def block(self) -> int:
        """Classes per rank; the last ranks may hold fewer, even none."""
        return -(-self.num_classes // self.class_ranks)

    def span(self, class_rank: int | None = None) -> tuple[int, int]:
        """(start, stop) of the classes of a class rank, by default this one."""
        rank = self.class_rank if class_rank is None else class_rank
        start = min(rank * self.block, self.num_classes)
        return start, min(start + self.block, self.num_classes)

    def size(self, class_rank: int) -> int:
        """How many classes a class rank holds."""
        start, stop = self.span(class_rank)
        return stop - start

    def group_rows(self, rows: int) -> slice:
        """The rows of this rank's data group among ``rows`` of the global batch."""
        size = rows // self.data_ranks
        return slice(self.data_rank * size, (self.data_rank + 1) * size)

    def own_rows(self, rows: int) -> slice:
        """The rows that came from this rank."""
        size = rows // self.ranks
        return slice(self.rank * size, (self.rank + 1) * size)

    def local_index(self, classes: Tensor) -> Tensor:
        """Class indices counted from this rank's first class, -1 for those of other ranks."""
        start, stop = self.span()
        return torch.where((classes >= start) & (classes < stop), classes - start, -1)


def blocks(tensor: Tensor) -> Iterator[Tensor]:
    """The blocks of a tensor (C, ...) one after the other, on every rank; an ordinary tensor is one block."""
    if not hasattr(tensor, "device_mesh"):
        yield tensor.detach()
        return
    layout, own = Layout.of(tensor), local(tensor)
    for class_rank in range(layout.class_ranks):
        mine = class_rank == layout.class_rank
        block = own if mine else own.new_empty(layout.size(class_rank), *own.shape[1:])
        yield comm.broadcast(block, class_rank, layout.class_group)


def gathered(tensor: Any) -> Tensor:
    """All of a DTensor (C, ...), without a gradient; all ranks call it."""
    if tensor.dtype == FLOAT8:  # which gloo cannot gather
        return torch.cat(list(blocks(tensor)))
    whole: Tensor = tensor.detach().full_tensor()
    return whole


def block_of_first_rank(tensor: Tensor, layout: Layout) -> Tensor:
    """A tensor (C, ...) spread over the ranks, with the values of rank 0; with none if it has no memory."""
    if tensor.is_meta:
        return layout.zeros(*tensor.shape[1:], dtype=tensor.dtype)
    own = torch.empty(0)
    for class_rank in range(layout.class_ranks):  # one block after the other: nothing but they is sent
        block = tensor.detach()[slice(*layout.span(class_rank))].to(layout.device, copy=True)
        block = comm.broadcast(block, 0, layout.group)
        own = block if class_rank == layout.class_rank else own
    return layout.place(own)


def copy_rows(old: Tensor, new: Tensor) -> None:
    """The first rows of ``new`` become those of ``old``, a block at a time; all ranks call it."""
    target, (start, stop), first = local(new), Layout.of(new).span(), 0
    for block in blocks(old):
        low, high = max(start, first), min(stop, first + block.shape[0])
        if low < high:
            target[low - start : high - start] = block[low - first : high - first]
        first += block.shape[0]


def _dimension(mesh: DeviceMesh | None, place: int) -> tuple[int, int, Any]:
    """Size, this rank's place and group of the last dimension of a mesh (-1) or of the one before (-2), if any."""
    if mesh is None or mesh.ndim + place < 0:
        return 1, 0, None
    number = mesh.ndim + place
    return mesh.size(number), mesh.get_local_rank(number), mesh.get_group(number)


def _group_of_all(mesh: Any) -> Any:
    ranks = mesh.mesh.flatten().tolist()
    if ranks == list(range(dist.get_world_size())):
        return dist.group.WORLD
    world: Any = dist.group.WORLD
    if mesh.device_type == "cuda" and world.bound_device_id is not None:
        # NCCL then splits groups from that of the world, and waits for the ranks outside, which do not come here.
        raise ValueError(
            f"mesh (data, class) over the ranks {ranks} alone, of {dist.get_world_size()}, needs init_process_group "
            "without device_id; or take a mesh of all ranks, or (class,)"
        )
    made: _Group = mesh.__dict__.setdefault("_ltloss_group", _Group())
    made.group = made.group or dist.new_group(ranks, use_local_synchronization=True)
    return made.group


class _Group:
    """A group made once per mesh, for making it is collective. A pickle of the mesh leaves it out."""

    group: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Group, ()


def _unpickled(mesh: DeviceMesh | None, num_classes: int, device: torch.device, kind: type[Layout] = Layout) -> Layout:
    try:
        fits = mesh is None or dist.get_world_size(mesh.get_group(mesh.ndim - 1)) == mesh.size(mesh.ndim - 1)
    except (RuntimeError, ValueError):  # no such group, or nothing initialised
        fits = False
    if not fits:
        raise DistributedError(
            f"a parallel module that was pickled on {mesh.size() if mesh else 1} ranks can be read by the same ranks "
            "only. Keep its state_dict, or use save_checkpoint and load_checkpoint, which fit any number of ranks"
        )
    return kind(mesh, num_classes, device)


def mesh_device(mesh: DeviceMesh) -> torch.device:
    """Where this rank's tensors live; ValueError for a mesh that is not (class,) or (data, class), or out of order."""
    names = mesh.mesh_dim_names or ()
    if mesh.ndim not in (1, 2) or ("class" in names and names[-1] != "class"):
        raise ValueError(f"mesh must have the dimensions (class,) or (data, class); got {mesh.ndim} dimensions {names}")
    ranks = mesh.mesh.flatten().tolist()
    if ranks != sorted(ranks):  # groups sort their ranks, so that their messages would come in another order
        raise ValueError(
            "mesh must have ascending ranks, those of a class group side by side; got "
            f"{str(mesh.mesh.tolist()).replace(' ', '')}. Number the ranks so when they are started"
        )
    kind = mesh.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
