"""Heads as files that run without ltloss: ``torch.export`` and ONNX.

``ltloss export`` writes a whole classifier so. Here is what it makes of the head, for a network of your own.
"""

from __future__ import annotations

import copy
import importlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ltloss._files import write_file
from ltloss._validation import check_choice, check_count
from ltloss.errors import UserError
from ltloss.float8 import converted
from ltloss.losses.prototype_head import PrototypeHead
from ltloss.ops._dispatch import is_sharded
from ltloss.reference import direction

__all__ = ["METADATA", "InferenceHead", "export_head", "export_module"]

Target = Literal["onnx", "torch"]

METADATA = "metadata.json"  # the name of the extra file in a .pt2
_LARGEST_ONNX = (1 << 31) - (1 << 20)  # bytes of weights: protobuf ends at 2 GiB, and the graph needs some of them
_OPEN_BATCH = ({0: torch.export.Dim("N")},)


class InferenceHead(nn.Module):
    """What prediction needs of a head, frozen, in operations that ``torch.export`` and ONNX have.

    Args:
        head: a loss of this package, whole (``ltloss.distributed.in_one_piece`` of a parallel one). Prototypes of any
            dtype, float8 and bfloat16 too, are kept as float32 directions ŵ_c = w_c/‖w_c‖, copied now. A head with
            ``logits`` of its own is taken as it is.
        k: classes a sample, between 1 and C.

    A call maps features (N, D) to a dict of float32 tensors:

    * ``logits`` (N, C): those of ``head.logits``, s·cos_ic, without margin or prior; dense.
    * ``index`` (N, k) int64: the classes of the k largest logits, best first; among equal ones in any order.
    * ``cosine`` (N, k): their cosines, those of ``head.predict``.
    * ``probability`` (N, k): their softmax probabilities.

    Raises:
        ValueError: a ``k`` outside [1, C], a head spread over ranks.

    See also: :func:`export_head`, which traces and saves it.

    Example:
        >>> import torch
        >>> from ltloss import ArcFaceLoss
        >>> from ltloss.export import InferenceHead
        >>> head = InferenceHead(ArcFaceLoss(10, 4), k=3)
        >>> program = torch.export.export(
        ...     head, (torch.randn(2, 4),), dynamic_shapes=({0: torch.export.Dim("N")},)
        ... )
        >>> {name: tuple(tensor.shape) for name, tensor in program.module()(torch.randn(5, 4)).items()}
        {'logits': (5, 10), 'index': (5, 3), 'cosine': (5, 3), 'probability': (5, 3)}
    """

    directions: Tensor

    def __init__(self, head: nn.Module, k: int = 1) -> None:
        super().__init__()
        given: Any = head
        for name in ("weight", "logits"):
            if not hasattr(given, name):
                raise TypeError(
                    f"head must have prototypes `weight` and `logits(features)`; {type(head).__name__} has no {name}"
                )
        if is_sharded(given.weight):
            raise ValueError(
                f"head must be whole; got a {type(head).__name__} whose classes are spread over ranks: "
                "take ltloss.distributed.in_one_piece of it"
            )
        self.k = check_count("k", k, given.weight.shape[0], "the number of classes ")
        self.head: Any = None
        if isinstance(head, PrototypeHead) and type(head).logits is PrototypeHead.logits:
            self.scale, self.normalize_features = head.scale, head.normalize_features
            self.centers = head.sub_centers
            weight = converted(head.weight.detach(), torch.float32).flatten(0, -2)
            self.register_buffer("directions", direction(weight))
        else:
            self.head = head

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Compute the logits, and the k best classes with their cosines and probabilities.

        Args:
            features: (N, D).

        Returns:
            A dict of tensors with N rows, by the names that :class:`InferenceHead` lists.
        """
        features = features.float()
        unit = direction(features)
        if self.head is not None:
            logits = self.head.logits(features).float()
            best, index = logits.topk(self.k, dim=1)
            found = direction(self.head.weight[index.flatten()].float()).reshape(*index.shape, -1)
            cosine = (found * unit[:, None]).sum(-1)
        else:
            cosines = nn.functional.linear(unit, self.directions)  # in ONNX a Gemm, which transposes nothing
            if self.centers > 1:
                cosines = cosines.view(-1, len(self.directions) // self.centers, self.centers).amax(2)
            logits = self.scale * cosines
            if not self.normalize_features:
                logits = logits * torch.linalg.vector_norm(features, dim=1, keepdim=True)
            best, index = logits.topk(self.k, dim=1)
            cosine = cosines.gather(1, index)
        probability = (best - logits.logsumexp(1, keepdim=True)).exp()
        return {"logits": logits, "index": index, "cosine": cosine.clamp(-1.0, 1.0), "probability": probability}


def export_head(
    head: nn.Module,
    path: str | Path,
    *,
    to: Target = "onnx",
    k: int = 1,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a head as a file that needs no ltloss: ``embeddings`` (N, D) float32 to the outputs of InferenceHead.

    Args:
        head, k: as for :class:`InferenceHead`.
        path: of the file, which either keeps its former content or gets all of the new one.
        to: ``"onnx"``, or ``"torch"`` for a ``.pt2`` of ``torch.export``. N is open in both. A ``.pt2`` is for the CPU;
            ``torch.export.passes.move_to_device_pass`` moves it.
        metadata: what JSON can hold, by name; the hyper-parameters of the head are added. In ONNX each value is a JSON
            text in ``metadata_props``; in a ``.pt2`` all are in the extra file ``metadata.json``.

    Raises:
        ValueError: an unknown ``to``, and what :class:`InferenceHead` refuses.
        ImportError: onnx or onnxscript is missing: ``pip install 'ltloss[export]'``.
        UserError: weights that are too large for ONNX, 2 GiB.

    See also: :func:`export_module`, for any module; :func:`ltloss.interop.export_safetensors`, for the prototypes
    alone.

    Example:
        >>> import torch
        >>> from ltloss import ArcFaceLoss
        >>> from ltloss.export import export_head
        >>> loss_fn = ArcFaceLoss(10, 4)
        >>> export_head(loss_fn, "head.pt2", to="torch", metadata={"class_names": list("abcdefghij")})
        >>> run, embeddings = torch.export.load("head.pt2").module(), torch.randn(5, 4)
        >>> bool((run(embeddings)["index"] == loss_fn.predict(embeddings).index).all())
        True
    """
    frozen = InferenceHead(head, k)
    given: Any = head
    described = given.described() if isinstance(given, PrototypeHead) else {}
    facts = {"loss": type(given).__name__, **described, **(metadata or {})}
    example = torch.zeros(2, given.weight.shape[-1], device=given.weight.device)
    export_module(frozen, "embeddings", example, path, to=to, metadata=facts)


def export_module(
    module: nn.Module, input_name: str, example: Tensor, path: str | Path, *, to: Target, metadata: Mapping[str, Any]
) -> None:
    """Write a network that ends in an :class:`InferenceHead`, in evaluation mode, as :func:`export_head` writes a head.

    Args:
        module: of one tensor (N, ...), to a dict of tensors (N, ...) by name. It keeps its mode.
        input_name: what the tensor is called in ONNX.
        example: such a tensor of two samples; the number of samples is left open, the other sizes are not.
        path, to, metadata: as for :func:`export_head`.

    Raises:
        ValueError, ImportError, UserError: as :func:`export_head`.

    See also: :func:`export_head`, for a head of this package.

    Example:
        >>> import torch
        >>> from ltloss.export import InferenceHead, export_module
        >>> from ltloss import CosFaceLoss
        >>> network = torch.nn.Sequential(torch.nn.Linear(8, 4), InferenceHead(CosFaceLoss(10, 4)))
        >>> export_module(network, "inputs", torch.zeros(2, 8), "network.pt2", to="torch", metadata={})
    """
    check_choice("to", to, ("onnx", "torch"))
    if to == "onnx":
        _check_onnx(module)
    module, example = _on_cpu(module), example.cpu()
    with _quiet(), _evaluation(module), torch.no_grad():
        program = torch.export.export(module, (example,), dynamic_shapes=_OPEN_BATCH)
        onnx = to == "onnx"
        content = _onnx(program, input_name, list(module(example)), metadata) if onnx else _pt2(program, metadata)
    write_file(Path(path), [content])


def _on_cpu(module: nn.Module) -> nn.Module:
    """The module; a copy of one that is elsewhere, as a program runs only on the device on which it was traced."""
    if all(tensor.device.type == "cpu" for tensor in [*module.parameters(), *module.buffers()]):
        return module
    # Each tensor straight to the CPU: a GPU may have no room for a second copy of the weights.
    here = {id(tensor): nn.Parameter(tensor.detach().cpu(), requires_grad=False) for tensor in module.parameters()}
    return copy.deepcopy(module, {**here, **{id(tensor): tensor.detach().cpu() for tensor in module.buffers()}})


def _check_onnx(module: nn.Module) -> None:
    """Raise before the work what would fail at its end."""
    try:
        for name in ("onnx", "onnxscript"):
            importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"a file for ONNX needs onnx and onnxscript ({error}); run: pip install 'ltloss[export]'", name=error.name
        ) from error
    tensors = [*module.parameters(), *module.buffers()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if size > _LARGEST_ONNX:
        raise UserError(
            f"the weights take {size:,} bytes, and a file for ONNX has room for {_LARGEST_ONNX:,}; export to torch"
        )


def _onnx(
    program: torch.export.ExportedProgram, input_name: str, outputs: list[str], metadata: Mapping[str, Any]
) -> bytes:
    made: Any = torch.onnx.export(
        program,
        dynamo=True,
        input_names=[input_name],
        output_names=outputs,
        dynamic_shapes=_OPEN_BATCH,  # whose name an exported program does not keep
        verbose=False,
    )
    made.model.metadata_props.update({name: json.dumps(value) for name, value in metadata.items()})
    content: bytes = made.model_proto.SerializeToString()
    return content


def _pt2(program: torch.export.ExportedProgram, metadata: Mapping[str, Any]) -> memoryview:
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={METADATA: json.dumps(dict(metadata), indent=2)})
    return file.getbuffer()


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    try:
        module.eval()
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what PyTorch says about itself on the way: its own deprecations, and that torchvision is absent."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
