"""Mixed jobs for a real worker on the SDK's own loop, against a local stand-in of RunPod's queue, and the rules."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from sdxl_worker.topology import write_example_lora
from tests.integration.queue_server import QueueServer
from tests.integration.worker_process import WorkerProcess, worker_environment
from tests.soak.kinds import Kind, kinds
from tests.soak.worker import FIRST, LAST
from tests.support.http_server import FileServer

# The allocator keeps some of what a round took at its peak: up to 39 MB more after the second one were seen.
GROWTH_LIMIT_MB = 64.0
SCRIPT = "import sys; from tests.soak.worker import main; sys.exit(main())"


@dataclass
class Report:
    """What came of a soak; `broken` are the rules that did not hold."""

    seed: int
    jobs: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    memory_mb: list[float] = field(default_factory=list)
    repeats: int = 0
    broken: list[str] = field(default_factory=list)

    @property
    def growth_mb(self) -> float:
        """How much more memory than after the first round the worker had after any other."""
        return max(self.memory_mb[1:], default=self.memory_mb[0]) - self.memory_mb[0]


def rounds_of(every: list[Kind], jobs: int, random: Random) -> list[list[Kind]]:
    """`jobs` jobs in rounds that each hold the same kinds in another order.

    Fewer kinds where it would be one round: those at equal distances, so that some of every mode are among them.
    """
    size = min(len(every), max(1, jobs // 2))
    start = random.randrange(len(every))
    chosen = [every[(start + index * len(every) // size) % len(every)] for index in range(size)]
    rounds = []
    for start in range(0, jobs, size):
        order = random.sample(chosen, size)[: jobs - start]
        rounds.append(sorted(order, key=_place))
    return rounds


def _place(kind: Kind) -> bool:
    """Twice in a row without memory ends a worker: these jobs come first in a round, and others between."""
    return kind.error != "OUT_OF_MEMORY"


def soak(jobs: int, seed: int, folder: Path, on_job: Callable[[int], None] = lambda done: None) -> Report:
    """Run the jobs; `on_job(done)` follows them."""
    report = Report(seed)
    cache = folder / "cache"
    write_example_lora(cache)
    with FileServer() as files, QueueServer() as queue:
        rounds = rounds_of(kinds(files, cache), jobs, Random(seed))
        environment = {
            **worker_environment(cache),
            **queue.environment("soak"),
            "WORKER_CONCURRENCY": "2",
            "REFINER_ID": "tiny",
        }
        with WorkerProcess(folder / "worker.log", environment, script=SCRIPT) as worker:
            first: dict[str, dict[str, Any]] = {}
            for number, kinds_of_round in enumerate(rounds):
                for name, answers in _run_round(queue, kinds_of_round):
                    _judge(report, name, answers, first)
                report.jobs += len(kinds_of_round)
                report.memory_mb.append(worker.resident_bytes / 2**20)
                on_job(report.jobs)
                if worker.process.poll() is not None:
                    report.broken.append(f"the worker ended in round {number + 1}")
                    break
            worker.terminate()
            if code := worker.exit_status():
                report.broken.append(f"the worker's exit status is {code}")
            _judge_log(report, worker.text)
    if report.growth_mb > GROWTH_LIMIT_MB:
        report.broken.append(f"the worker grew by {report.growth_mb:.0f} MB after the first round")
    return report


def _run_round(queue: QueueServer, of_round: list[Kind]) -> list[tuple[Kind, list[dict[str, Any]]]]:
    """Each job's answers, once all that are due have come."""
    submitted = {queue.submit(kind.fields): kind for kind in of_round}
    for job_id, kind in submitted.items():
        if kind.stop_at:
            # The SDK forgets a stop signal for a job that it has taken and not started.
            reached = functools.partial(_has_reached, queue, job_id, kind)
            queue.wait(reached, what=f"{kind.name} {kind.stop_at}")
            queue.stop_job(job_id)
    for job_id, kind in submitted.items():
        if not kind.stop_at:
            queue.answer(job_id)
    # A job that was stopped holds the next ones up until it has ended: this one's answer says that all have.
    queue.answer(queue.submit(None))
    return [(kind, [event.body for event in queue.of("done", job_id)]) for job_id, kind in submitted.items()]


def _has_reached(queue: QueueServer, job_id: str, kind: Kind) -> bool:
    told = (event.body["output"] for event in queue.of("progress", job_id))
    return any(progress["stage"] == kind.stop_at and progress.get("step", 0) >= kind.step for progress in told)


def _judge(report: Report, kind: Kind, answers: list[dict[str, Any]], first: dict[str, dict[str, Any]]) -> None:
    """One answer of the right sort; the first one of a kind is what all others have to be, to the bit."""
    due = 0 if kind.stop_at else 1
    if len(answers) != due:
        report.broken.append(f"{kind.name}: {len(answers)} answers, not {due}")
    for answer in answers[:due]:
        error, output = str(answer.get("error", "")), answer.get("output", {})
        code = error.partition(":")[0]
        if code != kind.error:
            report.broken.append(f"{kind.name}: {error or 'a picture'}, not {kind.error or 'a picture'}")
        elif not kind.error and len(output.get("images", [])) != kind.pictures:
            report.broken.append(f"{kind.name}: {len(output.get('images', []))} pictures, not {kind.pictures}")
        before = first.setdefault(kind.name, answer)
        report.repeats += before is not answer
        if before != answer:
            changed = [name for name in {**before, **answer} if before.get(name) != answer.get(name)]
            within = [name for name in output if before.get("output", {}).get(name) != output[name]]
            report.broken.append(f"{kind.name}: another answer than the first one in {', '.join(changed + within)}")
    report.outcomes["stopped" if kind.stop_at else kind.error or "drawn"] += 1


def _judge_log(report: Report, text: str) -> None:
    lines = text.splitlines()
    told = [line.rpartition(": ")[2] for line in lines if line.startswith((FIRST, LAST))]
    if len(told) != 2 or told[0] != told[1]:
        report.broken.append(f"the weights at the end are not those of the start: {told}")
