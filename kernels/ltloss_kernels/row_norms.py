"""Host side of the norms and scaled copies of whole rows, for every pass."""

from __future__ import annotations

from torch import Tensor

from ltloss_kernels.config import tile_table as tiles
from ltloss_kernels.config.chunking import ceil_div
from ltloss_kernels.device.rows import row_norm_kernel
from ltloss_kernels.launching import Launch, through_triton

__all__ = ["row_norms"]


def row_norms(
    vectors: Tensor,
    *,
    factor: Tensor | None = None,
    copy: Tensor | None = None,
    copy_factor: Tensor | None = None,
    factor_scale: float = 1.0,
    normalize: bool = True,
    prior: Tensor | None = None,
    prior_out: Tensor | None = None,
    flags: Tensor | None = None,
    launch: Launch = through_triton,
) -> None:
    """Launch :func:`row_norm_kernel`. At least ``factor`` or ``copy`` must be given.

    Args:
        vectors: (K, D) any floating dtype, any strides.
        factor: (P,) float32, P >= K: receives ``factor_scale``/‖v‖, 0 beyond K.
        copy: (K, D), columns next to each other: receives each row times a power of two.
        copy_factor: (P,) float32, given with ``copy``: receives ``factor_scale`` over the lengths of the copied rows.
        normalize: False takes every row of ``vectors`` as one of length 1.
        prior, prior_out: (K,) and (P,) float32, both or neither; the second receives prior·log2 e, -inf beyond K.
        flags: int8, set to 0.
        launch: the launches that this one belongs to.
    """
    copy_stride = 0 if copy is None else copy.stride(0)
    tile = tiles.row_tile(vectors.shape[1], vectors.stride(0), copy_stride)
    padded = next(one.shape[0] for one in (factor, copy_factor) if one is not None)
    launch(row_norm_kernel, (ceil_div(padded, tile.rows),))(
        # inputs
        vectors,
        prior,
        # outputs
        factor,
        copy,
        copy_factor,
        prior_out,
        flags,
        # sizes
        vectors.shape[0],
        vectors.shape[1],
        padded,
        0 if flags is None else flags.numel(),
        *vectors.stride(),
        copy_stride,
        factor_scale,
        # constants
        NORMALIZE=normalize,
        UNIT=tile.unit,
        ROWS=tile.rows,
        WIDTH=tile.width,
        num_warps=tile.warps,
    )
