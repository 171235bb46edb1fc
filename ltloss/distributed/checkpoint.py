"""Checkpoints of sharded modules and optimizers, written by all ranks and read on any number of them.

``torch.distributed.checkpoint`` writes each block once. The folder gets its name last, so whatever moment the job dies
at, a folder of that name is whole.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ltloss._files import publish_folder, start_folder, temporary, write_file
from ltloss.distributed.batch_gather import all_gather_metadata
from ltloss.distributed.class_parallel import ClassParallel
from ltloss.distributed.layout import Layout
from ltloss.distributed.sampling import ClassSampler
from ltloss.float8 import FLOAT8
from ltloss.losses.prototype_head import PrototypeHead

__all__ = ["load_checkpoint", "save_checkpoint"]

T = TypeVar("T")

_STATE = "state.json"


def save_checkpoint(
    path: str | Path,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer] | None = None,
    state: Mapping[str, Any] | None = None,
) -> None:
    """Write modules and the state of their optimizers into the folder ``path``; all ranks call it alike.

    Args:
        path: a folder that does not exist yet, on a file system that all ranks see.
        modules: by name; sharded ones beside ordinary ones that are the same on all ranks; where buffers differ, as
            running means under DDP do, those of rank 0 are stored. What is inside of a wrapper (DDP, ``AveragedModel``)
            has the names that it has without it.
        optimizers: by name; over parameters of these modules. Options such as the learning rate are not stored.
        state: anything that JSON can hold.

    Raises:
        FileExistsError: there is something at ``path``. On all ranks, like any failed write.

    See also: :func:`load_checkpoint`, which reads it on any number of ranks.

    Example:
        >>> import torch
        >>> from ltloss import ArcFaceLoss
        >>> from ltloss.distributed import load_checkpoint, save_checkpoint
        >>> loss_fn = ArcFaceLoss(10, 4)
        >>> save_checkpoint("step-1", {"loss": loss_fn}, state={"step": 1})
        >>> load_checkpoint("step-1", {"loss": ArcFaceLoss(10, 4)})
        {'step': 1}
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.state_dict_saver import save

    target = Path(path)
    partial = temporary(target)
    text = json.dumps(dict(state or {}))
    steps = {name: sampler.step for name, (sampler, _) in _samplers(modules).items()}
    described = {name: head.described() for name, head in _heads(modules).items()}

    def prepare() -> None:
        if target.exists():
            raise FileExistsError(f"{target} exists; give the checkpoint a new name")
        start_folder(target)

    def publish() -> None:
        record = {"state": json.loads(text), "sampler_steps": steps, "hyper_parameters": described}
        write_file(partial / _STATE, json.dumps(record).encode())
        publish_folder(target)

    tensors = _module_tensors(modules) | _neighbours(modules, make=False)
    for prefix, optimizer, _, parameter in _owned(modules, optimizers or {}):
        held = optimizer.state.get(parameter, {})
        tensors |= {prefix + key: value for key, value in held.items() if isinstance(value, Tensor)}
    _on_first_rank(prepare)
    with _quiet():
        # Of what all ranks hold, rank 0's: under DDP running means differ, and those of several ranks do not fit.
        planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        save(tensors, checkpoint_id=partial, planner=planner, no_dist=not _initialised())
    _on_first_rank(publish)


def load_checkpoint(
    path: str | Path,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer] | None = None,
) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote, in place; on any number of ranks, sharded or not.

    Args:
        path, modules, optimizers: as there; names and shapes must be those that were saved. State that an optimizer has
            already, as one of :mod:`ltloss.optim` has from the start, is filled in place and keeps its dtype.

    Returns:
        The ``state``.

    Raises:
        FileNotFoundError: there is no whole checkpoint at ``path``.
        ValueError: a tensor is missing there or has another shape, or an optimizer that has state already has other
            state; nothing was changed then.

    Warns where a head was saved under other hyper-parameters (scale, margins, ...), which it keeps; and where the
    checkpoint does not hold what a wrapper has beside its module.

    See also: :func:`save_checkpoint`, which writes it.

    Example: see :func:`save_checkpoint`.

        >>> from ltloss import ArcFaceLoss
        >>> from ltloss.distributed import load_checkpoint
        >>> load_checkpoint("nowhere", {"loss": ArcFaceLoss(10, 4)})
        Traceback (most recent call last):
        FileNotFoundError: nowhere is no whole checkpoint (it has no state.json)
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    target = Path(path)
    if not (target / _STATE).is_file():
        raise FileNotFoundError(f"{target} is no whole checkpoint (it has no {_STATE})")
    stored: dict[str, Any] = FileSystemReader(target).read_metadata().state_dict_metadata
    record = json.loads((target / _STATE).read_text())
    tensors, new_state = _without_missing_wrappers(_module_tensors(modules), stored, target), []
    for prefix, optimizer, options, parameter in list(_owned(modules, optimizers or {})):
        held = optimizer.state[parameter]
        there = {name.removeprefix(prefix): entry for name, entry in stored.items() if name.startswith(prefix)}
        kept = {key: value for key, value in held.items() if isinstance(value, Tensor)}
        if kept and kept.keys() != there.keys():
            raise ValueError(f"{target}: {prefix}* is {sorted(there)} there and {sorted(kept)} here")
        on_device = bool(options.get("fused") or options.get("capturable"))
        made = {} if kept else {key: _like(parameter, entry, on_device) for key, entry in there.items()}
        tensors |= {prefix + key: tensor for key, tensor in (kept | made).items()}
        new_state.append((held, made))
    nearest = _neighbours(modules, make=True)  # of another size, or not stored: the classes are searched anew
    nearest = {name: tensor for name, tensor in nearest.items() if name in stored and stored[name].size == tensor.shape}
    tensors |= nearest
    for name, tensor in tensors.items():
        dtype = stored[name].properties.dtype if name in stored else tensor.dtype
        if FLOAT8 in (dtype, tensor.dtype) and dtype != tensor.dtype:
            raise ValueError(
                f"{target}: tensor {name} is {dtype} there and {tensor.dtype} here; load it into a head of that dtype, "
                "whose state_dict a head of any other takes"
            )
    for name, tensor in tensors.items():
        size = tuple(stored[name].size) if name in stored else "missing"
        if size != tuple(tensor.shape):
            raise ValueError(f"{target}: tensor {name} is {size} there and {tuple(tensor.shape)} here")
    with _quiet():
        load(tensors, checkpoint_id=target, no_dist=not _initialised())
    for held, made in new_state:
        held |= made
    for name, (sampler, _) in _samplers(modules).items():
        sampler.step = record["sampler_steps"].get(name, 0)
        if sampler.neighbours is not None and f"{name}.sampler.neighbour" not in nearest:
            sampler.neighbours.forget()
    _tell_others(modules, optimizers or {})
    for name, head in _heads(modules).items():
        head.warn_if_other(record.get("hyper_parameters", {}).get(name, {}))
    loaded: dict[str, Any] = record["state"]
    return loaded


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def _samplers(modules: Mapping[str, nn.Module]) -> dict[str, tuple[ClassSampler, Layout]]:
    """The samplers of the heads, and where the classes of each are; a head that is itself given has its plain name."""
    return {
        name.removesuffix("."): (head.sampler, head.layout)
        for name, head in _heads(modules).items()
        if isinstance(head, ClassParallel) and head.sampler is not None
    }


def _neighbours(modules: Mapping[str, nn.Module], *, make: bool) -> dict[str, Tensor]:
    """What samplers know of the nearest classes; ``make`` makes room for it where they know nothing yet."""
    tensors: dict[str, Tensor] = {}
    for name, (sampler, layout) in _samplers(modules).items():
        if sampler.neighbours is not None:
            known = sampler.neighbours.tensors(layout, make=make)
            tensors |= {f"{name}.sampler.{key}": tensor for key, tensor in known.items()}
    return tensors


def _heads(modules: Mapping[str, nn.Module]) -> dict[str, PrototypeHead]:
    """The heads, also those inside of other modules, by a name that says where."""
    return {
        f"{name}.{path}": part
        for name, module in modules.items()
        for path, part in _named(module, nn.Module.named_modules)
        if isinstance(part, PrototypeHead)
    }


def _tell_others(modules: Mapping[str, nn.Module], loaded: Mapping[str, torch.optim.Optimizer]) -> None:
    """Tell the optimizers of heads that were not loaded too: their prototypes are others now."""
    known = {id(optimizer) for optimizer in loaded.values()}
    for head in _heads(modules).values():
        if head.fused_update is not None and id(head.fused_update) not in known:
            head.fused_update.replaced()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that a single process is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def _named(module: nn.Module, parts: Callable[[nn.Module], Iterable[tuple[str, T]]]) -> Iterator[tuple[str, T]]:
    """Parts by name. Of a wrapper (DDP, AveragedModel) those inside by their plain name, its own after a dot."""
    inner = getattr(module, "module", None)
    if not isinstance(inner, nn.Module):
        yield from parts(module)
        return
    if "module" in module._modules:  # else it is a view: a compiled DDP wrapper has only what is inside
        for name, part in parts(module):
            if name.split(".")[0] != "module":
                yield f".{name}", part
    yield from parts(inner)


def _module_tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, module in modules.items()
        for key, tensor in _named(module, lambda part: part.state_dict().items())
        if isinstance(tensor, Tensor)
    }


def _without_missing_wrappers(tensors: dict[str, Tensor], stored: Mapping[str, Any], target: Path) -> dict[str, Tensor]:
    """Those to be loaded: without what wrappers have of their own, where the checkpoint was written without it."""
    missing = sorted(name for name in tensors if ".." in name and name not in stored)
    if missing:
        warnings.warn(f"{target} does not hold {', '.join(missing)} of a wrapper, which keeps it", stacklevel=3)
    return {name: tensor for name, tensor in tensors.items() if name not in missing}


def _owned(
    modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]
) -> Iterator[tuple[str, torch.optim.Optimizer, dict[str, Any], Tensor]]:
    """Every parameter of the optimizers: what the names of its state begin with, its optimizer and its options."""
    names = {
        parameter: f"{name}.{key}"
        for name, module in modules.items()
        for key, parameter in _named(module, nn.Module.named_parameters)
    }
    for label, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter not in names:
                    raise ValueError(f"optimizer {label!r} has a parameter {tuple(parameter.shape)} of no given module")
                yield f"optimizer.{label}.{names[parameter]}.", optimizer, group, parameter


def _like(parameter: Tensor, stored: Any, on_device: bool) -> Tensor:
    """Zeros of the stored shape: placed as the parameter where that is its shape, or rows are its rows; else whole.

    Numbers (the steps that Adam counts) stay on the host, but for optimizers that read them ``on_device``.
    """
    shape, dtype = tuple(stored.size), stored.properties.dtype
    if shape and shape == tuple(parameter.shape):  # however FSDP2 placed it
        return torch.zeros_like(parameter, dtype=dtype)
    layout = Layout.of(parameter) if hasattr(parameter, "device_mesh") else None
    if layout is None or not shape or shape[0] != parameter.shape[0]:
        return torch.zeros(shape, dtype=dtype, device=parameter.device if shape or on_device else "cpu")
    return layout.zeros(*shape[1:], dtype=dtype)


def _on_first_rank(action: Callable[[], None]) -> None:
    """Do it on rank 0 alone; all ranks wait for it, and all fail where it does."""
    error: Exception | None = None
    if not _initialised() or dist.get_rank() == 0:
        try:
            action()
        except OSError as failure:
            error = failure
    if _initialised():
        nccl = "nccl" in dist.get_backend_config()
        device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
        all_gather_metadata([], error, dist.group.WORLD, device)
    elif error is not None:
        raise error
