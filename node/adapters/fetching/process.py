"""The fetching process: `python -m node.adapters.fetching.process`, started by `node.adapters.fetching.client`.

It holds the sources' client libraries and their threads, so that whatever they do, however long, the API process's event loop and
interpreter lock are not theirs. Messages come on standard input, whose end is the order to stop; nobody but the parent has it.
"""

from __future__ import annotations

import logging
import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import msgspec

from node.adapters.fetching.door import VERIFY_THREADS
from node.adapters.fetching.messages import (
    MAX_MESSAGE_BYTES,
    Answer,
    Downloads,
    Event,
    Failed,
    FetchConfig,
    Fetched,
    Job,
    ListProgress,
    Resolve,
    Started,
    StartFailed,
    Verified,
    Verify,
    job_decoder,
    packed,
)
from node.adapters.fetching.work import FetchWork
from node.child_messages import Outlet, read_message
from node.config import AdapterSettings, Settings
from node.errors import NodeError

NICENESS = 5  # whoever is served now comes first
DRAIN_S = 1.0  # at the end, for what is nearly done; a broken download goes on where it stopped
EXIT_START_FAILED = 3

logger = logging.getLogger(__name__)


class JobDesk:
    """Gives each job a thread and sends its answer."""

    def __init__(self, work: FetchWork, answers: Outlet[Event], fetch_workers: int) -> None:
        self._work = work
        self._answers = answers
        self._fetching = ThreadPoolExecutor(fetch_workers, thread_name_prefix="fetch")
        self._rechecking = ThreadPoolExecutor(fetch_workers, thread_name_prefix="recheck")
        self._verifying = ThreadPoolExecutor(VERIFY_THREADS, thread_name_prefix="verify")
        self._running: set[Future[None]] = set()

    def take(self, job: Job) -> None:
        """Begin a job. Called by one thread."""
        if isinstance(job, ListProgress):
            self._answers.send(Downloads(job.job_id, self._work.progress()))
            return
        future = self._pool(job).submit(self._run, job)
        self._running.add(future)
        future.add_done_callback(self._running.discard)

    def close(self) -> None:
        """Begin nothing more, and let what is nearly done end."""
        for pool in (self._fetching, self._rechecking, self._verifying):
            pool.shutdown(wait=False, cancel_futures=True)
        wait(tuple(self._running), DRAIN_S)

    def _pool(self, job: Resolve | Verify) -> ThreadPoolExecutor:
        """What is known here, and what lies on this disk, never waits for the threads that distant sources hold."""
        if isinstance(job, Verify):
            return self._verifying
        return self._rechecking if job.is_known else self._fetching

    def _run(self, job: Resolve | Verify) -> None:
        self._answers.send(self._answer(job))

    def _answer(self, job: Resolve | Verify) -> Answer:
        try:
            if isinstance(job, Resolve):
                return Fetched(job.job_id, self._work.resolve(job.source, job.name, job.token))
            return Verified(job.job_id, self._work.verify(Path(job.directory)))
        except NodeError as error:
            return Failed(job.job_id, error.to_json())
        except Exception:  # a defect must reach its caller as an answer, and end neither this thread nor the others
            logger.exception("a job failed inside the node: %r", job)
            return Failed(job.job_id, NodeError("fetching the adapter failed inside the node; its log says why").to_json())


def main() -> int:
    """Serve until the input ends; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its warnings quote addresses, which may be signed
    answers: Outlet[Event] = Outlet.of_stdout(packed)
    content = read_message(sys.stdin.buffer, MAX_MESSAGE_BYTES)
    if content is None:
        return EXIT_START_FAILED
    os.nice(NICENESS)
    try:
        config = msgspec.msgpack.decode(content, type=FetchConfig)
        desk = _open_desk(config, answers)
    except NodeError as error:
        answers.send(StartFailed(error.to_json()))
        return EXIT_START_FAILED
    answers.send(Started())
    decoder = job_decoder()
    while (content := read_message(sys.stdin.buffer, MAX_MESSAGE_BYTES)) is not None:
        desk.take(decoder.decode(content))
    desk.close()
    sys.stderr.flush()
    os._exit(0)  # without waiting for a source that is slow to answer


def _open_desk(config: FetchConfig, answers: Outlet[Event]) -> JobDesk:
    adapters = AdapterSettings.model_validate(config.adapters)
    settings = Settings(data_dir=Path(config.data_dir)).model_copy(
        update={"data_dir": Path(config.data_dir), "adapters": adapters}
    )  # as the parent has them: the environment has been read already
    work = FetchWork(settings, config.linears, config.base_id, hub_endpoint=config.hub_endpoint)
    return JobDesk(work, answers, adapters.fetch_workers)


if __name__ == "__main__":
    sys.exit(main())
