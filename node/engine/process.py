"""The engine process: `python -m node.engine.process`, started by `node.engine.client`.

Standard input brings one line of configuration and stays open: when it ends, the parent is gone and so is this process. Nothing
is written but logs on standard error and the sockets in the runtime directory.
"""

from __future__ import annotations

import functools
import gc
import logging
import sys
import time
from pathlib import Path

import msgspec

from node.config import AdapterSettings, EngineSettings, ModelSettings
from node.engine.channel import EngineChannel
from node.engine.cuda_context import begin_context
from node.engine.launch import LaunchConfig
from node.engine.loop import EngineLoop
from node.engine.messages import StartFailed
from node.errors import NodeError
from node.models.base_identity import HASH_CACHE, begin_base
from node.parent_watch import watch_parent
from node.start_notes import Note, StartNotes

EXIT_START_FAILED = 3
_SWITCH_INTERVAL_S = 0.0005


def main() -> int:
    """Serve until told to stop; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    note = StartNotes(time.monotonic, functools.partial(logging.getLogger(__name__).info, "start: %s after %.2f s (%.2f)"))
    gc.disable()  # until everything is there: half a million objects come and none goes
    # Threads that read weights, or an adapter's headers, wait for the interpreter lock at most so long; the step loop for them.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=LaunchConfig)
    watch_parent()
    channel = EngineChannel(Path(config.runtime_dir), config.high_water_mark)
    try:
        return _serve(config, channel, note)
    finally:
        channel.close()


def _serve(config: LaunchConfig, channel: EngineChannel, note: Note) -> int:
    model, state_dir = ModelSettings.model_validate(config.model), Path(config.state_dir)
    begin_context(model.device)
    try:
        base = begin_base(model.path, model.revision, state_dir / HASH_CACHE)
        # Imported late: torch takes seconds, in which the files are hashed and the parent's death must be noticed.
        from node.engine.engine import open_engine

        note("libraries imported")
        engine = open_engine(
            model,
            EngineSettings.model_validate(config.engine),
            AdapterSettings.model_validate(config.adapters),
            state_dir,
            channel.ring,
            base=base,
            note=note,
        )
    except NodeError as error:
        channel.send(StartFailed(type(error).__name__, error.error_code, error.message))
        return EXIT_START_FAILED
    ready = engine.ready
    logger = logging.getLogger(__name__)
    logger.info("serving %s (%s) with %s kernels", ready.model_id, ready.dtype, ready.kernels)
    if ready.device == "cpu" and ready.kernels == "reference" and config.engine["kernels"] == "auto":
        logger.warning("the C++ kernels are not built: the torch reference runs, several times slower; see openlora-node doctor")
    channel.send(ready)
    # What was imported and loaded stays: the collector need not walk it again in the middle of a step.
    gc.collect()
    gc.freeze()
    gc.enable()
    note("ready to serve")
    try:
        EngineLoop(engine, channel).run()
    finally:
        engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
