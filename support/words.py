"""What is known of the codes of some images: which patches have one, what these show, which code resembles which.

No reader of the method needs this file.
"""

from typing import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from support.loaders import evenly_chosen


def examples_of(ids: Tensor, code: int, count: int) -> list[tuple[int, int, int]]:
    """Up to `count` patches (image, row, column) with this code: from as many images as possible, evenly chosen."""
    places = (ids == code).nonzero()  # in the order of images
    is_first = torch.ones(len(places), dtype=torch.bool)  # in its image
    is_first[1:] = places[1:, 0] != places[:-1, 0]
    first, others = places[is_first], places[~is_first]
    if len(first) > count:
        first = first[evenly_chosen(len(first), count)]
    return [tuple(place) for place in torch.cat([first, others])[:count].tolist()]


def most_frequent(kinds: Tensor, names: Sequence[str], count: int = 3) -> str:
    """The `count` most frequent of some kinds, int64 [n] by their number in `names`: such as "cat 60 %, dog 40 %"."""
    percent = (100 * kinds.bincount(minlength=len(names)) / max(1, len(kinds))).round()
    most = percent.argsort(descending=True, stable=True)[:count].tolist()
    return ", ".join(f"{names[k]} {percent[k]:.0f}\N{NO-BREAK SPACE}%" for k in most if percent[k] > 0)


def purity(ids: Tensor, kinds: Tensor) -> tuple[float, float]:
    """The share of patches that are of the most frequent kind of their code: ids and kinds int64 [n].

    Returns it, in (0, 1], and what it is by chance: for the same ids, dealt out to the patches at random.
    """
    shuffled = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    tables = (torch.zeros(int(ids.max()) + 1, int(kinds.max()) + 1).index_put_(
        (some, kinds), torch.ones(len(ids)), accumulate=True) for some in (ids, shuffled))
    own, chance = (float(table.amax(dim=1).sum()) / len(ids) for table in tables)
    return own, chance


def nearest_codes(codebook: Tensor, code: int, count: int) -> list[tuple[int, float]]:
    """The `count` other codes of a codebook [K, width] with the highest cosine to this one, [(id, cosine), ...]."""
    codebook = F.normalize(codebook, dim=1)
    cosine = codebook @ codebook[code]
    cosine[code] = -2
    values, indices = cosine.topk(min(count, len(codebook) - 1))
    return list(zip(indices.tolist(), values.tolist()))


def code_colours(codebook: Tensor) -> np.ndarray:
    """A colour for each code, uint8 [K, 3], always the same for the same codebook: similar codes look similar.

    The three main directions of the codebook become red, green and blue, each by rank, so that all values occur.
    """
    centred = (codebook - codebook.mean(dim=0)).double()
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[:3]
    directions = directions * directions.gather(1, directions.abs().argmax(dim=1, keepdim=True)).sign()
    ranks = (centred @ directions.T).argsort(dim=0).argsort(dim=0)  # [K, 3]
    return (30 + 210 * ranks / max(1, len(codebook) - 1)).round().byte().numpy()


def mean_patch(images: Tensor, ids: Tensor, code: int, patch_size: int) -> Tensor:
    """The mean of all patches with this code: uint8 images [n, 3, S, S] -> float32 [3, P, P], 0 to 255."""
    patches = images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)  # [n, 3, grid, grid, P, P]
    return patches.permute(0, 2, 3, 1, 4, 5)[ids == code].float().mean(dim=0)
