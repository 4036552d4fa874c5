"""Which documents an epoch has, and in what order.

Both are drawn from (seed, epoch) alone, so that what comes at a place of the run never depends on
how long the run is planned to be, and a run goes on anywhere without having been through what was
before.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from megalong.data.sources import LengthUpsampling
from megalong.utils.errors import system_errors_of
from megalong.utils.files import writable_folder

LARGE = 100_000  # elements; what is smaller is made in no time
_FLAG = "--data-cache-path"


class IndexCache:
    """A folder (made where there is none) of arrays, each under a name that its origin decides."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        writable_folder(_FLAG, self._folder)
        self._digests: dict[int, tuple[np.ndarray, bytes]] = {}

    def array(self, origin: np.ndarray, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """What make() returns, an int64 array, which the content of `origin` and `key` decide:
        made by the first process that asks, while others wait, and read by all."""
        if origin.size < LARGE:
            return make()
        name = hashlib.sha256(self._digest(origin) + key.encode()).hexdigest()[:40]
        path = self._folder / f"{name}.npy"
        with system_errors_of(_FLAG, self._folder):
            found = _mapped(path)
            if found is None:
                with self._only_one():
                    found = _mapped(path)
                    if found is None:
                        _write(path, make())
                        found = _mapped(path)
        return make() if found is None else found

    def _digest(self, origin: np.ndarray) -> bytes:
        """Of its content; of the same array it is computed once."""
        known = self._digests.get(id(origin))
        if known is None or known[0] is not origin:
            content = hashlib.sha256(str((origin.dtype.str, origin.shape)).encode())
            content.update(np.ascontiguousarray(origin).data)
            known = self._digests[id(origin)] = origin, content.digest()
        return known[1]

    @contextlib.contextmanager
    def _only_one(self) -> Iterator[None]:
        """Inside, no other process is, where the file system has locks; elsewhere two may make the
        same file, one after the other taking its name."""
        path = self._folder / "lock"
        try:
            lock = os.open(path, os.O_RDONLY)  # it may be another user's
        except FileNotFoundError:
            lock = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def _write(path: Path, array: np.ndarray) -> None:
    """At one stroke: nobody sees a part of it."""
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)  # other users' runs may read it
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def _mapped(path: Path) -> np.ndarray | None:
    """The array in a file, mapped into memory; None where there is none, or a broken one."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):
        return None


# Of the way that orders are drawn, and of what is made of them: another one has other files in a
# cache.
VERSION = 1


class DocumentOrder:
    """Documents in a new order each epoch.

    lengths: int64 (documents,), their tokens. shuffle: False keeps their own order in every epoch.
    cache: where what is made of an epoch is kept on the disk, if it is.
    salt: of the order too, so that the sources of a blend have orders of their own.
    upsampling: how often a document is in an epoch, by its length; None: once. Where that is w
    times, a document has been there floor(e w + phase) times before epoch e, 0 <= phase < 1: less
    than one away from e w, always. The phases of a bucket's documents are spread evenly, in an
    order drawn from the seed, so that an epoch has its share of them within one document.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        seed: int,
        *,
        shuffle: bool = True,
        salt: int = 0,
        upsampling: LengthUpsampling | None = None,
        cache: IndexCache | None = None,
    ) -> None:
        self.lengths, self.seed, self.shuffle, self.salt = lengths, seed, shuffle, salt
        self._upsampling, self._cache = upsampling, cache
        if upsampling is None:
            return
        self._bucket = upsampling.bucket(lengths).astype(np.int16)
        self._phase = np.zeros(len(lengths), np.int32)  # in units of 1 / the weight's denominator
        for b, weight in enumerate(upsampling.weights):
            if weight.denominator > 1:
                members = np.flatnonzero(self._bucket == b)
                drawn = members[_shuffled(len(members), (seed, upsampling.bounds[b], salt, 1))]
                self._phase[drawn] = np.arange(len(members)) % weight.denominator

    def epoch(self, epoch: int) -> np.ndarray:
        """The documents of an epoch in its order, each as often as it counts, int64."""
        documents = np.arange(len(self.lengths))
        if self._upsampling is not None:
            times = self._times_before(epoch + 1) - self._times_before(epoch)
            documents = np.repeat(documents, times)
        if self.shuffle:
            documents = documents[_shuffled(len(documents), (self.seed, epoch, self.salt))]
        return documents

    def kept(self, what: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """What make() returns, an int64 array that hangs on nothing but this order and `what`; from
        the cache, where there is one."""
        if self._cache is None:
            return make()
        key = f"version {VERSION} {what} seed {self.seed} salt {self.salt} shuffle {self.shuffle}"
        return self._cache.array(self.lengths, f"{key} upsampling {self._upsampling}", make)

    def total_before(self, epoch: int, values: np.ndarray) -> int:
        """The sum of the values of all documents of the epochs before this one.

        values: int64 (documents,), one of each document.
        """
        if self._upsampling is None:
            return epoch * int(values.sum())
        return int(self._times_before(epoch) @ values)

    def mean_total(self, values: np.ndarray) -> Fraction:
        """What an epoch adds to `total_before`, in the long run."""
        if self._upsampling is None:
            return Fraction(int(values.sum()))
        weights = self._upsampling.weights
        totals = [int(values[self._bucket == b].sum()) for b in range(len(weights))]
        return sum((w * total for w, total in zip(weights, totals, strict=True)), Fraction())

    def _times_before(self, epoch: int) -> np.ndarray:
        """How often each document has been in the epochs before this one, int64 (documents,)."""
        # floor((e n + phase) / d) of a weight n / d; with e n = whole d + rest that is one more
        # than `whole` where the phase reaches d - rest.
        whole, rest = zip(
            *(divmod(epoch * w.numerator, w.denominator) for w in self._upsampling.weights),
            strict=True,
        )
        reached = [w.denominator - r for w, r in zip(self._upsampling.weights, rest, strict=True)]
        return np.array(whole)[self._bucket] + (self._phase >= np.array(reached)[self._bucket])


def find_epoch(total_before: Callable[[int], int], place: int) -> int:
    """The epoch that a place belongs to. total_before: where an epoch begins; it grows without
    end, and need not in each epoch."""
    beyond = 1
    while total_before(beyond) <= place:
        beyond *= 2
    return bisect_right(range(beyond), place, key=total_before) - 1


def _shuffled(count: int, seed: tuple[int, ...]) -> np.ndarray:
    # Sorting raw random bits, not Generator.permutation: numpy promises the former's values
    # across its versions, and a run must resume into the same order after an upgrade. Zeros at the
    # end of a seed, no salt for one, are as nothing.
    bits = np.random.PCG64(np.random.SeedSequence(seed))
    return np.argsort(bits.random_raw(count), kind="stable")
