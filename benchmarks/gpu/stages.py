"""What holds and how fast is it on this GPU: one command for each stage, no network, a JSON record each.

python -m benchmarks.gpu --stage first --out DIR    what the first minutes on a GPU have to show; PARTS chooses of it

The docstring of a stage's function says what it does, and CONTRIBUTING.md in which order they are worth running.
bench, formats, e2e and caps print no figure of a step that is wrong here: `first/parity.py` looks at it before. Their
records say which tests had passed at that commit, by those beside and in benchmarks/results/gpu.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.gpu import nvidia, outcomes, wheels
from benchmarks.gpu.first import stage as first_stage
from benchmarks.gpu.first.part import kill_tree
from benchmarks.gpu.first.stage import LIMIT_S, PARTS

# Below the eight minutes that a stage may take, with room for the last measurement to end.
TIME_LIMIT_S = 440.0


def main(argv: list[str] | None = None) -> int:
    """Run the stage that the command line names; return the exit code."""
    started = time.monotonic()
    args = parser().parse_args(argv)
    if args.time_limit is None:
        args.time_limit = LIMIT_S if args.stage == "first" else TIME_LIMIT_S
    deadline = started + args.time_limit
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "no CUDA device: `make gpu` needs one; on a CPU run `python -m benchmarks.gpu --stage first --device cpu`",
            file=sys.stderr,
        )
        return 2
    # Engagement does it beside its looks.
    if device.type == "cuda" and not (args.stage == "first" and "engagement" in args.parts):
        # In a process of its own: a stage must report on a package that does not import.
        subprocess.run([sys.executable, "-m", "benchmarks.gpu.nvcc"], cwd=record.ROOT)
    return STAGES[args.stage](args, device, deadline)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    made.add_argument("--stage", choices=STAGES, default="first")
    made.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder of the JSON records")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    limits = f"default {LIMIT_S:.0f} of first, which ends by then, and {TIME_LIMIT_S:.0f}"
    made.add_argument("--time-limit", type=float, help=f"of a stage: seconds after which nothing new starts; {limits}")
    made.add_argument(
        "--parts", type=parts_of, default=tuple(PARTS), help=f"of first, separated by commas: {', '.join(PARTS)}"
    )
    made.add_argument(
        "--shape",
        action="append",
        choices=("tiny", "11m", "130m", "1b", "8b"),
        help="may be repeated; e2e, caps, and memory (8b, tiny)",
    )
    made.add_argument(
        "--checkpointing", action=argparse.BooleanOptionalAction, help="override the shape's plan; e2e only"
    )
    return made


def parts_of(text: str) -> tuple[str, ...]:
    """Return the names in a list like "step,train"; all where it is empty."""
    names = tuple(name for name in text.split(",") if name) or tuple(PARTS)
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} must be of {', '.join(PARTS)}")
    return names


def first(args: argparse.Namespace, device: torch.device, deadline: float) -> int:
    """Run the parts of `benchmarks.gpu.first`, each in a process of its own, and write first.json as they report."""
    return first_stage.run(device, args.parts, args.out, deadline)


def smoke(args: argparse.Namespace, device: torch.device, deadline: float) -> int:
    """Run the tests marked gpu and write their counts to smoke.json, each as it ends to smoke.jsonl."""
    counts = run_gpu_tests(deadline, args.out / "smoke.jsonl")
    path = record.write(args.out, "smoke", record.environment(device) | {"stage": "smoke", "tests": counts})
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped; {path}")
    return 0 if counts["ok"] else 1


def run_gpu_tests(deadline: float, path: Path) -> dict[str, Any]:
    """Return the numbers of passed, failed and skipped GPU tests, and "ok" if some ran and none failed.

    Args:
        deadline: Reading of `time.monotonic` at which they are stopped; those that have ended count.
        path: File that each test writes a line to when it ends.
    """
    started = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "benchmarks.gpu.outcomes", f"--outcomes={path}"]
    # Neither a plugin's benchmarks nor a cache in the checkout belongs here; both options do without it.
    command += ["-p", "no:benchmark", "-p", "no:cacheprovider"]
    workers = min((os.cpu_count() or 1) // 2, 8)
    if workers > 1 and importlib.util.find_spec("xdist"):
        # Triton compiles some 200 variants, each on one core for a second and more.
        command += ["-n", str(workers)]
    # pytest's own import path begins in the folder of the tests.
    search = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(command, cwd=record.ROOT, env=os.environ | {"PYTHONPATH": search})
    try:
        code = process.wait(timeout=max(deadline - started, 0.1))
    except subprocess.TimeoutExpired:
        code = None
        # With its workers, which would go on.
        kill_tree(process.pid)
        process.wait()
    counts = outcomes.count(path)
    return counts | {
        "ok": code == 0 and counts["passed"] > 0,
        "exit_code": code,
        "timed_out": code is None,
        "seconds": round(time.monotonic() - started, 1),
    }


def tests_at(commit: str, folders: Sequence[Path]) -> dict[str, Any]:
    """Return what the tests said at a commit by the records in folders: counts of `smoke` and `test`."""
    found: dict[str, Any] = {}
    for folder in folders:
        for path in (folder / "smoke.json", folder / "test.json"):
            content = json.loads(path.read_text()) if path.exists() else {}
            if content.get("commit") == commit:
                found.setdefault(path.stem, content["tests"])
    return found


def look(content: dict[str, Any], names: Sequence[str], device: torch.device, out: Path) -> list[str]:
    """Put into a record which tests had passed, and how the step does in the variants named; return those found wrong.

    A GPU's kernels alone are looked at: on a CPU the tests are run by whoever changes something.
    """
    content["tests"] = tests_at(content["commit"], (out, record.ROOT / "benchmarks" / "results" / "gpu"))
    if device.type == "cpu":
        return []
    from benchmarks.gpu.first.parity import check_all, excused

    content["parity"] = {}
    for variants in check_all(names, device):
        content["parity"] = variants
    wrong = [name for name, variant in content["parity"].items() if not (variant["ok"] or excused(variant))]
    print(f"parity: {len(names) - len(wrong)} of {len(names)} variants right", *wrong, sep="\n  WRONG ")
    return wrong


def test(args: argparse.Namespace, device: torch.device, deadline: float) -> int:
    """Run the tests marked gpu, then a few under compute-sanitizer; write test.json after each."""
    counts = run_gpu_tests(deadline, args.out / "test.jsonl")
    content = record.environment(device) | {"stage": "test", "tests": counts, "sanitizer": []}
    path = record.write(args.out, "test", content)
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped; {path}")
    # The second gets what the first leaves of the time, and more of it than nothing.
    left = deadline - time.monotonic()
    for tool, until in (("memcheck", time.monotonic() + 0.6 * left), ("racecheck", deadline)):
        result = nvidia.sanitize(tool, until)
        content["sanitizer"].append(result)
        record.write(args.out, "test", content)
        found = f"{result.get('found')} found in {result.get('passed')} tests"
        print(f"{tool}: {result.get('absent', found)}{'' if result['ok'] else ' FAILED: ' + result['tail']}")
    return 0 if counts["ok"] and all(result["ok"] for result in content["sanitizer"]) else 1


def bench(args: argparse.Namespace, device: torch.device, deadline: float) -> int:
    """Time the step beside torch's AdamW and write bench.json after every case."""
    # Not at the top, for the same reason as in `e2e`.
    from benchmarks.step import peers, update

    return time_steps("bench", args, device, deadline, update.CASES[device.type], peers.PEERS, "bf16 misa")


def formats(args: argparse.Namespace, device: torch.device, deadline: float) -> int:
    """Time the step with compressed moments beside the optimizers of other packages and write formats.json.

    What `make wheels` has put into out/peers is found there; packages that the machine has itself go first.
    """
    from benchmarks.step import peers, update

    sys.path.append(str(wheels.FOLDER))
    cases = update.FORMAT_CASES[device.type]
    return time_steps("formats", args, device, deadline, cases, peers.FORMATS, "bf16 misa int8")


def time_steps(
    stage: str,
    args: argparse.Namespace,
    device: torch.device,
    deadline: float,
    cases: Sequence[Any],
    peers: Mapping[str, Any],
    profiled: str,
) -> int:
    """Time the peers in the cases, but ours that are wrong; count the bytes of the profiled one, write STAGE.json."""
    from benchmarks.gpu.first.parity import VARIANTS
    from benchmarks.step import apart as steps
    from benchmarks.step import goals
    from benchmarks.step.update import REPEATS, launches, measure

    content = record.environment(device) | {"stage": stage, "cases": []}
    wrong = look(content, [name for name in peers if name in VARIANTS], device, args.out)
    peers = {name: peer for name, peer in peers.items() if name not in wrong}
    content["cold"] = steps.cold(device, deadline)
    for case in measure(cases, device, deadline, REPEATS[device.type], peers):
        content["cases"].append(case)
        path = record.write(args.out, stage, content)
    content["launches"] = launches(cases[0], device, peers) if time.monotonic() < deadline else {}
    # On a CPU there is no device memory to count.
    content["dram"] = {"absent": "no CUDA device"} if device.type == "cpu" else nvidia.dram_bytes(deadline, profiled)
    content["goals"] = goals.goals(content)
    path = record.write(args.out, stage, content)
    print(goals.table(content["cases"]))
    counts = goals.launched(content["launches"])
    print(f"kernel launches of a step, {cases[0]}: {counts or 'left out at the time limit'}")
    print(goals.verdict(content["goals"]))
    for name in ("cold", "dram"):
        if "absent" in content[name]:
            print(f"{name}: {content[name]['absent']}")
    print(f"commit {content['commit']}, {content['device']['name']}, torch {torch.__version__}; {path}")
    # Peers may be missing or too large for the device; MISA may be too large, its CUDA library missing.
    excused = ("OutOfMemoryError", "ValueError: backend='cuda'")
    failed = [
        f"{name} at {case['elements']}: {peer['error']}"
        for case in content["cases"]
        for name, peer in case.get("peers", {}).items()
        if name in goals.OURS and "error" in peer and not peer["error"].startswith(excused)
    ]
    print(*failed, sep="\n", end="\n" if failed else "")
    return 1 if failed or wrong else 0


def everything(args: argparse.Namespace, device: torch.device, deadline: float) -> int:
    """Run all stages but first and smoke, which is part of test, in turn, each with the whole time limit."""
    stages = (test, bench, formats, growth, e2e, caps, memory, regime)
    return max(stage(args, device, time.monotonic() + args.time_limit) for stage in stages)


def e2e(args: argparse.Namespace, device: torch.device, deadline: float) -> int:
    """Time whole training iterations at equal batch and write them to e2e.json after every measurement."""
    return iterations(args, device, deadline, caps=False)


def caps(args: argparse.Namespace, device: torch.device, deadline: float) -> int:
    """The same at the largest batch under caps of 24, 48 and 80 GiB, to caps.json."""
    return iterations(args, device, deadline, caps=True)


def iterations(args: argparse.Namespace, device: torch.device, deadline: float, caps: bool) -> int:
    """Run what `e2e` and `caps` are for, unless the step that all of ours take is wrong."""
    # Not at the top: `make gpu STAGE=smoke` must report on a package that does not import.
    from benchmarks.train.e2e import run
    from benchmarks.train.trainers import OURS

    sys.path.append(str(wheels.FOLDER))
    found: dict[str, Any] = {"commit": record.commit()}
    if look(found, ["bf16 misa"], device, args.out):
        path = record.write(args.out, "caps" if caps else "e2e", record.environment(device) | found)
        print(f"no timings of a step that is wrong; {path}")
        return 1
    if args.checkpointing is not None:
        found["plan"] = {"checkpointing": args.checkpointing}
    names = args.shape or (["8b", "1b"] if caps else ["8b", "1b", "130m"])
    shapes = run(names, device, deadline, caps, args.out, **found)
    # Peers may be missing or too large for the device; MISA may not.
    ours = [peer for shape in shapes for name, peer in shape["peers"].items() if name in OURS]
    return 1 if any("error" in peer for peer in ours) else 0


def growth(args: argparse.Namespace, device: torch.device, deadline: float) -> int:
    """Time ends of rounds, and how steps, switches and iterations grow; write round_end.json, growth.json, growth.png.

    Ends of rounds have at most half of the time.
    """
    from benchmarks.step import growth, round_end

    until = (time.monotonic() + deadline) / 2
    return max(round_end.run(device, until, args.out), growth.run(device, deadline, args.out))


def memory(args: argparse.Namespace, device: torch.device, deadline: float) -> int:
    """Measure the peak of training under a cap, a process for each peer, and write memory.json after every one."""
    # Not at the top, for the same reason as in `e2e`.
    from benchmarks.train.training_memory import PLANS, summary, under_the_cap

    content = record.environment(device) | {"stage": "memory", "shapes": []}
    for name in args.shape or ["8b"]:
        if name not in PLANS:
            print(f"--shape {name} has no plan of memory: choose 8b or tiny", file=sys.stderr)
            return 2
        content["shapes"].append(None)
        for measured in under_the_cap(name, device, deadline):
            content["shapes"][-1] = measured
            path = record.write(args.out, "memory", content)
        print(summary(measured))
        if measured["left_out"]:
            print(f"left out at the time limit of {args.time_limit:.0f} s: {', '.join(measured['left_out'])}")
    print(f"commit {content['commit']}, {content['device']['name']}, torch {torch.__version__}; {path}")
    # AdamW does not fit under the cap, and LoRA needs a package; what MISA runs must do.
    ours = [p for s in content["shapes"] for name, p in s["peers"].items() if name not in ("adamw", "lora")]
    return 1 if any("error" in peer for peer in ours) else 0


def regime(args: argparse.Namespace, device: torch.device, deadline: float) -> int:
    """Train with MISA and its peers, one run after the other, until all have run or the time is up; see regime.md.

    Finished runs are kept beside it: the next time the stage goes on from there.
    """
    # Not at the top, for the same reason as in `e2e`.
    from benchmarks.quality.regime import on_the_gpu
    from benchmarks.quality.regime_runs import SCALES

    sys.path.append(str(wheels.FOLDER))
    content = on_the_gpu(SCALES["128m" if device.type == "cuda" else "tiny"], deadline, args.out)
    ours = content["failed"].keys() - {"AdamW", "LoRA", "GaLore", "BAdam"}
    return 1 if ours else 0


STAGES = {
    "first": first,
    "smoke": smoke,
    "test": test,
    "bench": bench,
    "formats": formats,
    "growth": growth,
    "e2e": e2e,
    "caps": caps,
    "memory": memory,
    "regime": regime,
    "all": everything,
}

if __name__ == "__main__":
    sys.exit(main())
