"""What the kernels take for granted of the tables."""

import pytest
import torch

from vcore_kernels.triton import tuning

ARCHITECTURES = ["interpreter", "sm80", "sm89", "sm90", "sm100", "gfx942"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [512, 515])
def test_tiles_of_the_head_fit_together(architecture, dtype, width):
    logits = {
        products: tuning.tiles(tuning.LOGITS, architecture, dtype, width, products)
        for products in ("one", "jvp", "pair", "jvp+weight", "pair+weight")
    }
    d_hidden = tuning.tiles(tuning.HIDDEN_GRADIENT, architecture, dtype, width)
    d_weight = tuning.tiles(tuning.WEIGHT_GRADIENT, architecture, dtype, width)
    for tiles in (*logits.values(), d_hidden, d_weight):
        assert tiles.parts in (1, 2, 4)
        assert not (tiles.tma and not tuning.copy_engine_serves(width, dtype))
    assert d_hidden.parts <= 2 >= d_weight.parts
    # rows beyond the last are 0 up to a tile of the logits or a block; the sum over rows reads them
    assert d_weight.depth <= logits["one"].rows
    for size in (logits["one"].rows, d_weight.depth, d_hidden.rows):
        assert tuning.ROW_BLOCK % size == 0
