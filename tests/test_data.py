"""gpuad.utils.data: datasets, samplers, collating, and the DataLoader with and without threads."""

import threading
import time
from collections import Counter, OrderedDict, namedtuple

import numpy as np
import pytest

import gpuad
from gpuad.utils import data
from gpuad.utils.data import DataLoader, TensorDataset


def listed(tensor):
    return tensor.cpu().tolist()


def generator(seed=0):
    return gpuad.Generator().manual_seed(seed)


class Squares(data.Dataset):
    """Sample i is i²; counts what is read."""

    def __init__(self, size):
        self.size = size
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return index * index

    def __len__(self):
        return self.size


class Countdown(data.IterableDataset):
    def __init__(self, size):
        self.size = size

    def __iter__(self):
        return iter(range(self.size, 0, -1))

    def __len__(self):
        return self.size


# ---------------------------------------------------------------------- datasets


def test_tensor_dataset(device):
    x, y = gpuad.arange(12, device=device).reshape(6, 2), gpuad.arange(6, device=device)
    dataset = TensorDataset(x, y)
    assert len(dataset) == 6
    sample = dataset[4]
    assert isinstance(sample, tuple) and listed(sample[0]) == [8, 9] and sample[1].item() == 4
    with pytest.raises(ValueError, match=r"lengths \[6, 5\]"):
        TensorDataset(x, y[:5])
    with pytest.raises(ValueError, match="one or more"):
        TensorDataset()


def test_subset_and_concat():
    first, second = Squares(3), Squares(4)
    both = first + second
    assert isinstance(both, data.ConcatDataset) and len(both) == 7 and both.cumulative_sizes == [3, 7]
    assert [both[index] for index in range(7)] == [0, 1, 4, 0, 1, 4, 9]
    assert both[-1] == 9 and both[-7] == 0
    for index in (7, -8):
        with pytest.raises(IndexError, match=f"index {index}"):
            both[index]
    part = data.Subset(both, [6, 2, 2])
    assert len(part) == 3 and [part[index] for index in range(3)] == [9, 4, 4]
    with pytest.raises(ValueError, match="empty"):
        data.ConcatDataset([])
    with pytest.raises(TypeError, match="IterableDataset"):
        data.ConcatDataset([Countdown(3)])
    with pytest.raises(NotImplementedError, match="Dataset must define __getitem__"):
        data.Dataset()[0]


def test_random_split():
    parts = data.random_split(range(10), [7, 3], generator=generator())
    assert [len(part) for part in parts] == [7, 3]
    assert sorted(sample for part in parts for sample in part) == list(range(10))
    again = data.random_split(range(10), [7, 3], generator=generator())
    assert [part.indices for part in again] == [part.indices for part in parts]
    assert [len(part) for part in data.random_split(range(11), [0.5, 0.25, 0.25])] == [6, 3, 2]
    assert [len(part) for part in data.random_split(range(10), [1 / 3] * 3)] == [4, 3, 3]
    assert [len(part) for part in data.random_split(range(1), [1])] == [1]
    for lengths in ([5, 4], [0.5, 0.4], [11, -1], [9.5, 0.5]):
        with pytest.raises(ValueError, match="Sum of input lengths does not equal"):
            data.random_split(range(10), lengths)
    with pytest.raises(ValueError, match="index 0 is not between 0 and 1: 1.5"):
        data.random_split(range(10), [1.5, -0.5])


# ---------------------------------------------------------------------- samplers


def test_sequential_and_random_samplers():
    assert list(data.SequentialSampler(range(4))) == [0, 1, 2, 3]
    sampler = data.RandomSampler(range(50), generator=generator())
    first, second = list(sampler), list(sampler)
    assert sorted(first) == sorted(second) == list(range(50)) and first != second and len(sampler) == 50
    assert first == list(data.RandomSampler(range(50), generator=generator()))
    assert all(isinstance(index, int) for index in first)
    longer = list(data.RandomSampler(range(4), num_samples=10))
    assert len(longer) == 10 and sorted(longer[:4]) == sorted(longer[4:8]) == [0, 1, 2, 3]
    drawn = data.RandomSampler(range(4), replacement=True, num_samples=4000, generator=generator())
    assert len(drawn) == 4000 and all(900 < count < 1100 for count in Counter(drawn).values())
    assert list(data.RandomSampler(range(0))) == []


def test_the_order_depends_on_the_seed_alone():
    gpuad.manual_seed(3)
    first = list(data.RandomSampler(range(20)))
    gpuad.manual_seed(3)
    assert list(data.RandomSampler(range(20))) == first
    loader = DataLoader(range(20), shuffle=True, generator=generator(5))
    gpuad.rand(3)
    order = [batch.item() for batch in loader]
    assert order == [batch.item() for batch in DataLoader(range(20), shuffle=True, generator=generator(5))]
    assert order == listed(gpuad.randperm(20, generator=generator(5)))


def test_subset_random_sampler():
    sampler = data.SubsetRandomSampler([3, 1, 4, 15], generator=generator())
    assert sorted(sampler) == [1, 3, 4, 15] and len(sampler) == 4


def test_weighted_sampler():
    weights = [0.0, 1.0, 3.0, 0.0]
    counts = Counter(data.WeightedRandomSampler(weights, 8000, generator=generator()))
    assert set(counts) == {1, 2} and abs(counts[2] / counts[1] - 3) < 0.3
    first = Counter()
    for seed in range(2000):
        drawn = list(data.WeightedRandomSampler(weights, 2, replacement=False, generator=generator(seed)))
        assert sorted(drawn) == [1, 2]
        first[drawn[0]] += 1
    assert abs(first[2] / 2000 - 0.75) < 0.04


def test_batch_sampler():
    assert list(data.BatchSampler(range(5), 2, False)) == [[0, 1], [2, 3], [4]]
    assert list(data.BatchSampler(range(5), 2, True)) == [[0, 1], [2, 3]]
    assert len(data.BatchSampler(range(5), 2, False)) == 3 and len(data.BatchSampler(range(5), 2, True)) == 2


def test_what_samplers_refuse():
    for make, error, words in (
        (lambda: data.RandomSampler(range(3), num_samples=0), ValueError, "num_samples=0"),
        (lambda: data.RandomSampler(range(3), replacement=1), TypeError, "replacement=1"),
        (lambda: data.BatchSampler(range(3), 0, False), ValueError, "batch_size=0"),
        (lambda: data.BatchSampler(range(3), True, False), ValueError, "batch_size=True"),
        (lambda: data.BatchSampler(range(3), 1, 1), ValueError, "drop_last=1"),
        (lambda: data.WeightedRandomSampler([1.0], 0), ValueError, "num_samples=0"),
        (lambda: data.WeightedRandomSampler([[1.0]], 1), ValueError, "1d sequence"),
        (lambda: data.WeightedRandomSampler([1.0, -1.0], 1), ValueError, "not negative"),
        (lambda: data.WeightedRandomSampler([0.0], 1), ValueError, "not all 0"),
        (lambda: data.WeightedRandomSampler([1.0, 0.0], 2, replacement=False), ValueError, "from 1 positive"),
    ):
        with pytest.raises(error, match=words):
            make()


# ---------------------------------------------------------------------- collate


def test_default_collate():
    Point = namedtuple("Point", "x y")
    tensors = data.default_collate([gpuad.ones(2), gpuad.zeros(2)])
    assert listed(tensors) == [[1, 1], [0, 0]]
    arrays = data.default_collate([np.ones(2, dtype=np.int16), np.zeros(2, dtype=np.int16)])
    assert isinstance(arrays, gpuad.Tensor) and arrays.dtype == gpuad.int16 and listed(arrays) == [[1, 1], [0, 0]]
    assert data.default_collate([np.float32(1), np.float32(2)]).dtype == gpuad.float32
    assert data.default_collate([1.5, 2.5]).dtype == gpuad.float64
    assert data.default_collate([1, 2]).dtype == gpuad.int64
    assert data.default_collate([True, False]).dtype == gpuad.bool
    assert data.default_collate(["a", "b"]) == ["a", "b"] and data.default_collate([b"a"]) == [b"a"]
    mapping = data.default_collate([OrderedDict(a=1, b="x"), OrderedDict(a=2, b="y")])
    assert type(mapping) is OrderedDict and listed(mapping["a"]) == [1, 2] and mapping["b"] == ["x", "y"]
    points = data.default_collate([Point(1, 2.0), Point(3, 4.0)])
    assert type(points).__name__ == "Point" and listed(points.x) == [1, 3] and listed(points.y) == [2, 4]
    pairs = data.default_collate([(1, [2, 3]), (4, [5, 6])])
    assert (
        isinstance(pairs, list)
        and listed(pairs[0]) == [1, 4]
        and [listed(part) for part in pairs[1]] == [[2, 5], [3, 6]]
    )


def test_what_default_collate_refuses():
    with pytest.raises(RuntimeError, match="equal size"):
        data.default_collate([(1, 2), (1,)])
    with pytest.raises(TypeError, match="found object"):
        data.default_collate([object()])
    with pytest.raises(TypeError, match="NumPy arrays of dtype <U1"):
        data.default_collate([np.array(["a"])])


# ---------------------------------------------------------------------- DataLoader


def test_batches_of_a_tensor_dataset(device):
    x, y = gpuad.arange(14, device=device).reshape(7, 2), gpuad.arange(7)
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    assert len(loader) == 3
    batches = list(loader)
    assert all(isinstance(batch, list) for batch in batches)
    assert [listed(batch[1]) for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    assert batches[0][0].device == device and batches[0][1].device.type == "cpu"
    assert listed(batches[2][0]) == [[12, 13]]
    batches[0][0].zero_()
    assert listed(x[1]) == [2, 3]  # a batch is a copy
    dropped = DataLoader(TensorDataset(x, y), 3, drop_last=True)
    assert len(dropped) == len(list(dropped)) == 2


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        lambda: {},
        lambda: {"shuffle": True, "generator": generator(1)},
        lambda: {"sampler": [5, 0, 0, 3, 2]},
        lambda: {"sampler": data.SubsetRandomSampler([1, 3, 5, 7, 8], generator(2))},
        lambda: {"sampler": data.RandomSampler(range(10), True, 25, generator(3))},
        lambda: {"sampler": data.WeightedRandomSampler([1.0] * 10, 7, generator=generator(4))},
    ],
    ids=["sequential", "shuffle", "list", "subset", "replacement", "weighted"],
)
def test_gathered_batches_equal_collated_ones(device, options, drop_last):
    """The fast path for a TensorDataset gives what reading sample by sample gives, in the same order."""
    dataset = TensorDataset(gpuad.randn(10, 3, device=device), gpuad.arange(10, device=device))
    fast = DataLoader(dataset, 4, drop_last=drop_last, **options())
    slow = DataLoader(dataset, 4, drop_last=drop_last, collate_fn=lambda b: data.default_collate(b), **options())
    for _ in range(2):
        pairs = list(zip(fast, slow, strict=True))
        assert len(pairs) == len(fast)
        for quick, sure in pairs:
            assert all(listed(a) == listed(b) and a.device == b.device for a, b in zip(quick, sure, strict=True))


def test_gathering_reads_whole_batches(device, monkeypatch):
    dataset = TensorDataset(gpuad.randn(10, 3, device=device))
    monkeypatch.setattr(gpuad, "stack", lambda *args: pytest.fail("samples were stacked"))
    parts = data.random_split(dataset, [8, 2], generator=generator())
    for source in (dataset, parts[0], data.Subset(parts[0], [0, 7])):
        rows = [listed(source[index][0]) for index in range(len(source))]
        assert [row for (batch,) in DataLoader(source, 3) for row in listed(batch)] == rows
    batches = DataLoader(dataset, batch_sampler=[[1, 2], [9]])
    assert [batch[0].shape for batch in batches] == [(2, 3), (1, 3)]


def test_a_subclass_that_reads_otherwise_is_not_gathered():
    class Doubled(TensorDataset):
        def __getitem__(self, index):
            return tuple(2 * part for part in super().__getitem__(index))

    (batch,) = next(iter(DataLoader(Doubled(gpuad.arange(3)), 3)))
    assert listed(batch) == [0, 2, 4]


def test_a_sampler_that_iterates_otherwise_is_iterated_over():
    class Backwards(data.SequentialSampler):
        def __iter__(self):
            return iter(range(len(self) - 1, -1, -1))

    dataset = TensorDataset(gpuad.arange(5))
    assert [listed(batch) for (batch,) in DataLoader(dataset, 2, sampler=Backwards(dataset))] == [[4, 3], [2, 1], [0]]


def test_shuffling_is_new_in_each_epoch_and_covers_everything():
    loader = DataLoader(TensorDataset(gpuad.arange(30)), 7, shuffle=True)
    first, second = ([index for (batch,) in loader for index in listed(batch)] for _ in range(2))
    assert first != second and sorted(first) == sorted(second) == list(range(30))


def test_shuffled_order_is_the_same_on_every_device(device):
    orders = []
    for place in ("cpu", device):
        loader = DataLoader(TensorDataset(gpuad.arange(40, device=place)), 7, shuffle=True, generator=generator(9))
        orders.append([index for (batch,) in loader for index in listed(batch)])
    assert orders[0] == orders[1]


def test_shuffled_batches_on_a_device_wait_for_nothing(cuda_device, counts):
    dataset = TensorDataset(gpuad.randn(64, 3, device=cuda_device), gpuad.arange(64, device=cuda_device))
    loader = DataLoader(dataset, 16, shuffle=True)
    list(loader)
    with counts() as record:
        list(loader)
    assert record.syncs == 0 and record.copies("h2d") == record.copies("d2h") == (0, 0)


def test_lists_collate_functions_and_getitems():
    assert [listed(batch) for batch in DataLoader([5, 6, 7], batch_size=2)] == [[5, 6], [7]]
    assert list(DataLoader([5, 6, 7], 2, collate_fn=sum)) == [11, 7]
    assert [listed(batch) for batch in DataLoader(Squares(3), batch_sampler=[[2, 1], [0]])] == [[4, 1], [0]]

    class Bulk(Squares):
        def __getitems__(self, indices):
            return [-index for index in indices]

    assert [listed(batch) for batch in DataLoader(Bulk(3), 2)] == [[0, -1], [-2]]


def test_without_batches():
    loader = DataLoader([np.ones(2), {"a": (1, "x")}], batch_size=None)
    first, second = loader
    assert isinstance(first, gpuad.Tensor) and second == {"a": [1, "x"]} and len(loader) == 2
    assert list(DataLoader([1, 2], batch_size=None, collate_fn=lambda sample: -sample)) == [-1, -2]


@pytest.mark.parametrize("workers", [0, 2])
def test_iterable_dataset(workers):
    loader = DataLoader(Countdown(5), batch_size=2, num_workers=workers)
    assert [listed(batch) for batch in loader] == [[5, 4], [3, 2], [1]] and len(loader) == 3
    dropped = DataLoader(Countdown(5), 2, drop_last=True, num_workers=workers)
    assert [listed(batch) for batch in dropped] == [[5, 4], [3, 2]] and len(dropped) == 2
    assert list(DataLoader(Countdown(3), batch_size=None, num_workers=workers)) == [3, 2, 1]
    for options in ({"shuffle": True}, {"sampler": [0]}, {"batch_sampler": [[0]]}):
        with pytest.raises(ValueError, match="IterableDataset has no indices"):
            DataLoader(Countdown(3), num_workers=workers, **options)


# ---------------------------------------------------------------------- threads


def test_threads_keep_the_order():
    class Uneven(Squares):
        def __getitem__(self, index):
            time.sleep(0.002 * (index % 3))
            return index, threading.get_ident()

    loader = DataLoader(Uneven(20), batch_size=2, num_workers=3)
    assert [index for batch, _ in loader for index in listed(batch)] == list(range(20))
    threads = {thread for _, batch in loader for thread in listed(batch)}
    assert threading.get_ident() not in threads and len(threads) <= 3


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_made_on_the_callers_default_device(device, workers):
    with device:
        assert [batch.device for batch in DataLoader([1, 2, 3], 2, num_workers=workers)] == [device, device]


def test_exceptions_of_threads_are_raised_in_their_place():
    class Broken(Squares):
        def __getitem__(self, index):
            if index == 5:
                raise KeyError("sample 5")
            return index

    for workers in (0, 2):
        batches = iter(DataLoader(Broken(10), batch_size=2, num_workers=workers))
        assert [listed(next(batches)) for _ in range(2)] == [[0, 1], [2, 3]]
        with pytest.raises(KeyError, match="sample 5"):
            next(batches)


def test_threads_read_no_further_ahead_than_asked():
    dataset = Squares(100)
    batches = iter(DataLoader(dataset, num_workers=2, prefetch_factor=3))
    next(batches)
    time.sleep(0.05)
    assert len(dataset.read) <= 7
    before = threading.active_count()
    batches.close()  # leaving a loop does this
    time.sleep(0.05)
    assert len(dataset.read) <= 7 and threading.active_count() < before


def test_what_the_loader_refuses():
    for options, words in (
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers should be non-negative, got -1"),
        ({"prefetch_factor": 0}, "prefetch_factor should be positive, got 0"),
        ({"shuffle": True, "sampler": [0]}, "mutually exclusive with shuffle"),
        ({"batch_sampler": [[0]], "batch_size": 2}, "batch_sampler option is mutually exclusive"),
        ({"batch_sampler": [[0]], "shuffle": True}, "batch_sampler option is mutually exclusive"),
        ({"batch_size": None, "drop_last": True}, "makes no batches"),
    ):
        with pytest.raises(ValueError, match=words):
            DataLoader(range(3), **options)
    with pytest.raises(ValueError, match="batch_size=0"):
        DataLoader(Countdown(3), batch_size=0)
