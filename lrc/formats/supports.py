"""Where the numbers of a sparse matrix stand, in few bytes: single entries, whole blocks, or n of every m inputs."""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lrc.formats.packing import FIELDS, pack, packed_bytes, unpack

INDEX_BITS = 32  # a position takes this much; below one block in so many, positions are smaller than a mask
PATTERN = re.compile(r"(\d+)(:|x)(\d+)")

Shape = tuple[int, int]


class Support(ABC):
    """A kind of support of a matrix (out_features, in_features), and how it is packed.

    The numbers on it are one vector, in the order in which `gather` returns them.
    """

    @property
    @abstractmethod
    def pattern(self) -> str:
        """The word that `support_of` reads."""

    @abstractmethod
    def encode(self, kept: Tensor) -> tuple[Tensor, int]:
        """Pack where `kept`, bool (out_features, in_features), is true; return that, and how many numbers stand there.

        Raises ValueError for a support that has not this pattern.
        """

    @abstractmethod
    def empty(self, count: int, shape: Shape) -> Tensor:
        """Return a packed support of `count` numbers, uninitialised, on the current device."""

    @abstractmethod
    def spread(self, values: Tensor, packed: Tensor, shape: Shape) -> Tensor:
        """Return the matrix that has the values (count,) on its support and zeros elsewhere; differentiable."""

    @abstractmethod
    def gather(self, matrix: Tensor, packed: Tensor, count: int) -> Tensor:
        """Return the numbers (count,) of a matrix on the support: the transpose of `spread`."""

    def by_position(self, packed: Tensor) -> bool:
        """Say whether the support is stored as ascending positions of single entries."""
        return False


@dataclass(frozen=True)
class BlockSupport(Support):
    """Whole blocks of `rows` x `columns` entries; single entries are blocks of 1 x 1.

    Packed is one bit for every block of the matrix, or for few blocks their positions in 4 bytes each, whichever is smaller.
    Blocks over the edge of the matrix are stored whole.
    """

    rows: int = 1
    columns: int = 1

    @property
    def pattern(self) -> str:
        """`all` for single entries, else `16x16`."""
        return f"{self.rows}x{self.columns}" if self.size > 1 else "all"

    @property
    def size(self) -> int:
        """The entries of a block."""
        return self.rows * self.columns

    def encode(self, kept: Tensor) -> tuple[Tensor, int]:
        """Pack which blocks are kept."""
        inside = self._blocks(kept).any(1)
        if self.size > 1 and not torch.equal(self._whole(inside[:, None].expand(-1, self.size), kept.shape), kept):
            raise ValueError(f"the support is not made of whole blocks of {self.pattern}")
        positions = inside.nonzero()[:, 0]
        few = INDEX_BITS * len(positions) < len(inside)
        return positions.to(torch.int32) if few else pack(inside, 1), len(positions) * self.size

    def empty(self, count: int, shape: Shape) -> Tensor:
        """Return positions or a mask, as `encode` would."""
        blocks, kept = self._grid(shape)[0] * self._grid(shape)[1], count // self.size
        if INDEX_BITS * kept < blocks:
            return torch.empty(kept, dtype=torch.int32)
        return torch.empty(packed_bytes(blocks, 1), dtype=torch.uint8)

    def spread(self, values: Tensor, packed: Tensor, shape: Shape) -> Tensor:
        """Put every kept block at its place."""
        down, across = self._grid(shape)
        stored, some = values.reshape(-1, self.size), values.shape[0] > 0
        if not some or packed.dtype == torch.int32:
            empty = values.new_zeros(down * across, self.size)
            return self._whole(empty.index_put((packed.long(),), stored) if some else empty, shape)
        inside = unpack(packed, 1, down * across)
        place = (inside.cumsum(0) - 1).clamp(min=0)
        return self._whole(stored[place] * inside.to(values.dtype)[:, None], shape)

    def gather(self, matrix: Tensor, packed: Tensor, count: int) -> Tensor:
        """Read every kept block."""
        blocks = self._blocks(matrix)
        if packed.dtype == torch.int32:
            positions = packed.long()
        else:
            positions = torch.nonzero_static(unpack(packed, 1, len(blocks)), size=count // self.size)[:, 0]
        return blocks[positions].reshape(-1)

    def by_position(self, packed: Tensor) -> bool:
        """Say so for few single entries."""
        return self.size == 1 and packed.dtype == torch.int32

    def _grid(self, shape: Shape | torch.Size) -> Shape:
        return -(-shape[0] // self.rows), -(-shape[1] // self.columns)

    def _blocks(self, matrix: Tensor) -> Tensor:
        """Return the blocks (number, entries of one) of a matrix, padded to whole ones."""
        if self.size == 1:
            return matrix.reshape(-1, 1)
        down, across = self._grid(matrix.shape)
        padded = F.pad(matrix, (0, across * self.columns - matrix.shape[1], 0, down * self.rows - matrix.shape[0]))
        return padded.reshape(down, self.rows, across, self.columns).transpose(1, 2).reshape(-1, self.size)

    def _whole(self, blocks: Tensor, shape: Shape | torch.Size) -> Tensor:
        """Return the matrix of the blocks (number, entries of one)."""
        if self.size == 1:
            return blocks.reshape(shape)
        down, across = self._grid(shape)
        padded = blocks.reshape(down, across, self.rows, self.columns).transpose(1, 2)
        return padded.reshape(down * self.rows, across * self.columns)[: shape[0], : shape[1]]


@dataclass(frozen=True)
class GroupSupport(Support):
    """n of every m neighbours along a row, as sparse tensor cores read them (2 of 4): Mishra et al. (2021), arXiv:2104.08378.

    Packed is the place in its group of every number, in the fewest bits; or one bit an entry, where that
    is smaller. A group with fewer than n kept entries gets others beside them, and rows are padded to whole groups.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m <= 256:
            raise ValueError(f"expected n:m with 0 < n < m <= 256, got {self.pattern}")

    @property
    def pattern(self) -> str:
        """Return `2:4`."""
        return f"{self.n}:{self.m}"

    @property
    def index_bits(self) -> int | None:
        """The bits of a place in a group, or None where a mask is smaller."""
        bits = next(bits for bits in FIELDS if 2**bits >= self.m)
        return bits if self.n * bits <= self.m else None

    def encode(self, kept: Tensor) -> tuple[Tensor, int]:
        """Pack the n places of every group."""
        groups = F.pad(kept, (0, -kept.shape[1] % self.m)).reshape(-1, self.m)
        most = int(groups.sum(1).max()) if len(groups) else 0
        if most > self.n:
            raise ValueError(f"the support is not {self.pattern}: a group of {self.m} keeps {most}")
        places = groups.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : self.n].sort(1).values
        if self.index_bits is not None:
            return pack(places.reshape(-1), self.index_bits), places.numel()
        return pack(torch.zeros_like(groups).scatter(1, places, True).reshape(-1), 1), places.numel()

    def empty(self, count: int, shape: Shape) -> Tensor:
        """Return the places of all groups."""
        groups = count // self.n
        size = packed_bytes(groups * self.m, 1) if self.index_bits is None else packed_bytes(count, self.index_bits)
        return torch.empty(size, dtype=torch.uint8)

    def spread(self, values: Tensor, packed: Tensor, shape: Shape) -> Tensor:
        """Put the numbers of every group at their places."""
        rows, columns = shape
        number, stored = values.shape[0] // self.n, values.reshape(-1, self.n)
        if self.index_bits is None:
            inside = unpack(packed, 1, number * self.m).reshape(-1, self.m)
            groups = stored.gather(1, (inside.cumsum(1) - 1).clamp(min=0)) * inside.to(values.dtype)
        else:
            groups = values.new_zeros(number, self.m).scatter(1, self._places(packed, number), stored)
        return groups.reshape(rows, -1)[:, :columns]

    def gather(self, matrix: Tensor, packed: Tensor, count: int) -> Tensor:
        """Read the numbers of every group; those beyond the last column are zero."""
        groups = F.pad(matrix, (0, -matrix.shape[1] % self.m)).reshape(-1, self.m)
        return groups.gather(1, self._places(packed, count // self.n)).reshape(-1)

    def _places(self, packed: Tensor, groups: int) -> Tensor:
        """Return the places (groups, n) in their groups, ascending."""
        if self.index_bits is not None:
            return unpack(packed, self.index_bits, groups * self.n).long().reshape(-1, self.n)
        inside = unpack(packed, 1, groups * self.m).reshape(-1, self.m)
        return inside.argsort(dim=1, descending=True, stable=True)[:, : self.n]


def support_of(pattern: str) -> Support:
    """Return the support that a pattern names: `all` (single entries), `2:4` (n of m inputs), `16x16` (blocks).

    Raises ValueError for any other word.
    """
    found = PATTERN.fullmatch(pattern)
    if pattern == "all":
        return BlockSupport()
    if found is None or "0" in (found[1], found[3]):
        raise ValueError(f"no pattern of a support: {pattern!r}; expected `all`, `n:m` or `rows x columns` such as `16x16`")
    first, second = int(found[1]), int(found[3])
    return GroupSupport(first, second) if found[2] == ":" else BlockSupport(first, second)
