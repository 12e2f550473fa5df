"""Work by two threads: all of it, within its bound of memory, and the first error at once."""

import threading
import time

import pytest
import torch

from fairseq_moe_ext.checkpoints.two_at_a_time import two_at_a_time


class Watched:
    """Pieces of work of so many bytes; most: the bytes, and the threads, that were at work together."""

    def __init__(self, sizes):
        self.sizes, self._lock = sizes, threading.Lock()
        self.at_work, self.most_bytes, self.most = [], 0, 0

    def do(self, name):
        with self._lock:
            self.at_work.append(self.sizes[name])
            self.most_bytes, self.most = max(self.most_bytes, sum(self.at_work)), max(self.most, len(self.at_work))
        time.sleep(0.01)
        with self._lock:
            self.at_work.remove(self.sizes[name])
        return name, torch.get_num_threads()

    def run(self, room):
        work = {name: lambda name=name: self.do(name) for name in self.sizes}
        return list(two_at_a_time(work, self.sizes, room))


def test_all_is_done_two_at_a_time_with_half_of_pytorchs_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        watched = Watched({str(number): 1 for number in range(9)})
        done = watched.run(room=100)
        assert sorted(done) == [(str(number), 2) for number in range(9)] and watched.most == 2
        assert torch.get_num_threads() == 4
        found = []
        later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert found == [4]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("sizes, most", [([5, 5, 5, 9, 2, 12, 3, 3], 12), ([7, 7, 7], 7), ([10, 1, 10, 1], 10)])
def test_those_at_work_take_no_more_than_the_room_but_for_one_alone(sizes, most):
    watched = Watched({str(number): size for number, size in enumerate(sizes)})
    assert len(watched.run(room=10)) == len(sizes)
    assert watched.most_bytes <= most


def test_an_error_ends_it_and_what_was_not_begun_is_not_done():
    begun = []

    def do(name):
        begun.append(name)
        if name == "b":
            raise ValueError("no")
        return name

    work = {name: lambda name=name: do(name) for name in "abcdefgh"}
    with pytest.raises(ValueError, match="^no$"):
        list(two_at_a_time(work, dict.fromkeys(work, 1), 1))
    assert begun == ["a", "b"]
