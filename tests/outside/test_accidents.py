"""A training killed at any moment and started again is, to the last bit, the one that was never killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import lives
import pytest
import torch
from lives import Life

from examples.loops import resumable

# A round and a half, with the switch in between.
STEPS = 8
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, str], Path]:
    """The losses and the folder of the uninterrupted run."""
    return uninterrupted(tmp_path_factory.mktemp("whole"), STEPS, STEPS)


def uninterrupted(folder: Path, steps: int, every: int) -> tuple[dict[int, str], Path]:
    life = lives.run(folder, steps, every)
    assert life.exitcode == 0 and [step for step, _ in life.losses] == list(range(1, steps + 1))
    return dict(life.losses), folder


def checker(losses: dict[int, str], folder: Path, every: int) -> Callable[[Life], None]:
    """Return what checks each life of one training: where it began, what it computed, what it left behind."""
    on_disk = 0

    def check(life: Life) -> None:
        nonlocal on_disk
        assert life.exitcode in (0, KILLED), "a life after a kill failed by itself"
        assert life.begun_after == on_disk, "did not go on from the checkpoint that the kill left"
        assert life.losses == [(step, losses[step]) for step, _ in life.losses]
        # A step's line comes before its checkpoint, the next step's line after it.
        last = life.losses[-1][0] if life.losses else life.begun_after
        finished = max(life.begun_after, (last - 1) // every * every)
        checkpoint = folder / resumable.CHECKPOINT
        on_disk = torch.load(checkpoint, weights_only=True)["step"] if checkpoint.exists() else 0
        assert finished <= on_disk <= last and last - on_disk <= every, "lost more than the last interval"

    return check


def assert_same_end(whole: Path, killed: Path) -> None:
    assert sorted(path.name for path in killed.iterdir()) == [resumable.CHECKPOINT, resumable.WEIGHTS]
    expected, found = (torch.load(folder / resumable.WEIGHTS, weights_only=True) for folder in (whole, killed))
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert torch.equal(weight, found[name]), name


@pytest.mark.parametrize("torn", ["4", "4 ", "4 0.2"])
def test_half_a_line_of_a_killed_life_is_no_step(torn: str) -> None:
    begun, step = "after step 2\n", "3 0.5\n"
    assert lives.life_of([begun, step, torn], KILLED) == Life(2, [(3, "0.5")], KILLED)
    assert lives.life_of([begun[:6]], KILLED) == Life(-1, [], KILLED)


def test_random_kills(whole: tuple[dict[int, str], Path], tmp_path: Path) -> None:
    hit, _ = lives.random_kills(tmp_path, STEPS, 2, 3, 0, checker(whole[0], tmp_path, 2))
    assert hit == 3
    assert_same_end(whole[1], tmp_path)


def test_each_moment_of_the_write(whole: tuple[dict[int, str], Path], tmp_path: Path) -> None:
    check = checker(whole[0], tmp_path, 1)
    begun = []
    for moment in lives.MOMENTS:
        # The second write of a life, so that there is an older checkpoint to lose.
        life = lives.run(tmp_path, STEPS, 1, moment=moment, write=1)
        check(life)
        assert life.exitcode == KILLED
        begun.append(life.begun_after)
        assert (tmp_path / "checkpoint.pt.partial").exists() == (moment != "after the replacement")
    # Three lives wrote one checkpoint and died in the next; the last one died after its second was in place.
    assert begun == [0, 1, 2, 3]
    end = lives.run(tmp_path, STEPS, 1)
    check(end)
    assert end.begun_after == 5 and end.exitcode == 0
    assert_same_end(whole[1], tmp_path)


def test_kill_between_checkpoint_and_weights(whole: tuple[dict[int, str], Path], tmp_path: Path) -> None:
    check = checker(whole[0], tmp_path, STEPS)
    check(lives.run(tmp_path, STEPS, STEPS, moment="half of it written", write=1))
    end = lives.run(tmp_path, STEPS, STEPS)
    check(end)
    assert end.losses == [] and end.begun_after == STEPS
    assert_same_end(whole[1], tmp_path)


def test_a_checkpoint_written_in_place_is_caught(whole: tuple[dict[int, str], Path], tmp_path: Path) -> None:
    check = checker(whole[0], tmp_path, 1)
    with pytest.raises((AssertionError, RuntimeError, EOFError)):
        check(lives.run(tmp_path, STEPS, 1, moment="half of it written", write=1, in_place=True))


def test_what_reaches_the_disk_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills cannot show a power failure; the order of the calls can."""
    path, calls = tmp_path / "checkpoint.pt", []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(number: int) -> None:
        synced = Path(os.readlink(f"/proc/self/fd/{number}"))
        size = synced.stat().st_size if synced.is_file() else 0
        calls.append((synced, size))
        fsync(number)

    def recorded_replace(source: Path, target: Path) -> None:
        calls.append((source, target))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    resumable.save({"weight": torch.zeros(1000)}, path)
    partial = tmp_path / "checkpoint.pt.partial"
    # All of the content is in the file's hands when it is synced.
    assert calls == [(partial, path.stat().st_size), (partial, path), (tmp_path, 0)]
    assert torch.equal(torch.load(path, weights_only=True)["weight"], torch.zeros(1000))


@pytest.mark.slow
def test_fifty_random_kills(tmp_path: Path) -> None:
    # A life of a kill prints three lines at most, so 50 kills come before the end.
    steps, every = 160, 1
    losses, whole = uninterrupted(tmp_path / "whole", steps, every)
    killed = tmp_path / "killed"
    hit, partial = lives.random_kills(killed, steps, every, 50, 1, checker(losses, killed, every))
    assert hit == 50
    # Else no kill has hit a write, and the test has tested little.
    assert partial > 0
    assert_same_end(whole, killed)
